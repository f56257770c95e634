"""What each metric is called on the page, in which unit, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One curve."""

    name: str  # in metrics.jsonl
    title: str
    axis: str  # with the unit
    caption: str
    share: bool = False
    zero: bool = False


LEARNING = (
    Metric(
        "reward/accuracy",
        "Accuracy on training problems",
        "right rollouts",
        "Share of a step's graded rollouts that the verifier calls right, sampled at the training temperature.",
        share=True,
        zero=True,
    ),
    Metric(
        "reward/mean",
        "Reward",
        "mean reward",
        "Mean over the step's rollouts of what advantages are made from: the verifier's reward and the bonus of CLIPO.",
    ),
    Metric(
        "rollout/response_length",
        "Response length",
        "tokens",
        "Mean tokens of a response. A fall with rising accuracy is often a habit unlearned, a rise more thought.",
        zero=True,
    ),
    Metric(
        "rollout/truncated",
        "Cut at the length limit",
        "rollouts",
        "Share of the responses that reached rollout.max_new_tokens before they ended.",
        share=True,
        zero=True,
    ),
    Metric(
        "reward/mixed_groups",
        "Prompts that teach",
        "prompts",
        "Share of the prompts whose rollouts are neither all right nor all wrong: only these have an advantage.",
        share=True,
        zero=True,
    ),
    Metric(
        "policy/entropy",
        "Entropy",
        "nats a token",
        "Of the policy's next-token distribution. A fall towards 0 is exploration lost.",
        zero=True,
    ),
    Metric(
        "policy/reference_kl",
        "KL to the reference",
        "nats a token",
        "How far the policy has gone from the model that it started as.",
        zero=True,
    ),
    Metric("policy/update_kl", "KL of an update", "nats a token", "Of the policy before to after a step.", zero=True),
    Metric(
        "policy/grad_norm",
        "Gradient norm",
        "norm before clipping",
        "Peaks above optimizer.max_grad_norm were scaled down to it.",
        zero=True,
    ),
    Metric(
        "policy/clip_fraction",
        "Clipped tokens",
        "tokens",
        "Share of the tokens whose ratio was clipped. 0 where each batch is learnt from once.",
        share=True,
        zero=True,
    ),
    Metric(
        "policy/mult_prob_error",
        "Agreement of engine and trainer",
        "mean ratio of probabilities",
        "1 where both give a token the same probability; beyond report.mult_prob_error_alarm look at the weights.",
    ),
    Metric("policy/loss", "Policy loss", "loss", "What is minimised. It need not fall: its gradient is what counts."),
)
CONTRASTIVE = (
    Metric(
        "clipo/loss",
        "Contrastive loss",
        "nats",
        "Mean over the anchors. Falling: right rollouts of a prompt lie together, apart from wrong ones. A head that "
        "tells nothing apart has ln(others of the prompt) with infonce and supcon, and ln(others / right others) with "
        "soft_nn, at clipo.level = group.",
        zero=True,
    ),
    Metric(
        "clipo/bonus_mean",
        "Bonus",
        "reward",
        "Mean bonus of right rollouts with a valid anchor; negative: a malus for lying apart. 0 in the warm-up.",
        zero=True,
    ),
    Metric(
        "clipo/bonus_spread",
        "Spread of the bonus",
        "standard deviation",
        "Among the right rollouts of a prompt, mean over prompts. Under GRPO it is this, not the mean, that acts.",
        zero=True,
    ),
    Metric(
        "clipo/bonus_at_floor",
        "Bonus at its floor",
        "right rollouts",
        "Share of the bonuses at clipo.floor. There the bonus tells right rollouts no longer apart.",
        share=True,
        zero=True,
    ),
    Metric(
        "clipo/groups_with_valid_anchor",
        "Prompts with an anchor",
        "prompts",
        "Share of the prompts with two right rollouts and a wrong one, which the contrastive loss needs.",
        share=True,
        zero=True,
    ),
)
# Among all other metrics.
OTHERS = (
    Metric(
        "reward/ungraded",
        "Rollouts without a verdict",
        "ended rollouts",
        "Share of the ended rollouts that could not be graded. They are in no mean and teach nothing.",
        share=True,
        zero=True,
    ),
    Metric(
        "rollout/windows",
        "Windows that go on",
        "rollouts",
        "Share of a step's rollouts that stopped at rollout.window_tokens, and that the next step goes on with.",
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
PADDING, TOKENS, STEP_TIME = "speed/padding_share", "speed/tokens_per_s_per_rank", "time/step_s"
PLACED = {each.name for each in (*LEARNING, *CONTRASTIVE)} | {POSITIVE, NEGATIVE, PADDING, TOKENS, STEP_TIME}


def other(name: str) -> Metric:
    """A metric without a place of its own; of a plug-in's nothing is known but its name."""
    for each in OTHERS:
        if each.name == name:
            return each
    unit = {"time": "s", "speed": "tokens / s / rank"}.get(name.partition("/")[0], name.rpartition("/")[2])
    return Metric(name, name, unit.replace("_", " "), "")
