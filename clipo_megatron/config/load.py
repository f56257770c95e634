"""Reads a configuration file and its overrides, checks every key and value, and builds a RunConfig, without torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from clipo_megatron.config import naming, reference, renamed
from clipo_megatron.config.errors import ConfigError, ConfigProblem, spell
from clipo_megatron.config.model_folder import read_object
from clipo_megatron.config.ranges import range_problems
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.config.yaml_text import DEEPEST, calls_resolver, literal, reason_of, sections_of, texts_of, value_of

# Names that other projects have for settings of ours: suggested when such a name is given.
_OTHER_NAMES = {
    "lr": "optimizer.learning_rate",
    "clip_grad": "optimizer.max_grad_norm",
    "lambda": "clipo.weight",
    "tau": "clipo.temperature",
    "n": "rollout.samples_per_prompt",
    "num_generations": "rollout.samples_per_prompt",
    "max_tokens": "rollout.max_new_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "train_batch_size": "data.prompts_per_step",
    "ppo_epochs": "algorithm.epochs",
    "kl_loss_coef": "algorithm.kl.coefficient",
    "tensor_model_parallel_size": "layout.tp",
    "pipeline_model_parallel_size": "layout.pp",
    "max_steps": "train.steps",
    "output_dir": "train.output",
}


def load(path: str | Path, overrides: Sequence[str] = (), *, resolved: bool = False) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides in order, and return the typed configuration.

    Values of overrides are YAML: `layout.tp=2`, `data.train=[{path: train.parquet}]`, `data.train[0].size=100`,
    `model.system_prompt=''`. Mappings merge into what is there; anything else replaces it. `${train.seed}` refers to
    another setting. Relative paths of models, data and output are relative to the current directory. Old names of
    settings are read, and the new ones are said on stderr. A run without a name is named after the file.

    Args:
        path: the file.
        overrides: as they are given on the command line.
        resolved: whether it is the config.json that a run has written, of which no text refers to another setting.

    Raises:
        ConfigError: the file cannot be read or parsed, a key or a type is wrong (all of these are listed at once), or
            numbers are out of their range (likewise).
    """
    path = Path(path)
    content = literal(read_object(path)) if resolved else sections_of(path)
    problems = renamed.given_twice(renamed.keys_of(content))
    problems += renamed.given_twice(override.partition("=")[0].strip() for override in overrides)
    old_names = renamed.rename(content)
    for override in overrides:
        problems += _apply(content, override)
        old_names |= renamed.rename(content)
    if resolvers := list(_resolvers(content)):
        raise ConfigError([*problems, *resolvers], origin=str(path))
    named_after_file = naming.name_after(path, content)
    try:
        merged = _merged(content)
    except (OmegaConfBaseException, TypeError):  # TypeError: a list in place of a section
        merged = None
    problems += _inspect(RunConfig, content, "", typed=merged is not None)
    problems += _missing(content)
    if problems:
        raise ConfigError(problems, origin=str(path))
    config = _convert(merged or _merged(content), origin=str(path))
    if problems := list(range_problems(config)):
        raise ConfigError(problems, origin=str(path))
    renamed.announce(old_names)
    return naming.at_its_former_place(config, path) if named_after_file else config


def _resolvers(content: dict[str, Any]) -> Iterator[ConfigProblem]:
    """What refers to the environment, or calls another function: config.json, logs and reports would show its value."""
    for key, text in texts_of(content):
        if calls_resolver(text):
            reason = "only other settings can be referred to; a value of the environment would be kept in config.json"
            remedy = f"Write the value, or let the shell put it into the command: `{key}=$NAME`"
            yield ConfigProblem(key, reason, remedy, text)


def nearest_keys(key: str) -> list[str]:
    """Up to three settings that an unknown key may stand for, the likeliest first.

    A known name in another section comes before a similar name: `model.tp` -> `layout.tp`.
    """
    plain = re.sub(r"\[\d+\]", "[]", key)
    leaf, known = _leaf(plain), reference.keys()

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, plain, other).ratio()

    if same_leaf := sorted((other for other in known if _leaf(other) == leaf), key=likeness, reverse=True):
        return same_leaf[:1] if likeness(same_leaf[0]) > 0.85 else same_leaf[:3]
    if leaf in _OTHER_NAMES:
        return [_OTHER_NAMES[leaf]]
    if close := difflib.get_close_matches(plain, known, n=1, cutoff=0.85):
        return close
    if near_leaf := difflib.get_close_matches(leaf, {_leaf(other) for other in known}, n=1, cutoff=0.8):
        return [other for other in known if _leaf(other) == near_leaf[0]][:3]
    return difflib.get_close_matches(plain, known, n=1, cutoff=0.6)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _apply(content: dict[str, Any], override: str) -> list[ConfigProblem]:
    """Write one `key=value` into the content of the file. Returns the problem if that is not possible."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return [
            ConfigProblem(
                "", f"the override {override!r} is no `key=value`", "Write it like `layout.tp=2`", show_value=False
            )
        ]
    try:
        value = value_of(text)
    except ValueError as error:
        return [ConfigProblem(key, f"not valid YAML: {error}", "Check its quotes and brackets", text)]
    parts = [part for part in re.split(r"[.\[\]]+", key) if part]
    if not parts or len(parts) > DEEPEST:
        return [ConfigProblem(key, "this is no key of a setting", "Write it like `layout.tp=2`", show_value=False)]
    place: Any = content
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                held = f"it has {len(place)} entries, the first is [0]"
                return [ConfigProblem(key, f"{part!r} is no entry of the list: {held}", "Name one of them", value)]
            part = int(part)
        elif not isinstance(place, dict):
            above = _dotted(parts[:depth])
            return [
                ConfigProblem(
                    key, f"{above} is {spell(place)}, which has no settings below it", "Shorten the key", value
                )
            ]
        here = place[part] if isinstance(place, list) else place.get(part)
        if last:
            place[part] = _merge(here, value)
        else:
            if here is None:
                place[part] = here = {}
            place = here
    return []


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}
    return above


def _dotted(parts: Sequence[str]) -> str:
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(parts))


def _inspect(section: type, content: dict[Any, Any], prefix: str, *, typed: bool) -> Iterator[ConfigProblem]:
    """Yield a problem for each key of a section's content whose name or type is not that of the schema; `typed` says
    that OmegaConf takes the whole content, so that it need not be asked about each value."""
    hints = reference.hints(section)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in hints:
            yield _unknown(key, value)
            continue
        annotation = hints[name]
        if is_dataclass(annotation):
            if isinstance(value, dict):
                yield from _inspect(annotation, value, f"{key}.", typed=typed)
            else:
                remedy = f"Write its settings below it, or `{key}.<setting>=value`"
                yield ConfigProblem(key, "a section of settings was expected", remedy, value)
        elif inner := reference.list_section(annotation):
            yield from _inspect_list(inner, value, key, typed=typed)
        else:
            yield from _inspect_leaf(section, name, value, key, typed=typed)


def option_problems(section: type, given: dict[str, Any], prefix: str, *, owner: str) -> Iterator[ConfigProblem]:
    """What is wrong with the names and types of options that were `given` for the dataclass `section` of `owner`."""
    known = reference.hints(section)
    for name, value in given.items():
        if name in known:
            yield from _inspect_leaf(section, name, value, f"{prefix}{name}")
        else:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
            remedy = f"Did you mean {close[0]}?" if close else f"It has {', '.join(known) or 'no options'}"
            yield ConfigProblem(f"{prefix}{name}", f"{owner} has no such option", remedy, value)


def typed_options(section: type, given: dict[str, Any]) -> Any:
    """The dataclass of options `section`, with what was given in the types of its fields, and defaults elsewhere."""
    return OmegaConf.to_object(OmegaConf.merge(_defaults(section), given))


@cache
def _defaults(section: type) -> DictConfig:
    """A section as OmegaConf sees it, built once: that is slow, and `OmegaConf.merge` copies it."""
    return OmegaConf.structured(section)


def _merged(content: dict[str, Any]) -> DictConfig:
    """The defaults of a run, overlaid with the content; whatever OmegaConf raises where it refuses a part of that."""
    return OmegaConf.merge(_defaults(RunConfig), content)


def _inspect_list(inner: type, value: Any, key: str, *, typed: bool) -> Iterator[ConfigProblem]:
    example = f"{{{next(iter(reference.hints(inner)))}: ...}}"
    if not isinstance(value, list):
        yield ConfigProblem(key, "a list was expected", f"Write `{key}: [{example}]`, one entry each", value)
        return
    for index, entry in enumerate(value):
        if isinstance(entry, dict):
            yield from _inspect(inner, entry, f"{key}[{index}].", typed=typed)
        else:
            yield ConfigProblem(
                f"{key}[{index}]", "a section of settings was expected", f"Write it as `{example}`", entry
            )


def _inspect_leaf(section: type, name: str, value: Any, key: str, *, typed: bool = False) -> Iterator[ConfigProblem]:
    annotation = reference.hints(section)[name]
    if value == reference.MANDATORY:
        yield _must_be_given(key)
        return
    if (choices := reference.choices_by_name(annotation)) and isinstance(value, dict):
        for entry, choice in value.items():
            if choice not in tuple(choices):
                expected = reference.describe(choices)
                yield ConfigProblem(
                    f"{key}.{entry}", f"{expected} was expected", _type_remedy(expected, choice) or "Correct it", choice
                )
        return
    expected = reference.describe(annotation)
    inner, optional = reference.unwrap_optional(annotation)
    bad = isinstance(value, dict) != expected.startswith("a mapping")
    bad |= isinstance(value, list) != expected.startswith("a list")
    bad &= not (value is None and optional)
    # Lists of sections are inspected elsewhere, so what a list holds here has no parts.
    bad |= isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value)
    # OmegaConf would turn `name: no` (false in YAML) into the text "False", and any number into true or false.
    bad |= (inner is str and isinstance(value, bool)) or (
        inner is bool and isinstance(value, (int, float)) and not isinstance(value, bool)
    )
    if not bad and not typed:
        try:
            OmegaConf.merge(_defaults(section), {name: value})
        except ValidationError:
            bad = True
        except OmegaConfBaseException as error:  # a malformed ${...}
            yield ConfigProblem(key, reason_of(error), "Write a reference as ${section.setting}", value)
    if bad:
        default = getattr(section, name, reference.MANDATORY)  # a dataclass has plain defaults as class attributes
        fallback = "Correct it" if default == reference.MANDATORY else f"Correct it; the default is {spell(default)}"
        yield ConfigProblem(key, f"{expected} was expected", _type_remedy(expected, value) or fallback, value)


def _type_remedy(expected: str, value: Any) -> str:
    if expected.startswith("one of ") and isinstance(value, str):
        choices = expected.removeprefix("one of ").removesuffix(", or null").split(", ")
        if close := difflib.get_close_matches(value, choices, n=1, cutoff=0.5):
            return f"Did you mean {close[0]}?"
        return f"Choose {'one of them' if len(choices) > 1 else choices[0]}"
    if expected.startswith("a list") and not isinstance(value, (list, dict)):
        return f"Write [{value}]"
    if expected.startswith("text") and isinstance(value, bool):
        return "Put it in quotes"
    if isinstance(value, float) and "whole number" in expected and value.is_integer():
        return f"Write {int(value)}"
    return ""


def _unknown(key: str, value: Any) -> ConfigProblem:
    candidates = nearest_keys(key)
    remedy = f"Did you mean {' or '.join(candidates)}?" if candidates else "`clipo settings` lists them all"
    return ConfigProblem(key, "there is no such setting", remedy, value, show_value=not isinstance(value, (dict, list)))


def _missing(content: dict[str, Any]) -> Iterator[ConfigProblem]:
    for setting in reference.settings():
        if setting.default == reference.MANDATORY and "[]" not in setting.key:
            place: Any = content
            for part in setting.key.split("."):
                place = place.get(part, reference.MANDATORY) if isinstance(place, dict) else None
                if place is reference.MANDATORY:
                    yield _must_be_given(setting.key)
                    break


def _must_be_given(key: str) -> ConfigProblem:
    return ConfigProblem(
        key, "it must be given", f"Set it in the file, or add `{key}=...` to the command", show_value=False
    )


def _convert(merged: DictConfig, *, origin: str) -> RunConfig:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        value = OmegaConf.to_container(merged, resolve=False)
        for part in re.findall(r"[^.\[\]]+", key):
            value = value[int(part)] if isinstance(value, list) else value[part]
        remedy = "Refer to another setting as ${section.setting}"
        raise ConfigError([ConfigProblem(key, reason_of(error), remedy, value)], origin=origin) from None
    return config
