"""One rank of any layout in this process, without the others: for the names, shapes and places of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from torch.testing._internal.distributed.fake_pg import FakeStore

from clipo_megatron.config.schema import DType, LayoutConfig, ModelConfig
from clipo_megatron.policy import parallel
from clipo_megatron.policy.model.model import PolicyStage, build_stages, transformer_config
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.spec import ModelSpec


@contextmanager
def fake_process_group(config: LayoutConfig, *, rank: int, world: int, vpp: int = 1) -> Iterator[Layout]:
    """Within, this process has the layout of rank `rank` of `world`; collectives do nothing.

    Raises:
        ValueError: the layout does not divide the ranks, or this process has a process group already.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield parallel.initialize(config, seed=0, vpp=vpp)
    finally:
        parallel.shutdown()


def meta_stages(
    spec: ModelSpec,
    layout: Layout,
    *,
    dtype: DType = DType.bf16,
    vocab_multiple: int | None = None,
    megatron: Mapping[str, Any] | None = None,
) -> list[PolicyStage]:
    """Build the rank's model chunks on the meta device, so that parameters take no memory.

    Args:
        spec: the architecture of the model.
        layout: the rank's place, from `fake_process_group`.
        dtype: of the parameters.
        vocab_multiple: each rank's rows of the vocabulary are padded to a multiple of it; None: as training does here.
        megatron: the fields of that section of the configuration.

    Raises:
        ConfigError: Megatron refuses these fields.
    """
    config = transformer_config(spec, ModelConfig(dtype=dtype), layout, megatron)
    config.use_cpu_initialization = True  # else Megatron names a device for every parameter
    with torch.device("meta"), platform().cuda_tensor_names(), _engine_on_meta():
        return build_stages(spec, config, layout, vocab_multiple=vocab_multiple)


@contextmanager
def _engine_on_meta() -> Iterator[None]:
    """Within, Megatron names the meta device for transformer-engine's layers, where it would name the CPU."""
    original = transformer_engine._get_extra_te_kwargs
    transformer_engine._get_extra_te_kwargs = lambda config: original(config) | {"device": "meta"}
    try:
        yield
    finally:
        transformer_engine._get_extra_te_kwargs = original
