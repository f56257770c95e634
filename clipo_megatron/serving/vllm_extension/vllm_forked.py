"""Starts vLLM on a machine without a GPU, with its engine as a fork of the first process.

On a CPU vLLM spawns its engine, which then imports everything again. Without CUDA it is forked, so it has what the
first process imported.
"""

from __future__ import annotations

import multiprocessing
import runpy
from multiprocessing.context import BaseContext

_get_context = multiprocessing.get_context


def _forking(method: str | None = None) -> BaseContext:
    return _get_context("fork" if method == "spawn" else method)


if __name__ == "__main__":
    multiprocessing.get_context = _forking  # type: ignore[assignment]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
