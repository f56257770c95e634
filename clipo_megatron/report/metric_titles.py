"""Title, unit and explanation of each metric in the report."""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.telemetry.metric_names import AGE_MEAN, STEP_TIME, TOKENS_PER_S


@dataclass(frozen=True)
class Metric:
    """How the report shows one metric."""

    name: str  # key in metrics.jsonl
    title: str
    axis: str  # name of the vertical axis, with the unit
    caption: str
    share: bool = False  # shown in percent
    zero: bool = False  # the axis includes 0


LEARNING = (
    Metric(
        "reward/accuracy",
        "Accuracy on training problems",
        "correct rollouts",
        "Share of a step's graded rollouts that are correct, sampled at the training temperature.",
        share=True,
        zero=True,
    ),
    Metric(
        "reward/mean",
        "Reward",
        "mean reward",
        "Mean over a step's rollouts of the reward that advantages come from: the verifier's plus CLIPO's bonus.",
    ),
    Metric(
        "rollout/response_length",
        "Response length",
        "tokens",
        "Mean number of tokens of a response.",
        zero=True,
    ),
    Metric(
        "rollout/truncated",
        "Truncated responses",
        "rollouts",
        "Share of the responses that were cut at rollout.max_new_tokens.",
        share=True,
        zero=True,
    ),
    Metric(
        "reward/mixed_groups",
        "Prompts with reward variance",
        "prompts",
        "Share of the prompts with correct and wrong rollouts. The others are zero-advantage groups.",
        share=True,
        zero=True,
    ),
    Metric(
        "policy/entropy",
        "Entropy",
        "nats per token",
        "Entropy of the policy's next-token distribution. Near 0 the policy no longer explores.",
        zero=True,
    ),
    Metric(
        "policy/reference_kl",
        "KL to the reference",
        "nats per token",
        "KL divergence of the policy from the model that it started as.",
        zero=True,
    ),
    Metric(
        "policy/kl_after_update",
        "KL of a step",
        "nats per token",
        "KL divergence between the policy before and after a step's updates (report.measure_update_kl).",
        zero=True,
    ),
    Metric(
        "policy/update_kl",
        "KL before the last update",
        "nats per token",
        "KL divergence between the policy that scored a step's rollouts and the one that its last update starts from.",
        zero=True,
    ),
    Metric(
        "policy/grad_norm",
        "Gradient norm",
        "norm before clipping",
        "Gradients above optimizer.max_grad_norm are scaled down to it.",
        zero=True,
    ),
    Metric(
        "policy/clip_fraction",
        "Clipped tokens",
        "tokens",
        "Share of the tokens whose ratio was clipped. 0 where each batch is used for one policy update.",
        share=True,
        zero=True,
    ),
    Metric(
        "policy/mult_prob_error",
        "Train-inference mismatch",
        "mean ratio of probabilities",
        "Probability of a token in the engine over that in the trainer, or its inverse; 1 is no mismatch. Beyond "
        "report.mult_prob_error_alarm check the weights that the engine has.",
    ),
    Metric(
        "policy/loss", "Policy loss", "loss", "The loss that is minimised. It need not fall: only its gradient matters."
    ),
)
CONTRASTIVE = (
    Metric(
        "clipo/loss",
        "Contrastive loss",
        "nats",
        "Mean over the anchors. It falls as correct rollouts of a prompt move together, away from wrong ones. A head "
        "that separates nothing has ln(others of the prompt) with infonce and supcon, and ln(others / correct others) "
        "with soft_nn, at clipo.level = group.",
        zero=True,
    ),
    Metric(
        "clipo/bonus_mean",
        "Bonus",
        "reward",
        "Mean bonus of correct rollouts with a valid anchor; a negative one penalises lying apart. 0 in the warm-up.",
        zero=True,
    ),
    Metric(
        "clipo/bonus_spread",
        "Spread of the bonus",
        "standard deviation",
        "Among the correct rollouts of a prompt, mean over prompts. Under GRPO only the spread changes advantages.",
        zero=True,
    ),
    Metric(
        "clipo/bonus_at_floor",
        "Bonus at its floor",
        "correct rollouts",
        "Share of the bonuses at clipo.floor, where the bonus no longer distinguishes correct rollouts.",
        share=True,
        zero=True,
    ),
    Metric(
        "clipo/groups_with_valid_anchor",
        "Prompts with an anchor",
        "prompts",
        "Share of the prompts with two correct rollouts and a wrong one, which the contrastive loss needs.",
        share=True,
        zero=True,
    ),
)
# Shown under "All other metrics"
OTHERS = (
    Metric(
        "reward/ungraded",
        "Rollouts without a verdict",
        "ended rollouts",
        "Share of the ended rollouts that could not be graded. They count in no mean and train nothing.",
        share=True,
        zero=True,
    ),
    Metric(
        "rollout/windows",
        "Unfinished windows",
        "rollouts",
        "Share of a step's rollouts that stopped at rollout.window_tokens and continue in the next step.",
        share=True,
        zero=True,
    ),
    Metric(
        "rollout/stale",
        "Stale rollouts",
        "rollouts",
        "Share of the rollouts with a token from older weights than their step began with.",
        share=True,
        zero=True,
    ),
)
POSITIVE, NEGATIVE = "clipo/positive_cosine", "clipo/negative_cosine"
PADDING = "speed/padding_share"
PLACED = {each.name for each in (*LEARNING, *CONTRASTIVE)}
PLACED |= {POSITIVE, NEGATIVE, PADDING, TOKENS_PER_S, STEP_TIME, AGE_MEAN}


def other(name: str) -> Metric:
    """How to show a metric that no section names; of a plug-in's metric only the name is known."""
    for each in OTHERS:
        if each.name == name:
            return each
    unit = {"time": "s", "speed": "tokens / s / rank"}.get(name.partition("/")[0], name.rpartition("/")[2])
    return Metric(name, name, unit.replace("_", " "), "")
