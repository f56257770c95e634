"""What values the options of methods may have: the least and the largest, by method and option."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite
from typing import Any

from clipo_megatron.config.errors import Problem

LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "dapo": {"penalty": (0, inf), "longest": (1, inf), "cushion": (1, inf)},
    "riskpo": {"bundle": (1, inf), "alpha": (0.001, 0.999), "beta": (0.001, 0.999), "tail": (0, inf), "rate": (0, 1)},
    "ppo": {"lam": (0, 1), "critic_lam": (0, 1), "gamma": (0, 1)},
    "t_ppo": {"lam": (0, 1), "critic_lam": (0, 1), "gamma": (0, 1)},
    "disco": {"tau": (1e-6, inf), "beta": (0, inf), "delta": (0, inf)},
    "hapo": {"weight": (0, inf), "floor": (-1, 1)},
    "adora": {"weight": (0, inf), "emphasis": (0, inf)},
    "unlikeliness": {"beta": (0, 1)},
    "gcpo": {"threshold": (0, 1)},
    "c_grpo": {"alpha": (0, 1)},
    "grace": {"consistency": (0, inf), "hardest": (0, inf), "temperature": (1e-6, inf)},
    "papo": {"weight": (0, inf), "mask": (0, 1), "limit": (0, inf), "seed": (0, inf)},
    "copg": {"beta": (0, inf)},
    "conspo": {"tau": (1e-6, inf), "margin_steps": (0, inf)},
    "cepo": {"mix": (0, 1), "mix_steps": (0, inf), "clip": (0, inf)},
    "d3s": {"rollouts": (0, 1), "tokens": (0, 1), "relax_steps": (0, inf)},
    "pipo": {"window": (2, inf), "negative": (0, inf), "limit": (0, inf)},
    "hpt": {"gate": (0, inf), "sft_weight": (0, inf)},
}


def limit_problems(name: str, options: dict[str, Any], prefix: str) -> Iterator[Problem]:
    """What is out of range among a method's options, defaults included; types have been checked."""
    for option, (least, most) in LIMITS.get(name, {}).items():
        value = options[option]
        if value is not None and not (isfinite(value) and least <= value <= most):
            expected = f"at least {least:g}" if most == inf else f"from {least:g} to {most:g}"
            yield Problem(f"{prefix}{option}", f"it must be {expected}", "Change it", value)
    if name == "riskpo" and options["alpha"] >= options["beta"]:
        reason = f"it is the lower level, and beta is {options['beta']}"
        yield Problem(f"{prefix}alpha", reason, "Lower it; 0.2 and 0.9 are usual", options["alpha"])
