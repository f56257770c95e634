"""Plans one layout, and searches for layouts that fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import Assumptions, Hardware
from clipo_megatron.planning.host import HostMemory, host_memory
from clipo_megatron.planning.memory import (
    ServerMemory,
    TrainerMemory,
    longest_rollout,
    row_tokens,
    server_memory,
    static_option,
    trainer_memory,
)
from clipo_megatron.planning.timing import StepTime, step_time
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

# Shares of all GPUs that are tried for servers with GPUs of their own.
SERVER_SHARES = (0.25, 0.5, 0.75)
# Tokens of the longest rollout that a context-parallel rank has at least: shorter rows are cheaper than more ranks.
LEAST_SHARE = 4096


@dataclass(frozen=True)
class LayoutPlan:
    """The memory and the time that one layout takes."""

    division: ParallelDivision  # the trainer's parallel sizes but CP and DP
    cp: int
    dp: int
    recompute: bool
    server_tp: int
    server_gpus: int
    colocated: bool
    hardware: Hardware
    trainer: list[TrainerMemory]  # one for each pipeline stage
    server: ServerMemory
    host: HostMemory  # of a node
    static: tuple[str, float]  # the servers' option for weights and cache, and the largest share of a GPU that fits
    time: StepTime
    problems: tuple[str, ...]  # reasons why it does not fit; () if it does
    because: str = ""  # why the search took no smaller `cp`; "" where that is 1

    @property
    def trainer_gpus(self) -> int:
        """Number of GPUs that train."""
        return self.division.tp * self.cp * self.division.pp * self.dp

    @property
    def gpus(self) -> int:
        """Number of GPUs that train or generate."""
        return self.trainer_gpus if self.colocated else self.trainer_gpus + self.server_gpus

    @property
    def fits(self) -> bool:
        """Tell whether every GPU has enough memory."""
        return not self.problems

    def shorter_rows_fit(self, usable: float) -> bool:
        """Tell whether what does not grow with rows fits `usable` bytes of each GPU."""
        return all(stage.total - stage.of_rows <= usable for stage in self.trainer)

    @property
    def gpu_seconds(self) -> float:
        """The cost of a step: its time on all GPUs together."""
        return self.gpus * self.time.total

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens that a step trains on, divided by its time and all GPUs."""
        return self.time.tokens / self.gpu_seconds

    @property
    def overrides(self) -> list[str]:
        """The settings of a configuration that ask for this layout."""
        division = self.division
        chosen = {"layout.tp": division.tp, "layout.pp": division.pp, "layout.dp": self.dp, "serve.tp": self.server_tp}
        if self.colocated:
            chosen |= {self.static[0]: self.static[1]}
        else:
            servers = self.server_gpus // self.server_tp
            here = max(1, self.hardware.gpus_per_node // self.server_tp)  # each node runs its own `clipo serve`
            chosen |= {"serve.servers": min(servers, here), "rollout.servers": servers}
        chosen |= {"layout.cp": self.cp} if self.cp > 1 else {}
        chosen |= {"layout.ep": division.ep} if division.ep > 1 else {}
        chosen |= {"layout.etp": division.etp} if division.etp is not None else {}
        chosen |= {"layout.first_stage_layers": division.first_layers} if division.first_layers else {}
        chosen |= {"layout.last_stage_layers": division.last_layers} if division.last_layers else {}
        flags = {"layout.sequence_parallel": division.tp > 1, "model.recompute": self.recompute}
        return [f"{key}={value}" for key, value in chosen.items()] + [f"{k}={str(v).lower()}" for k, v in flags.items()]


def plan_layout(
    config: RunConfig,
    spec: ModelSpec,
    dp: int,
    server_gpus: int,
    hardware: Hardware,
    assume: Assumptions,
    *,
    division: ParallelDivision | None = None,
    critic: ModelSpec | None = None,
) -> LayoutPlan:
    """Compute the memory and the time of one layout, and whether it fits.

    Args:
        config: of the run; its `layout.dp` is not used.
        spec: the architecture of the model.
        dp: number of data-parallel replicas.
        server_gpus: number of GPUs that generate; with `rollout.colocated` those of the trainer.
        hardware: the kind of all GPUs.
        assume: the shares of its rates that are reached.
        division: the trainer's parallel sizes; None: as configured.
        critic: the model that a critic starts from; None: the policy's.

    Raises:
        PlanError: the model cannot be divided in this way, or the GPUs do not have the precision.
    """
    if (precision := config.megatron.get("fp8")) is not None and hardware.fp8_flops is None:
        raise PlanError(f"megatron.fp8 = {precision}, and {hardware.name} has no FP8. Leave it out.")
    division = division or ParallelDivision.of(config.layout)
    try:
        trainer = trainer_memory(config, spec, division, dp, assume, critic=critic)
        resident = max(stage.resident for stage in trainer) if config.rollout.colocated else 0.0
        time = step_time(config, spec, division, dp, server_gpus, hardware, assume, critic=critic, resident=resident)
    except WeightsError as error:
        raise PlanError(f"tp {division.tp} x pp {division.pp} x ep {division.ep}: {error}") from error
    option, share = static_option(config)
    server = server_memory(spec, config.serve.tp, hardware, assume, resident=resident, static=share)
    most = int(100 * (assume.memory - (server.trainer + server.reserve) / hardware.memory_bytes)) / 100
    host = host_memory(config, trainer, min(hardware.gpus_per_node, division.tp * config.layout.cp * division.pp * dp))
    return LayoutPlan(
        division=division,
        cp=config.layout.cp,
        dp=dp,
        recompute=config.model.recompute,
        server_tp=config.serve.tp,
        server_gpus=server_gpus,
        colocated=config.rollout.colocated,
        hardware=hardware,
        trainer=trainer,
        server=server,
        host=host,
        static=(option, max(0.0, most)),
        time=time,
        problems=(
            *_too_large(config, trainer, host, hardware, assume),
            *_problems(config, division, dp, server, server_gpus),
            *_beside(server, option, share, most, hardware),
        ),
    )


def _beside(server: ServerMemory, option: str, share: float | None, most: float, hardware: Hardware) -> Iterator[str]:
    if server.trainer and share is not None and share > most:
        yield (
            f"{option} = {share:g} takes {share * hardware.memory_bytes / 1e9:.1f} GB of a GPU of which the trainer "
            f"keeps {server.trainer / 1e9:.1f} GB: at most {max(0.0, most):.2f} fits"
        )


def _too_large(
    config: RunConfig, trainer: list[TrainerMemory], host: HostMemory, hardware: Hardware, assume: Assumptions
) -> Iterator[str]:
    usable = hardware.memory_bytes * assume.memory
    for stage, memory in enumerate(trainer):
        if memory.total > usable:
            largest = max(memory.parts, key=memory.parts.__getitem__)
            yield (
                f"stage {stage} of the trainer needs {memory.total / 1e9:.1f} GB of {usable / 1e9:.1f} GB "
                f"({largest} alone {memory.parts[largest] / 1e9:.1f} GB)"
                + (_of_a_row(config) if largest in ("activations", "logits") else "")
            )
    if host.total > (usable := hardware.host_bytes * assume.host_memory):
        largest = max(host.parts, key=host.parts.__getitem__)
        yield (
            f"the ranks of a node need {host.total / 1e9:.0f} GB of its host's {usable / 1e9:.0f} GB "
            f"({largest} alone {host.parts[largest] / 1e9:.0f} GB)"
        )


def _of_a_row(config: RunConfig) -> str:
    tokens = row_tokens(config)
    what = "shorter responses" if tokens == longest_rollout(config) else "a smaller layout.max_tokens_per_microbatch"
    return f" for a row of {tokens} tokens: a larger layout.cp, now {config.layout.cp}, or {what} makes it less"


def _problems(
    config: RunConfig, division: ParallelDivision, dp: int, server: ServerMemory, server_gpus: int
) -> Iterator[str]:
    longest = longest_rollout(config)
    if not server.sequences(longest):
        yield (
            f"a server on {config.serve.tp} GPUs has {server.cache / 1e9:.1f} GB for its cache, and a sequence of "
            f"{longest} tokens takes {longest * server.cache_per_token / 1e9:.1f} GB"
        )
    if server_gpus < config.serve.tp:
        yield f"{server_gpus} GPUs are left to generate, and one server takes {config.serve.tp}"
    ranks = dp * config.layout.cp * division.tp  # of a stage
    if ranks % (division.ep * division.expert_tp):
        yield f"ep {division.ep} x etp {division.expert_tp} does not divide the {ranks} ranks of a stage"


def search_layouts(
    config: RunConfig,
    spec: ModelSpec,
    gpus: int,
    hardware: Hardware,
    assume: Assumptions,
    *,
    critic: ModelSpec | None = None,
) -> list[LayoutPlan]:
    """Find layouts of `gpus` GPUs that fit; the other arguments are as for `plan_layout`.

    The shortest step comes first, but for those that `assume.error` cannot tell from it: of these, the one with the
    least pipeline, context and tensor parallelism comes first, because it is simpler and depends on fewer assumptions.
    Rows are divided, by `layout.cp`, over as few ranks as their memory needs; `layout.cp` of `config` is not used.
    """
    servers = _server_sizes(config, spec, hardware, assume)
    usable = hardware.memory_bytes * assume.memory

    def planned(division: ParallelDivision, server_gpus: int, cp: int, recompute: bool) -> LayoutPlan | None:
        """With the smallest servers that fit, or the largest; None: the GPUs cannot be divided in this way."""
        trainers = gpus if config.rollout.colocated else gpus - server_gpus
        dp, rest = divmod(trainers, division.tp * cp * division.pp)
        if rest or not dp or (dp * cp * division.tp) % (division.ep * division.expert_tp):
            return None
        layout = replace(config.layout, cp=cp, sequence_parallel=division.tp > 1)
        plan = None
        for server_tp in servers:
            variant = replace(
                config,
                layout=layout,
                model=replace(config.model, recompute=recompute),
                serve=replace(config.serve, tp=server_tp),
                sglang={},
                vllm={},
            )
            plan = plan_layout(variant, spec, dp, server_gpus, hardware, assume, division=division, critic=critic)
            if plan.fits:
                break
        return plan

    found: list[LayoutPlan] = []
    servers_of = [gpus] if config.rollout.colocated else _server_gpus(gpus, hardware.gpus_per_node)
    for division, server_gpus in product(_possible_divisions(spec, gpus, hardware), servers_of):
        most = max(1, longest_rollout(config) // LEAST_SHARE)
        for recompute in (False, True):  # the second only with fewer ranks that divide a row than the first needs
            because = ""
            for cp in _powers_of_two(most):
                plan = planned(division, server_gpus, cp, recompute)
                if plan is not None and plan.fits:
                    found.append(replace(plan, because=because))
                    most = cp // 2
                fullest = max(each.total for each in plan.trainer) if plan else 0.0
                if plan is None or plan.fits or fullest <= usable or not plan.shorter_rows_fit(usable):
                    break
                because = f"with {cp} each would need {fullest / 1e9:.1f} GB of {usable / 1e9:.1f} GB"
    fastest = {id(plan) for plan in indistinct(found, assume)}
    return sorted(
        found,
        key=lambda plan: (
            (0, plan.division.pp, plan.cp, plan.recompute, plan.division.tp, plan.time.total)
            if id(plan) in fastest
            else (1, plan.time.total, plan.division.pp, plan.cp, plan.recompute, plan.division.tp)
        ),
    )


def indistinct(plans: Sequence[LayoutPlan], assume: Assumptions) -> list[LayoutPlan]:
    """Return the plans whose step is no longer than the shortest one, as far as this model of time can tell."""
    shortest = min((plan.time.total for plan in plans), default=0.0)
    return [plan for plan in plans if plan.time.total <= shortest * (1 + assume.error)]


def _server_sizes(config: RunConfig, spec: ModelSpec, hardware: Hardware, assume: Assumptions) -> list[int]:
    """Return the sizes of servers that hold the longest sequence, up to a whole node; the smallest first.

    The smallest is all that matters, but for colocated ones, beside which the trainer keeps its weights.
    """
    longest = longest_rollout(config)
    sizes = _powers_of_two(hardware.gpus_per_node)
    found = [tp for tp in sizes if server_memory(spec, tp, hardware, assume).sequences(longest)]
    return found if config.rollout.colocated else found[:1]


def _server_gpus(gpus: int, node: int) -> list[int]:
    """Return the numbers of GPUs that are tried for servers: shares of all, also without what is no whole node."""
    exact = [int(gpus * share) for share in SERVER_SHARES]
    return sorted({*exact, *(each - each % node for each in exact if each > node)})


def _possible_divisions(spec: ModelSpec, gpus: int, hardware: Hardware) -> Iterator[ParallelDivision]:
    """Yield divisions with TP within a node, stages that are equal except for the first and last, and all EP sizes."""
    for tp in _powers_of_two(min(gpus, hardware.gpus_per_node)):
        if spec.num_heads % tp:
            continue
        for pp in _powers_of_two(gpus // tp):
            if pp > spec.num_layers or (ends := _end_stage_layers(spec.num_layers, pp)) is None:
                continue
            for ep in _powers_of_two(min(64, gpus // pp)) if spec.experts else (1,):
                if spec.experts is None:
                    yield ParallelDivision(tp=tp, pp=pp, first_layers=ends[0], last_layers=ends[1])
                elif spec.experts.count % ep == 0:
                    yield ParallelDivision(tp=tp, pp=pp, ep=ep, etp=1, first_layers=ends[0], last_layers=ends[1])


def _end_stage_layers(layers: int, pp: int) -> tuple[int | None, int | None] | None:
    """Return the layers of first and last stage, (None, None) if all stages are equal; None if it cannot be done."""
    if layers % pp == 0:
        return None, None
    middle = -(-layers // pp)
    left = layers - middle * (pp - 2)
    return (-(-left // 2), left // 2) if pp >= 2 and left >= 2 else None


def _powers_of_two(most: int) -> Iterable[int]:
    return (1 << i for i in range(max(0, most).bit_length()))


def server_gpus_of(config: RunConfig, trainer_gpus: int) -> int:
    """Return the number of GPUs that generate in a configuration.

    `serve.servers` counts the servers of one node, `rollout.servers` all of them.

    Raises:
        PlanError: the training processes generate themselves.
    """
    if config.rollout.engine is EngineKind.local:
        raise PlanError(
            "rollout.engine = local generates in the training processes, which is for small models; plan with "
            "rollout.engine=sglang"
        )
    if config.rollout.colocated:
        return trainer_gpus
    return max(config.serve.servers, config.rollout.servers) * config.serve.tp
