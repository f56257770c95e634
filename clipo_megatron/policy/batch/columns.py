"""The columns that the last pipeline stage has of the tokens in a micro-batch, taken apart and joined by rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clipo_megatron.flow import MicroBatch, Sample

SCORED = ("old_logprobs", "reference_logprobs", "token_advantages", "returns")
_SIGNAL = "signals."


def columns_of(micro: MicroBatch) -> dict[str, Tensor]:
    """The columns [N] of a scored micro-batch that there are; a signal's name begins with "signals."."""
    found = {name: getattr(micro, name) for name in SCORED}
    found |= {_SIGNAL + name: values for name, values in micro.signals.items()}
    return {name: values for name, values in found.items() if values is not None}


def by_rollout(micro: MicroBatch) -> Iterator[tuple[Sample, dict[str, Tensor]]]:
    """Each rollout of a scored micro-batch with its part [R] of every column."""
    sizes = [sample.response.numel() for sample in micro.samples]
    parts = {name: values.split(sizes) for name, values in columns_of(micro).items()}
    for place, sample in enumerate(micro.samples):
        yield sample, {name: values[place] for name, values in parts.items()}


def with_columns(
    micro: MicroBatch, parts: Mapping[str, Mapping[int, Tensor] | Sequence[Tensor]], nothing: Mapping[str, Tensor]
) -> MicroBatch:
    """The micro-batch with these columns, and no others.

    Args:
        micro: packed, not scored.
        parts: of each column, the part of every rollout by its row.
        nothing: of each column, a tensor without elements.
    """

    def column(name: str) -> Tensor | None:
        if name not in nothing:
            return None
        joined = torch.cat([nothing[name], *(parts[name][sample.row] for sample in micro.samples)])
        return joined.to(micro.tokens.device)

    signals = [name.removeprefix(_SIGNAL) for name in nothing if name.startswith(_SIGNAL)]
    return replace(
        micro,
        **{name: column(name) for name in SCORED},
        signals={name: column(_SIGNAL + name) for name in signals},
    )
