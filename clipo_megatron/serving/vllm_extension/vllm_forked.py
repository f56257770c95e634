"""Starts vLLM on a machine without a GPU, with its engine as a fork of the first process.

On a CPU vLLM spawns its engine, which then imports everything again. Without CUDA it is forked, so it has what the
first process imported. For the same reason it looks at the class of the model in this process: vLLM 0.32 starts an
interpreter for that (`_run_in_subprocess` of vllm/model_executor/models/registry.py), lest CUDA is initialised here.
"""

from __future__ import annotations

import multiprocessing
import runpy
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import TypeVar

_Result = TypeVar("_Result")

_get_context = multiprocessing.get_context


def _forking(method: str | None = None) -> BaseContext:
    return _get_context("fork" if method == "spawn" else method)


def _here(function: Callable[[], _Result]) -> _Result:
    return function()


if __name__ == "__main__":
    multiprocessing.get_context = _forking  # type: ignore[assignment]
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = _here
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
