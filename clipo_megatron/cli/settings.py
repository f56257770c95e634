"""`clipo settings`: every setting of a configuration, as the schema declares it."""

from __future__ import annotations

import argparse

from clipo_megatron.config.errors import ConfigError, spell
from clipo_megatron.config.load import nearest_keys
from clipo_megatron.config.reference import MANDATORY, Setting, settings

DESCRIPTION = "Every setting, with its type, range, default and meaning."
EXAMPLES = """\
examples:
  clipo settings                 all of them
  clipo settings rollout         one section
  clipo settings data reward algorithm.kl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="show only these sections or settings")


def run(options: argparse.Namespace) -> int:
    chosen = [setting for name in options.names or [""] for setting in _chosen(name)]
    width = max(len(setting.key) for setting in chosen)
    section = chosen[0].section
    for setting in chosen:
        if setting.section != section:
            print()
        section = setting.section
        default = "must be given" if setting.default == MANDATORY else f"default {spell(setting.default)}"
        print(f"{setting.key:<{width}}  {setting.type}; {default}")
        notes = [setting.comment, *(f"{value}: {meaning}" for value, meaning in setting.choices.items())]
        for note in filter(None, notes):
            print(f"{'':<{width}}  # {note}")
    return 0


def _chosen(section: str) -> list[Setting]:
    """The settings of a section, or the one of this name; all for "".

    Raises:
        ConfigError: there is no such section or setting.
    """
    if not section:
        return list(settings())
    inside = (f"{section}.", f"{section}[]")
    if chosen := [each for each in settings() if each.key == section or each.key.startswith(inside)]:
        return chosen
    near = nearest_keys(section)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`clipo settings` lists them all."
    raise ConfigError(f"there are no settings {section!r}. {hint}")
