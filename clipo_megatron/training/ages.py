"""How old the tokens of a step are, where rollouts are generated ahead of their step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from clipo_megatron.flow import ScoredGroup
from clipo_megatron.telemetry.metric_names import AGE_MAX, AGE_MEAN, SPANNING_GROUPS, age_share


def age_metrics(groups: Sequence[ScoredGroup], *, step: int, bound: int) -> dict[str, float]:
    """Metrics of the ages of all ranks' tokens; collective. The age of a token is the number of updates since its
    weights, and tokens of earlier windows do not count.

    off_policy/age_0, age_1, ...    share of the tokens that are so many updates old, up to the bound or the oldest
    off_policy/age_mean             updates, mean over tokens
    off_policy/age_max              of the oldest token
    off_policy/spanning_groups      share of groups with tokens of several versions

    Args:
        groups: those of this rank; may be empty.
        step: which trains them.
        bound: `rollout.ahead`, the age that none should pass.
    """
    counts: list[int] = [0] * (bound + 1)
    spanning = 0
    for scored in groups:
        versions = torch.cat([rollout.versions[rollout.trained :] for rollout in scored.group.rollouts])
        spanning += int(versions.unique().numel() > 1)
        for age, tokens in enumerate(torch.bincount(step - versions).tolist()):
            counts += [0] * (age + 1 - len(counts))
            counts[age] += tokens
    mine = (counts, spanning, len(groups))
    everybody = [mine] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    oldest = max(len(each) for each, _, _ in everybody)
    totals = [sum(each[age] for each, _, _ in everybody if age < len(each)) for age in range(oldest)]
    tokens = max(sum(totals), 1)
    return {
        **{age_share(age): count / tokens for age, count in enumerate(totals)},
        AGE_MEAN: sum(age * count for age, count in enumerate(totals)) / tokens,
        AGE_MAX: float(max((age for age, count in enumerate(totals) if count), default=0)),
        SPANNING_GROUPS: sum(each for _, each, _ in everybody) / max(sum(each for _, _, each in everybody), 1),
    }
