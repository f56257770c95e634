"""The runs of a scaling experiment: one configuration on several numbers of nodes.

weak      prompts a step grow with the nodes: each replica has as much to do, and a step should take as long
strong    prompts a step stay: a step should take as much shorter as there are more nodes

Replicas (`layout.dp`) grow with the nodes in both; TP, PP and EP stay. The smallest number of nodes is a rung of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.runtime.durable_files import write_durably
from clipo_megatron.slurm.errors import ScalingError
from clipo_megatron.slurm.resources import Resources

WEAK, STRONG = "weak", "strong"
FOLDER, LADDER = "scale", "ladder.json"  # below train.output


@dataclass(frozen=True, slots=True)
class Rung:
    """One run of the ladder."""

    name: str
    kinds: tuple[str, ...]  # of scaling that it is a point of
    nodes: int  # that train
    server_nodes: int
    ranks: int
    gpus: int  # of all nodes; 0: CPUs
    steps: int
    prompts: int  # a step
    output: str
    overrides: tuple[str, ...]  # of the configuration file, the user's first
    job: str | None = None  # Slurm's number, once submitted

    @property
    def is_first(self) -> bool:
        """Whether it is the one that others are compared with."""
        return self.name.startswith("nodes-")

    @property
    def units(self) -> int:
        """What is counted: GPUs, or ranks where there are none."""
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
        config: with the prompts a step of the smallest rung.
        nodes: that train.
        server_nodes: as many numbers, of the nodes that generate; or none.
        resources: of a job on so many nodes that train and that generate.
        kinds: WEAK, STRONG or both.
        steps: of each run.

    Raises:
        ScalingError: numbers that give no ladder.
    """
    if not nodes or list(nodes) != sorted(set(nodes)) or nodes[0] < 1:
        raise ScalingError(f"--nodes {_listed(nodes)}: it takes different numbers in rising order, such as 1,2,4,8")
    if server_nodes and len(server_nodes) != len(nodes):
        raise ScalingError(
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
                raise ScalingError(
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
        raise ScalingError(
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
        # What is measured is training: nothing else is due while it runs.
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
    """Where the runs of a configuration's ladder write to."""
    return Path(config.train.output).absolute() / FOLDER


def write(folder: Path, rungs: Sequence[Rung]) -> None:
    """Keep the ladder, with the jobs that were submitted."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / LADDER, json.dumps([asdict(rung) for rung in rungs], indent=1))


def read(folder: Path) -> list[Rung]:
    """The ladder that was written; [] where there is none.

    Raises:
        ScalingError: the file is damaged.
    """
    file = folder / LADDER
    try:
        found = json.loads(file.read_text())
        return [
            Rung(**{**each, "kinds": tuple(each["kinds"]), "overrides": tuple(each["overrides"])}) for each in found
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ScalingError(f"{file} cannot be read ({error}). Remove {folder}, and measure again.") from None


def continued(rungs: Sequence[Rung], before: Sequence[Rung]) -> list[Rung]:
    """Rungs with the jobs that they had in an earlier call.

    Raises:
        ScalingError: a rung was another run then, and its figures are still there.
    """
    known = {rung.name: rung for rung in before}
    for rung in rungs:
        old = known.get(rung.name)
        if old and replace(old, job=None) != replace(rung, job=None):
            raise ScalingError(
                f"{rung.output} belongs to another ladder, of {old.prompts} prompts and {old.steps} steps on "
                f"{old.ranks} ranks, or of other overrides ({LADDER} there has them). Remove "
                f"{Path(rung.output).parent}, or choose another train.output."
            )
    return [replace(rung, job=known[rung.name].job) if rung.name in known else rung for rung in rungs]


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
