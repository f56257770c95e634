"""The arguments that several commands have."""

from __future__ import annotations

import argparse


def add_config(
    parser: argparse.ArgumentParser,
    metavar: str = "CONFIG",
    *,
    what: str = "YAML file, the one that training gets",
    over: str = "the file",
) -> None:
    """Give a parser the configuration, `options.config`, and settings that win `over` it, `options.overrides`."""
    parser.add_argument("config", metavar=metavar, help=what)
    # argparse calls a list without a default required
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=f"settings that win over {over}")
