"""The ladder of a scaling study: its runs, which are one configuration on several numbers of nodes.

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
LADDER = "ladder.json"


@dataclass(frozen=True, slots=True)
class Rung:
    """One run of the ladder, and its Slurm job."""

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


def ladder(
    config: RunConfig,
    nodes: Sequence[int],
    server_nodes: Sequence[int],
    resources: Callable[[int, int], Resources],
    *,
    kinds: Sequence[str],
    steps: int,
) -> list[Rung]:
    """The rungs, fewest nodes first.

    Args:
        config: the configuration; its prompts per step are those of the run on the fewest nodes.
        nodes: numbers of nodes that train, rising.
        server_nodes: as many numbers of nodes that only generate, or none.
        resources: from (nodes, server nodes), what a job on them asks for.
        kinds: WEAK, STRONG or both.
        steps: steps of each run.

    Raises:
        SlurmError: the numbers give no ladder.
    """
    if not nodes or list(nodes) != sorted(set(nodes)) or nodes[0] < 1:
        raise SlurmError(f"--nodes {_listed(nodes)}: give different numbers in rising order, such as 1,2,4,8")
    if server_nodes and len(server_nodes) != len(nodes):
        raise SlurmError(
            f"--server-nodes {_listed(server_nodes)} has {len(server_nodes)} numbers, and --nodes {_listed(nodes)} has "
            f"{len(nodes)}. Give one for each."
        )
    first, rungs = nodes[0], []
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
            points = tuple(kinds) if count == first else (kind,)
            rungs.append(_rung(config, name, points, resources(count, serving), prompts, steps))
    return rungs


def _rung(config: RunConfig, name: str, kinds: tuple[str, ...], resources: Resources, prompts: int, steps: int) -> Rung:
    model = config.layout.tp * config.layout.pp
    dp, rest = divmod(resources.ranks, model)
    if rest or not dp:
        raise SlurmError(
            f"{resources.nodes} nodes have {resources.ranks} ranks, which layout.tp x layout.pp = {model} does not "
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
    return Rung(
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
    """The folder below which the runs of a configuration's ladder write."""
    return Path(config.train.output).absolute() / SCALE


def write(folder: Path, rungs: Sequence[Rung]) -> None:
    """Write the ladder with its jobs, so that a later call can continue it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / LADDER, json.dumps([asdict(rung) for rung in rungs], indent=1))


def read(folder: Path) -> list[Rung]:
    """The ladder that `write` wrote; [] where there is none.

    Raises:
        SlurmError: the file is damaged.
    """
    file = folder / LADDER
    try:
        if not file.exists():
            return []
        found = json.loads(text_of(file))
        rungs = [
            Rung(**{**each, "kinds": tuple(each["kinds"]), "overrides": tuple(each["overrides"])}) for each in found
        ]
        for rung in rungs:
            _refuse_damage(rung)
        return rungs
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SlurmError(f"{file} cannot be read ({error}). Remove {folder}, and measure again.") from None


def _refuse_damage(rung: Rung) -> None:
    """Raise ValueError for a rung that `write` cannot have written."""
    words = (rung.name, rung.output, *rung.kinds, *rung.overrides, *([] if rung.job is None else [rung.job]))
    if not all(isinstance(each, str) for each in words) or not {*rung.kinds} <= {WEAK, STRONG}:
        raise ValueError(f"the rung {rung.name!r} has something else where text belongs")
    counts = {"nodes": 1, "ranks": 1, "steps": 1, "prompts": 1, "server_nodes": 0, "gpus": 0}
    for name, least in counts.items():
        if type(value := getattr(rung, name)) is not int or not least <= value <= LARGEST_WHOLE:
            raise ValueError(f"the rung {rung.name} has {name} = {spell(value)}")


def continued(rungs: Sequence[Rung], before: Sequence[Rung]) -> list[Rung]:
    """`rungs` with the jobs that `before`, the ladder of an earlier call, has for them.

    Raises:
        SlurmError: an earlier rung of the same name was another run, whose metrics are still there.
    """
    known = {rung.name: rung for rung in before}
    for rung in rungs:
        old = known.get(rung.name)
        if old and replace(old, job=None) != replace(rung, job=None):
            raise SlurmError(
                f"{rung.output} belongs to another ladder, of {old.prompts} prompts and {old.steps} steps on "
                f"{old.ranks} ranks, or of other overrides ({LADDER} there has them). Remove "
                f"{Path(rung.output).parent}, or choose another train.output."
            )
    return [replace(rung, job=known[rung.name].job) if rung.name in known else rung for rung in rungs]


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
