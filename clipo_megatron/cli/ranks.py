"""Ranks for the commands that compute on several: this process as one of them, or all of them as its children."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.runtime.stop_requests import REQUESTS
from clipo_megatron.runtime.warning_filters import quiet_libraries

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig
    from clipo_megatron.runtime.launcher_env import Launch


def on_ranks(
    options: argparse.Namespace,
    config: RunConfig,
    place: Launch | None,
    work: Callable[[], None],
    words: Sequence[str],
    *,
    restarts: int,
) -> int:
    """Run `work` as the rank that a launcher started, or start all ranks of the layout on this machine.

    Args:
        options: the parsed command line; `options.is_reported_by_another` is false from the moment at which this
            process goes its own way as a rank.
        config: the run; its layout says how many ranks there are without a launcher.
        place: the rank that the launcher gave this process; None without a launcher.
        work: what a rank does.
        words: the command line of each rank that is started, without `clipo`.
        restarts: how often ranks are started again, in a row without a new checkpoint, after one has failed.

    Returns:
        The exit code.
    """
    from clipo_megatron.runtime import launcher_env
    from clipo_megatron.runtime.ports import is_loopback

    if place is None and (ranks := config.layout.requested_ranks) > 1:
        return _start_here(words, config, ranks, restarts=restarts)
    options.is_reported_by_another = False
    with REQUESTS.handled(tolerated=1):
        launcher_env.export_environment(
            place or launcher_env.Launch(rank=0, world=1, local_rank=0),
            servers_elsewhere=not is_loopback(config.rollout.sync.host),
        )
        quiet_libraries()
        work()
    return 0


def _start_here(words: Sequence[str], config: RunConfig, ranks: int, *, restarts: int) -> int:
    from clipo_megatron.runtime import launch
    from clipo_megatron.runtime.run_dir import LOGS, newest_checkpoint, was_set_aside

    output = Path(config.train.output)
    arguments = [sys.executable, "-m", "clipo_megatron.cli", *words]
    earlier = was_set_aside(output)
    # A step may take as long as its rollouts and one collective do.
    patience = config.rollout.deadline_s + config.layout.distributed_timeout_s

    def start(attempt: int) -> int:
        # A run that started over in the first attempt is resumed by the later ones.
        resume = ["checkpoint.resume=true"] if attempt and earlier != was_set_aside(output) else []
        commands = launch.local_commands([*arguments, *resume], ranks, logs=output / LOGS)
        return launch.supervise(commands, stop_deadline_s=patience)

    return launch.supervise_again(start, restarts=restarts, progress=lambda: newest_checkpoint(output))
