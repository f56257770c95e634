"""Starts SGLang on a machine without a GPU, with its processes as forks of the first one.

SGLang spawns its scheduler and its detokenizer, as CUDA needs it, and each of them imports everything again, which
takes longer than all the rest of the start. Without CUDA they are forked, so they have what the first process imported.
"""

from __future__ import annotations

import multiprocessing
import runpy
from typing import Any

_set_start_method = multiprocessing.set_start_method


def _fork(_method: str | None, **_options: Any) -> None:
    _set_start_method("fork", force=True)


def main() -> None:
    multiprocessing.set_start_method = _fork  # type: ignore[assignment]
    import sglang.srt.entrypoints.http_server  # noqa: F401 - before the forks, which then need not import it

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
