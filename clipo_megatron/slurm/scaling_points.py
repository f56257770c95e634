"""The points of a scaling study: short runs of one configuration on several numbers of nodes.

weak      prompts per step grow with the nodes: the work of a replica stays, and so should the time of a step
strong    prompts per step stay: twice the nodes should halve the time of a step

Replicas (`layout.dp`) grow with the nodes in both; TP, PP and EP stay. The run on the fewest nodes belongs to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipo_megatron.config.errors import spell
from clipo_megatron.config.ranges import LARGEST_WHOLE
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.runtime.durable_files import text_of, write_durably
from clipo_megatron.runtime.run_dir import SCALE
from clipo_megatron.slurm.resources import Resources, SlurmError

WEAK, STRONG = "weak", "strong"
POINTS, FORMER_POINTS = "points.json", "ladder.json"  # the latter is what earlier releases wrote


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """One run of a scaling study, and its Slurm job."""

    name: str
    kinds: tuple[str, ...]  # WEAK, STRONG or both
    nodes: int  # nodes that train
    server_nodes: int  # nodes that only generate
    ranks: int
    gpus: int  # GPUs of all nodes; 0: a run on CPUs
    steps: int
    prompts: int  # prompts per step
    output: str  # train.output of the run
    overrides: tuple[str, ...]  # settings that win over the configuration file, the user's first
    job: str | None = None  # Slurm's number, once submitted

    @property
    def is_first(self) -> bool:
        """Whether the other runs are compared with this one."""
        return self.name.startswith("nodes-")

    @property
    def units(self) -> int:
        """The number of GPUs, or of ranks where there are none."""
        return self.gpus or self.ranks


def scaling_points(
    config: RunConfig,
    nodes: Sequence[int],
    server_nodes: Sequence[int],
    resources: Callable[[int, int], Resources],
    *,
    kinds: Sequence[str],
    steps: int,
) -> list[ScalingPoint]:
    """The points of a study, fewest nodes first.

    Args:
        config: the configuration; its prompts per step are those of the run on the fewest nodes.
        nodes: numbers of nodes that train, rising.
        server_nodes: as many numbers of nodes that only generate, or none.
        resources: from (nodes, server nodes), what a job on them asks for.
        kinds: WEAK, STRONG or both.
        steps: steps of each run.

    Raises:
        SlurmError: the numbers do not fit each other, or the layout.
    """
    if not nodes or list(nodes) != sorted(set(nodes)) or nodes[0] < 1:
        raise SlurmError(f"--nodes {_listed(nodes)}: give different numbers in rising order, such as 1,2,4,8")
    if server_nodes and len(server_nodes) != len(nodes):
        raise SlurmError(
            f"--server-nodes {_listed(server_nodes)} has {len(server_nodes)} numbers, and --nodes {_listed(nodes)} has "
            f"{len(nodes)}. Give one for each."
        )
    first, points = nodes[0], []
    for count, serving in zip(nodes, server_nodes or [0] * len(nodes), strict=True):
        for kind in kinds if count != first else kinds[:1]:
            prompts, rest = config.data.prompts_per_step, 0
            if kind == WEAK:
                prompts, rest = divmod(prompts * count, first)
            if rest:
                raise SlurmError(
                    f"data.prompts_per_step = {config.data.prompts_per_step} on {first} nodes is no whole number on "
                    f"{count}. Make it a multiple of {first}."
                )
            name = f"nodes-{count}" if count == first else f"{kind}-{count}"
            of = tuple(kinds) if count == first else (kind,)
            points.append(_scaling_point(config, name, of, resources(count, serving), prompts, steps))
    return points


def _scaling_point(
    config: RunConfig, name: str, kinds: tuple[str, ...], resources: Resources, prompts: int, steps: int
) -> ScalingPoint:
    model = config.layout.replica_ranks
    dp, rest = divmod(resources.ranks, model)
    if rest or not dp:
        raise SlurmError(
            f"{resources.nodes} nodes have {resources.ranks} ranks, which layout.tp x cp x pp = {model} does not "
            "divide. Change --nodes, --ranks-per-node or the layout."
        )
    output = str(folder_of(config) / name)
    overrides = {
        "name": f"{config.name}-{name}",
        "train.output": output,
        "train.steps": steps,
        "layout.dp": dp,
        "data.prompts_per_step": prompts,
        # Training is measured, so nothing else should take place.
        "data.eval": [],
        "eval.at_start": False,
        "eval.every": 0,
        "checkpoint.every": 0,
        "checkpoint.at_end": False,
        "clipo.warmup_steps": 0,
        "report.save_rollouts": 0,
    }
    return ScalingPoint(
        name=name,
        kinds=kinds,
        nodes=resources.nodes,
        server_nodes=resources.server_nodes,
        ranks=resources.ranks,
        gpus=resources.gpus,
        steps=steps,
        prompts=prompts,
        output=output,
        overrides=tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
    )


def folder_of(config: RunConfig) -> Path:
    """The folder below which the runs of a configuration's study write."""
    return Path(config.train.output).absolute() / SCALE


def write(folder: Path, points: Sequence[ScalingPoint]) -> None:
    """Write the points with their jobs, so that a later call can continue the study."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / POINTS, json.dumps([asdict(point) for point in points], indent=1))


def read(folder: Path) -> list[ScalingPoint]:
    """The points that `write` wrote; [] where there are none.

    Raises:
        SlurmError: the file is damaged.
    """
    file = folder / POINTS
    try:
        if not file.exists():
            file = folder / FORMER_POINTS
        if not file.exists():
            return []
        found = json.loads(text_of(file))
        points = [
            ScalingPoint(**{**each, "kinds": tuple(each["kinds"]), "overrides": tuple(each["overrides"])})
            for each in found
        ]
        for point in points:
            _refuse_damage(point)
        return points
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SlurmError(f"{file} cannot be read ({error}). Remove {folder}, and measure again.") from None


def _refuse_damage(point: ScalingPoint) -> None:
    """Raise ValueError for a point that `write` cannot have written."""
    words = (point.name, point.output, *point.kinds, *point.overrides, *([] if point.job is None else [point.job]))
    if not all(isinstance(each, str) for each in words) or not {*point.kinds} <= {WEAK, STRONG}:
        raise ValueError(f"the point {point.name!r} has something else where text belongs")
    counts = {"nodes": 1, "ranks": 1, "steps": 1, "prompts": 1, "server_nodes": 0, "gpus": 0}
    for name, least in counts.items():
        if type(value := getattr(point, name)) is not int or not least <= value <= LARGEST_WHOLE:
            raise ValueError(f"the point {point.name} has {name} = {spell(value)}")


def continued(points: Sequence[ScalingPoint], before: Sequence[ScalingPoint]) -> list[ScalingPoint]:
    """`points` with the jobs that `before`, the points of an earlier call, have for them.

    Raises:
        SlurmError: an earlier point of the same name was another run, whose metrics are still there.
    """
    known = {point.name: point for point in before}
    for point in points:
        old = known.get(point.name)
        if old and replace(old, job=None) != replace(point, job=None):
            raise SlurmError(
                f"{point.output} belongs to another study, of {old.prompts} prompts and {old.steps} steps on "
                f"{old.ranks} ranks, or of other overrides ({POINTS} there has them). Remove "
                f"{Path(point.output).parent}, or choose another train.output."
            )
    return [replace(point, job=known[point.name].job) if point.name in known else point for point in points]


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
