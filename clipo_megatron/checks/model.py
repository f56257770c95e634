"""Checks of the folders of policy and critic: whether they are models, and fit the layout and the engine."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from clipo_megatron.checks.layout import division_problems
from clipo_megatron.config.errors import ConfigProblem, spell
from clipo_megatron.config.model_folder import (
    ModelFileError,
    foreign_links,
    hf_folder,
    hub_cache,
    is_checkpoint,
    read_object,
    vocabulary_problem,
)
from clipo_megatron.config.schema import EngineKind, RunConfig
from clipo_megatron.weights.config_fields import check_fields
from clipo_megatron.weights.errors import UnsupportedModel
from clipo_megatron.weights.families import FAMILIES, REFUSED_FAMILIES, model_spec

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = ("models", "model", "runs", "checkpoints", "data")  # first words of paths that are no owners on the hub
ARCHITECTURES = {family.architecture: family for family in FAMILIES.values()}


def model_problems(config: RunConfig, replicas: int, *, trains: bool = True) -> Iterator[ConfigProblem]:
    """Problems of the policy's folder, and if it `trains` of the critic's, in a layout of `replicas` replicas."""
    facts = yield from _policy(config)
    divided = [] if facts is None else list(division_problems(config.layout, facts, replicas))
    yield from divided
    if facts is not None:
        yield from _window(config, facts)
        yield from _positions(config, facts)
        yield from _replayed_routing(config, facts)
    if trains:
        yield from _critic(config, replicas, facts, divided)


def _policy(config: RunConfig) -> Generator[ConfigProblem, None, dict[str, Any] | None]:
    key, value = "model.path", config.model.path
    facts = yield from _folder(key, value, "Give the path of a Hugging Face model folder on this machine")
    if facts is None:
        return None
    if is_checkpoint(value) and config.rollout.engine is not EngineKind.local:
        reason = f"it is a checkpoint, and {config.rollout.engine.value} serves Hugging Face folders"
        yield ConfigProblem(key, reason, f"Run `clipo convert to-hf {value} OUT` and set model.path to OUT", value)
        return None
    return facts


def _folder(key: str, value: str, remedy: str) -> Generator[ConfigProblem, None, dict[str, Any] | None]:
    """Problems of a folder by itself. Returns the content of its config.json; None if other checks cannot use it."""
    weights = Path(value)
    if not weights.is_dir():
        yield _no_folder(key, value, remedy)
        return None
    file = hf_folder(weights) / "config.json"
    if is_checkpoint(weights) and not file.is_file():
        reason = "it is a checkpoint without hf/config.json, of a version that did not save it"
        yield ConfigProblem(
            key, reason, "Convert it (clipo convert to-hf CHECKPOINT OUT --hf MODEL) and give OUT", value
        )
        return None
    try:
        facts = read_object(file)
    except FileNotFoundError:
        reason = "the folder has no config.json"
        yield ConfigProblem(
            key, reason, "Give a Hugging Face model folder (config.json, *.safetensors, tokenizer)", value
        )
        return None
    except ModelFileError as error:
        yield ConfigProblem(key, str(error), "Fetch the model folder again", value)
        return None
    if foreign := next(foreign_links(file.parent), None):
        reason = f"{foreign.name} is a link to {os.readlink(foreign)}, outside the folder, and would be copied with it"
        yield ConfigProblem(key, reason, "Replace the link by its file, if it belongs to the model", value)
        return None
    try:
        check_fields({name: facts[name] for name in ("architectures", "model_type") if name in facts})
    except UnsupportedModel as error:
        yield ConfigProblem(key, str(error), "Correct its config.json, or fetch the model folder again", value)
        return None
    architecture = (facts.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        reason = f"its architecture is {architecture}"
        if refused := REFUSED_FAMILIES.get(str(facts.get("model_type"))):
            reason += f"; {refused}"
        yield ConfigProblem(key, reason, f"Supported are {', '.join(ARCHITECTURES)}", value)
        return None
    try:
        model_spec(facts)
    except UnsupportedModel as error:
        yield ConfigProblem(key, str(error), "Choose another model, or correct its config.json", value)
        return None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        reason = f"{file.name} cannot be understood ({type(error).__name__}: {error})"
        yield ConfigProblem(key, reason, "Fetch the model folder again", value)
        return None
    if not is_checkpoint(weights) and not any(weights.glob("*.safetensors")):
        yield ConfigProblem(key, "the folder has no *.safetensors", "Fetch the weights as safetensors", value)
    return facts


def _no_folder(key: str, value: str, remedy: str) -> ConfigProblem:
    """The problem of a folder that is not there; for the name of a model on the hub, with the way to get it."""
    path, here = Path(value), Path.cwd()
    reason = "there is no such folder" + ("" if path.is_absolute() else f" below {here}")
    # A job's paths are made absolute before they are checked.
    name = str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else value
    if _HUB_NAME.fullmatch(name) and not path.parent.exists() and name.partition("/")[0] not in _FOLDERS:
        snapshots = hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
        found = sorted(snapshots.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        if found:
            remedy = f"It was downloaded before: set {key}={found[-1].parent}"
        else:
            folder = f"models/{path.name}"
            remedy = f"To fetch it: `hf download {name} --local-dir {folder}`; then set {key}={folder}"
        reason = f"{reason}, and nothing is downloaded by itself"
    return ConfigProblem(key, reason, remedy, value, absent=True)


def _window(config: RunConfig, facts: dict[str, Any]) -> Iterator[ConfigProblem]:
    """SGLang ignores the sliding window of these models, which matters once sequences are longer than it."""
    architecture = facts["architectures"][0]
    family = ARCHITECTURES[architecture]
    window = {**family.defaults, **facts}.get("sliding_window")
    if window is None or not family.sglang_ignores_window or config.rollout.engine is not EngineKind.sglang:
        return
    longest = config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    if longest > window:
        reason = f"SGLang's {architecture} attends to the whole sequence, but the model's sliding_window is {window}"
        remedy = f"Set rollout.engine to vllm, or keep sequences within {window} tokens (they can reach {longest})"
        yield ConfigProblem("rollout.engine", reason, remedy, config.rollout.engine)


def _positions(config: RunConfig, facts: dict[str, Any]) -> Iterator[ConfigProblem]:
    """Whether the longest possible sequence has more tokens than the model has positions."""
    longest, limit = config.data.max_prompt_tokens, facts.get("max_position_embeddings")
    for setting, new_tokens in (
        ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        ("eval.max_new_tokens", config.eval.max_new_tokens),
    ):
        if limit and new_tokens is not None and longest + new_tokens > limit:
            reason = f"with data.max_prompt_tokens = {longest} a sequence can reach {longest + new_tokens} tokens"
            room = limit - longest
            remedy = f"Set it to {room} or less" if room > 0 else "Lower data.max_prompt_tokens first"
            yield ConfigProblem(setting, f"{reason}, and the model takes {limit}", remedy, new_tokens)


def _replayed_routing(config: RunConfig, facts: dict[str, Any]) -> Iterator[ConfigProblem]:
    """Whether the engine can say which experts it chose, and Megatron computes the layers that can take them."""
    if not config.model.replay_routing:
        return
    key, off = "model.replay_routing", "set this to false"
    if config.rollout.engine is not EngineKind.sglang:
        reason = f"rollout.engine = {config.rollout.engine.value} does not say which experts it chose"
        yield ConfigProblem(key, reason, "Set rollout.engine to sglang, or this to false", True)
    if model_spec(facts).experts is None:
        yield ConfigProblem(key, f"{config.model.path} has no experts", "Set it to false", True)
    for name in ("moe_router_fusion", "overlap_moe_expert_parallel_comm", "cuda_graph_impl", "enable_cuda_graph"):
        if config.megatron.get(name) not in (None, False, "none"):
            reason = "with it Megatron routes tokens where model.replay_routing cannot choose their experts"
            yield ConfigProblem(f"megatron.{name}", reason, f"Remove it, or {off}", config.megatron[name])
    if "moe" in (config.megatron.get("recompute_modules") or ()):
        reason = "experts that are computed again by themselves would get the routes of another micro-batch"
        yield ConfigProblem(
            "megatron.recompute_modules", reason, f"Take moe out, set model.recompute=true, or {off}", ["moe"]
        )


def _critic(
    config: RunConfig, replicas: int, policy: dict[str, Any] | None, known: list[ConfigProblem]
) -> Iterator[ConfigProblem]:
    """Whether the critic can read the policy's tokens and be divided as the policy is.

    `known` are the problems of the policy's division, which are not repeated.
    """
    key, value = "critic.path", config.critic.path
    if value is None:
        return
    folder = "Give the path of a Hugging Face model folder, or null to start from the policy's weights"
    facts = yield from _folder(key, value, folder)
    if facts is None:
        return
    for problem in division_problems(config.layout, facts, replicas):
        if problem not in known:
            reason = f"it is laid out as the policy is, and with {problem.key} = {spell(problem.value)}"
            yield ConfigProblem(key, f"{reason} {problem.reason}", f"Choose another, or: {problem.remedy}", value)
    longest, limit = config.data.max_prompt_tokens + config.rollout.max_new_tokens, facts.get("max_position_embeddings")
    if limit and longest > limit:
        reason = f"it takes {limit} tokens, and a sequence can reach {longest} (prompt and rollout.max_new_tokens)"
        yield ConfigProblem(key, reason, "Choose another, or lower rollout.max_new_tokens", value)
    if policy is not None and (problem := vocabulary_problem(value, config.model.path)):
        yield problem
