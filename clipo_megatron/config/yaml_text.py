"""Reads YAML, of configuration files and of overrides; what is wrong with it is said in one sentence with its place."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipo_megatron.config.errors import ConfigError, shortened

_TOO_DEEP = "lists and mappings are nested too deeply"
_MOST_BYTES = 1 << 20  # of a file; hundreds of settings take some thousand, and YAML is parsed at 100 kB a second
_BRACES = re.compile(r"\\\\|\\\$\{|\$\{|[{}:]")  # \${ is no reference
_REFERENCE = re.compile(r"(\\*)\$\{")
DEEPEST = 20  # lists and mappings in each other; the settings of a generator's options are the deepest
# OmegaConf and YAML raise ValueError for numbers and dates that cannot be, and RecursionError for deep nesting.
_YAML_ERRORS = (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError)


def sections_of(path: Path) -> dict[str, Any]:
    """The content of a configuration file, references to other settings as they are written.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or is no mapping.
    """
    text = _text_of(path)
    try:
        content = OmegaConf.load(io.StringIO(text))
        plain = OmegaConf.to_container(content, resolve=False)
    except OSError:  # what OmegaConf raises for a bare text or number
        raise ConfigError(f"{path} holds no settings but a bare value. Write `section:` with its keys below.") from None
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not valid YAML: {reason_of(error)}. Check indentation, quotes and brackets there."
        ) from None
    if _is_deeper(plain, DEEPEST):
        raise ConfigError(f"{path}: {_TOO_DEEP}. Give the file with the settings of a run.")
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds a list. Write a mapping of sections, such as `model:` with `path:` below it.")
    return plain


def value_of(text: str) -> Any:
    """The value that the text of an override stands for.

    Raises:
        ValueError: it is no YAML; the message is the reason.
    """
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except _YAML_ERRORS as error:
        raise ValueError(reason_of(error)) from None
    if _is_deeper(value, DEEPEST):
        raise ValueError(_TOO_DEEP)
    return value


def texts_of(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text among the values of what a file holds, with its dotted key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from texts_of(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from texts_of(value, f"{key}[{index}]")
    elif isinstance(tree, str):
        yield key, tree


def literal(tree: Any) -> Any:
    """The same tree, with texts in which nothing refers to another setting: what a file holds of resolved settings."""
    if isinstance(tree, dict):
        return {name: literal(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return _REFERENCE.sub(r"\1\1\\${", tree) if isinstance(tree, str) else tree


def calls_resolver(text: str) -> bool:
    """Whether a text refers to more than another setting, as ${oc.env:NAME} does: a colon stands inside of ${ }."""
    inside: list[str] = []  # the braces that are open
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            del inside[-1:]
        elif token[0].endswith("{"):
            inside.append(token[0])
        elif token[0] == ":" and inside[-1:] == ["${"]:
            return True
    return False


def reason_of(error: Exception) -> str:
    """Why YAML or OmegaConf refuses something, in a clause without a full stop."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "it holds a number of thousands of digits"
    lines = str(getattr(error, "problem", None) or error).strip().splitlines()
    return shortened(lines[0].rstrip(".") if lines else type(error).__name__, 200)


def _is_deeper(tree: Any, most: int) -> bool:
    if not isinstance(tree, dict | list):
        return False
    return most == 0 or any(_is_deeper(each, most - 1) for each in (tree.values() if isinstance(tree, dict) else tree))


def _text_of(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder. Give the path of a YAML file.")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is a device or a pipe, not a file. Give the path of a YAML file.")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"No configuration file {path} (current directory: {Path.cwd()}). Give the path of a YAML file."
        ) from None
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    except OSError as error:  # a name that is too long, links in a circle
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give the path of a YAML file.") from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_BYTES >> 20} MiB. Give the file with the settings of a run.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
