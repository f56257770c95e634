"""The contrastive head: pooled response states -> embeddings on the unit sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipo_megatron.config.schema import Debias, HeadKind

KINDS, DEBIAS = tuple(each.value for each in HeadKind), tuple(each.value for each in Debias)


def normalise(vectors: Tensor) -> Tensor:
    """Scale `vectors` [..., d] to length 1. A zero vector stays zero, with a finite gradient."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norm > 0, norm, 1.0)


class ContrastiveHead(nn.Module):
    """z = normalize(W h), or normalize(W2 relu(W1 h)): without bias, in fp32 whatever the model's dtype.

    The initialisation (uniform in +-1/sqrt(fan in)) is a function of `seed` and the shapes, and leaves torch's global
    generators as they were, so every rank and every layout starts from the same head.

    Debiasing removes what all pooled states share before the projection:
        mean: subtract the mean state of the batch (over *all* ranks: see `forward`);
        layer_norm: bring each state to mean 0 and variance 1 over its H entries, without learned scales.

    Args:
        hidden_size: H, size of the pooled states.
        dim: d, size of the embeddings.
        kind: linear (H -> d) or mlp (H -> H -> d with ReLU).
        debias: none, mean or layer_norm.
        seed: seed of the initialisation.

    Raises:
        ValueError: `kind` or `debias` is unknown, or a size is below 1.
    """

    def __init__(
        self, hidden_size: int, dim: int = 512, kind: str = "linear", debias: str = "none", seed: int = 0
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}.")
        if debias not in DEBIAS:
            raise ValueError(f"debias is {debias!r}: choose one of {', '.join(DEBIAS)}.")
        if hidden_size < 1 or dim < 1:
            raise ValueError(f"hidden_size is {hidden_size}, dim is {dim}: both must be at least 1.")
        self.hidden_size, self.dim = hidden_size, dim
        self.kind, self.debias = KINDS[KINDS.index(kind)], DEBIAS[DEBIAS.index(debias)]
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.Parameter(_uniform(hidden_size, hidden_size, generator)) if kind == "mlp" else None
        self.projection = nn.Parameter(_uniform(dim, hidden_size, generator))

    def forward(self, pooled: Tensor, mean: Tensor | None = None) -> Tensor:
        """Embed pooled states. They are detached, so no contrastive gradient reaches the language model.

        Args:
            pooled: [b, H], any float dtype.
            mean: [H], the mean pooled state over all ranks, for debias = "mean" where `pooled` is a part of the batch;
                None: the mean of `pooled`.

        Returns:
            The embeddings z, [b, d] float32, of length 1.

        Raises:
            ValueError: shapes do not fit, or this head would ignore the `mean`.
        """
        if pooled.ndim != 2 or pooled.shape[1] != self.hidden_size:
            raise ValueError(f"pooled has shape {tuple(pooled.shape)}, this head needs [b, {self.hidden_size}].")
        if mean is not None and self.debias != "mean":
            raise ValueError(f"a mean was given, but debias is {self.debias!r}: build the head with debias='mean'.")
        if mean is not None and mean.shape != (self.hidden_size,):
            raise ValueError(f"mean has shape {tuple(mean.shape)}, needed is [{self.hidden_size}].")
        with torch.autocast(pooled.device.type, enabled=False):
            state = pooled.detach().float()
            if self.debias == "mean" and len(state):
                state = state - (state.mean(0) if mean is None else mean.detach().float())
            elif self.debias == "layer_norm":
                state = nn.functional.layer_norm(state, (self.hidden_size,))
            if self.hidden is not None:
                state = nn.functional.linear(state, self.hidden.float()).relu()
            return normalise(nn.functional.linear(state, self.projection.float()))

    def extra_repr(self) -> str:
        return f"{self.hidden_size} -> {self.dim}, kind={self.kind}, debias={self.debias}"


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = 1.0 / math.sqrt(columns)
    # Drawn on the CPU even under a default device, so that a seed means the same numbers everywhere.
    weight = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    return weight.uniform_(-bound, bound, generator=generator)
