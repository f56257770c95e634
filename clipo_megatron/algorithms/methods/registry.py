"""The built-in methods by name, and the classes that a configuration names.

A method stands in one file of this folder: its class, its options and what it needs. To build one in, add the file and
a line here; everything else is read from the class.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from clipo_megatron.algorithms.hook import Hook, Signal
from clipo_megatron.algorithms.policy_loss import PolicyLoss
from clipo_megatron.algorithms.user_classes import import_object
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.schema import AlgorithmConfig, RunConfig

# algorithm.name: hooks that give advantages and the policy's loss. "module:Class" below this folder.
BASE_METHODS = {
    "grpo": "grpo:GRPO",
    "dr_grpo": "grpo:DrGRPO",
    "rloo": "reinforce:RLOO",
    "gspo": "gspo:GSPO",
    "ppo": "ppo:PPO",
    "t_ppo": "ppo:TPPO",
    "dapo": "dapo:DAPO",
    "gmpo": "gspo:GMPO",
    "reinforce_pp": "reinforce:ReinforcePP",
    "reinforce_pp_baseline": "reinforce:ReinforcePPBaseline",
    "cispo": "cispo:CISPO",
    "riskpo": "riskpo:RiskPO",
    "disco": "disco:DisCO",
    "hpt": "hpt:HPT",
    "copg": "copg:CoPG",
    "conspo": "conspo:ConSPO",
}

# algorithm.plugins: hooks added to a base method.
PLUGINS = {
    "cepo": "cepo:CEPO",
    "d3s": "d3s:D3S",
    "hapo": "hapo:HAPO",
    "adora": "adora:ADORA",
    "empo": "empo:EMPO",
    "unlikeliness": "unlikeliness:Unlikeliness",
    "gcpo": "gcpo:GCPO",
    "c_grpo": "c_grpo:CGRPO",
    "grace": "grace:GRACE",
    "pipo": "pipo:PIPO",
    "papo": "papo:PAPO",
    "shuffle_bonus": "shuffle_bonus:ShuffleBonus",
    "likelihood": "likelihood:Likelihood",
    "text_overlap": "text_overlap:TextOverlap",
}


def is_import_path(name: str) -> bool:
    """Whether a method's name is that of a user's own class: "file.py:Class" or "package.module:Class"."""
    return ":" in name


def base_method_class(name: str) -> type[PolicyLoss]:
    """The class of a base method, built in or a user's own.

    Raises:
        ConfigError: there is no such class, or it is no base method.
    """
    return _class(name, BASE_METHODS, PolicyLoss)


def plugin_class(name: str) -> type[Hook]:
    """The class of a plug-in, built in or a user's own.

    Raises:
        ConfigError: there is no such class, or it is no hook.
    """
    return _class(name, PLUGINS, Hook)


def _class(name: str, table: Mapping[str, str], base: type[Hook]) -> type:
    if not is_import_path(name):
        if name not in table:
            raise ConfigError(f"there is no method {name!r} among {', '.join(table)}. Correct the name.")
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(f"clipo_megatron.algorithms.methods.{module}"), attribute)
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{name} is no subclass of {base.__module__}.{base.__name__}. Name a class that is one.")
    return found


def base_method(algorithm: AlgorithmConfig) -> type[PolicyLoss]:
    """The class that algorithm.name says; GRPO's where there is no such class, which the checks report."""
    try:
        return base_method_class(algorithm.name)
    except ConfigError:
        return base_method_class("grpo")


def plugins(algorithm: AlgorithmConfig) -> list[type[Hook]]:
    """The classes of algorithm.plugins; `Hook` itself for one that cannot be found, which the checks report."""
    found: list[type[Hook]] = []
    for plugin in algorithm.plugins:
        try:
            found.append(plugin_class(plugin.name))
        except ConfigError:
            found.append(Hook)
    return found


def methods(algorithm: AlgorithmConfig) -> list[type[Hook]]:
    """The classes of the base method and the plug-ins."""
    return [base_method(algorithm), *plugins(algorithm)]


def has_critic(algorithm: AlgorithmConfig) -> bool:
    """Whether a value model is trained beside the policy."""
    return any(Signal.values in method.needs for method in methods(algorithm))


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether the policy that the run began with is kept and asked for log-probs."""
    return algorithm.kl.coefficient > 0 or any(Signal.reference_logprobs in each.needs for each in methods(algorithm))


def max_refill_rounds(config: RunConfig) -> int:
    """How often a step replaces zero-advantage groups: rollout.max_refill_rounds, or the base method's default."""
    chosen = config.rollout.max_refill_rounds
    return base_method(config.algorithm).default_max_refill_rounds if chosen is None else chosen
