"""Every method by name: where its stage stands, the paper, its options with their defaults. Imports no torch.

`algorithm.name` chooses a baseline, which gives advantages and the policy's loss; `algorithm.plugins` add stages to it.
Options are keyword arguments of the stage's class; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clipo_megatron.config.baseline_options import (
    DapoOptions,
    HptOptions,
    PpoOptions,
    RiskpoOptions,
    TppoOptions,
    WhitenOptions,
)
from clipo_megatron.config.group_loss_options import (
    ConspoOptions,
    CopgOptions,
    DiscoOptions,
)
from clipo_megatron.config.plugin_options import (
    AdoraOptions,
    CepoOptions,
    CgrpoOptions,
    D3sOptions,
    GcpoOptions,
    GraceOptions,
    HapoOptions,
    PapoOptions,
    PipoOptions,
    UnlikelinessOptions,
)
from clipo_megatron.config.schema import Aggregation, AlgorithmConfig, RunConfig


class Acts(str, Enum):
    """What a plug-in changes."""

    reward = "reward"
    advantage = "advantage"
    loss = "loss"  # it adds a term


@dataclass(frozen=True, slots=True)
class Method:
    """One named method.

    Attributes:
        stage: "module:Class" below clipo_megatron.algorithms.
        source: paper or place it comes from.
        summary: what it changes, in half a line.
        options: dataclass of its options; None: it has none.
        clip: default of algorithm.clip_low and clip_high; None: it clips nothing.
        aggregation: default of algorithm.aggregation; None: its loss is over whole groups.
        max_refill_rounds: default of rollout.max_refill_rounds.
        critic: whether it trains a value model beside the policy.
        single: whether a prompt's only rollout teaches something; without CLIPO, which compares several.
        below_one: whether clip_low is taken off a ratio of 1, and so must be less.
        windows: whether it learns from rollouts that go on in the next step (rollout.window_tokens).
        acts_on: what a plug-in changes.
        reference: whether it needs the log-probs of the policy that the run began with.
        forwards: over the step's rollouts, behind other prompts than theirs.
        replays: former steps that the policy is updated on beside this one.
        demonstrations: whether it needs worked solutions in the rows of training prompts.
    """

    stage: str
    source: str
    summary: str
    options: type | None = None
    clip: tuple[float, float] | None = (0.2, 0.2)
    aggregation: Aggregation | None = Aggregation.token_mean
    max_refill_rounds: int = 0
    critic: bool = False
    single: bool = False
    below_one: bool = True
    windows: bool = False
    acts_on: Acts | None = None
    reference: bool = False
    forwards: int = 0
    replays: int = 0
    demonstrations: bool = False


BASELINES: dict[str, Method] = {
    "grpo": Method("grpo:GRPO", "arXiv 2402.03300", "group mean and standard deviation"),
    "dr_grpo": Method(
        "grpo:DrGRPO",
        "arXiv 2503.20783",
        "group mean alone, token sum over a constant length",
        aggregation=Aggregation.constant,
    ),
    "rloo": Method("reinforce:RLOO", "arXiv 2402.14740", "mean reward of the group's other rollouts"),
    "gspo": Method(
        "gspo:GSPO",
        "arXiv 2507.18071",
        "one ratio a rollout, clipped as a whole",
        clip=(3e-4, 4e-4),
        aggregation=Aggregation.sequence_mean,
    ),
    "ppo": Method(
        "ppo:PPO",
        "arXiv 1707.06347",
        "advantages of single tokens, from a critic's values",
        PpoOptions,
        single=True,
        critic=True,
    ),
    "t_ppo": Method(
        "ppo:TPPO",
        "arXiv 2506.15050",
        "responses that grow in windows, which continue at the critic's value",
        TppoOptions,
        single=True,
        critic=True,
        windows=True,
    ),
    "dapo": Method(
        "dapo:DAPO",
        "arXiv 2503.14476",
        "clip-higher, dynamic sampling, penalty on overlong responses",
        DapoOptions,
        clip=(0.2, 0.28),
        max_refill_rounds=9,
    ),
    "gmpo": Method(
        "gspo:GMPO",
        "arXiv 2507.20673",
        "geometric mean of a rollout's ratios, log clipped on one side",
        clip=(0.4, 0.4),
        aggregation=Aggregation.sequence_mean,
        below_one=False,
    ),
    "reinforce_pp": Method(
        "reinforce:ReinforcePP",
        "arXiv 2501.03262",
        "rewards whitened over the batch",
        WhitenOptions,
        single=True,
    ),
    "reinforce_pp_baseline": Method(
        "reinforce:ReinforcePPBaseline",
        "arXiv 2501.03262",
        "group mean taken off, then whitened over the batch",
        WhitenOptions,
    ),
    "cispo": Method(
        "cispo:CISPO",
        "arXiv 2506.13585",
        "clipped ratios as weights, so that no token loses its gradient",
        clip=(1.0, 5.0),
        below_one=False,
    ),
    "riskpo": Method(
        "riskpo:RiskPO",
        "arXiv 2510.00911",
        "lower tail and middle range of the scores of bundles of prompts",
        RiskpoOptions,
        single=True,
    ),
    "disco": Method(
        "disco:DisCO",
        "arXiv 2505.12366",
        "correct rollouts against the hardest wrong ones",
        DiscoOptions,
        clip=None,
        aggregation=None,
    ),
    "hpt": Method(
        "hpt:HPT",
        "arXiv 2509.04419",
        "a demonstration in place of the rollouts where none is right",
        HptOptions,
        demonstrations=True,
    ),
    "copg": Method(
        "copg:CoPG",
        "arXiv 2406.19185",
        "pairs of rollouts: reward differences against log-ratio differences",
        CopgOptions,
        clip=None,
        aggregation=None,
        reference=True,
    ),
    "conspo": Method(
        "conspo:ConSPO",
        "arXiv 2605.12969",
        "each correct rollout against the wrong ones of its group",
        ConspoOptions,
        clip=None,
        aggregation=None,
    ),
}

PLUGINS: dict[str, Method] = {
    "cepo": Method(
        "cepo:CEPO",
        "arXiv 2605.19436",
        "tokens that a hint at the right answer makes likelier",
        CepoOptions,
        acts_on=Acts.advantage,
        forwards=2,
    ),
    "d3s": Method(
        "d3s:D3S",
        "arXiv 2509.22115",
        "rollouts of largest variance, tokens of largest |A| H",
        D3sOptions,
        acts_on=Acts.advantage,
    ),
    "hapo": Method(
        "hapo:HAPO",
        "arXiv 2505.11225",
        "reward for the shortest correct answers so far",
        HapoOptions,
        acts_on=Acts.reward,
    ),
    "adora": Method(
        "adora:ADORA",
        "arXiv 2602.10019",
        "less advantage where correct rollouts are not the longer ones",
        AdoraOptions,
        acts_on=Acts.advantage,
    ),
    "empo": Method(
        "final_answers:EMPO",
        "arXiv 2504.05812",
        "reward for the answer that most of the group give, no gold",
        acts_on=Acts.reward,
    ),
    "unlikeliness": Method(
        "unlikeliness:Unlikeliness",
        "arXiv 2506.02355",
        "more reward for unlikely correct rollouts",
        UnlikelinessOptions,
        acts_on=Acts.reward,
    ),
    "gcpo": Method(
        "gcpo:GCPO",
        "arXiv 2506.07160",
        "reward for using a tool where it helps the group",
        GcpoOptions,
        acts_on=Acts.reward,
    ),
    "c_grpo": Method(
        "c_grpo:CGRPO",
        "arXiv 2601.06021",
        "correct rollouts by their rubric scores",
        CgrpoOptions,
        acts_on=Acts.reward,
    ),
    "grace": Method(
        "grace:GRACE",
        "arXiv 2510.04506",
        "cosines to the group's right and wrong rollouts",
        GraceOptions,
        acts_on=Acts.reward,
    ),
    "pipo": Method(
        "pipo:PIPO",
        "arXiv 2604.00860",
        "the previous batch again, by how its update did",
        PipoOptions,
        acts_on=Acts.advantage,
        replays=1,
    ),
    "papo": Method(
        "papo:PAPO",
        "arXiv 2507.06448",
        "away from what the policy says without the prompt",
        PapoOptions,
        acts_on=Acts.loss,
        forwards=1,
    ),
}


def is_import_path(name: str) -> bool:
    """Whether a method's name is a user's own class: "file.py:Class" or "package.module:Class"."""
    return ":" in name


def baseline(algorithm: AlgorithmConfig) -> Method:
    """The baseline's entry; that of GRPO's defaults for a user's own class."""
    return BASELINES.get(algorithm.name, BASELINES["grpo"])


def named_methods(algorithm: AlgorithmConfig) -> list[Method]:
    """The entries of baseline and plug-ins, classes of a user's own left out."""
    plugins = [PLUGINS[plugin.name] for plugin in algorithm.plugins if plugin.name in PLUGINS]
    return [BASELINES[algorithm.name], *plugins] if algorithm.name in BASELINES else plugins


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether a reference policy is kept and asked, as far as can be said of classes of a user's own."""
    return algorithm.kl.coefficient > 0 or any(method.reference for method in named_methods(algorithm))


def max_refill_rounds(config: RunConfig) -> int:
    """How often a step replaces groups that teach nothing: rollout.max_refill_rounds, or the baseline's default."""
    chosen = config.rollout.max_refill_rounds
    return baseline(config.algorithm).max_refill_rounds if chosen is None else chosen
