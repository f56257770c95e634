"""Runs inside vLLM's workers (`--worker-extension-cls clipo_weights.WeightChecksums`), on no more than torch."""

from __future__ import annotations

import hashlib

import torch

CHECKSUM_BYTES = 8
_PIECE_BYTES = 64 * 2**20  # copied to the host at once


class WeightChecksums:
    """Adds methods to the worker, for /collective_rpc."""

    def repack_output_layer(self) -> None:
        """After weights were read anew. On a CPU a tied output layer works on a packed copy of the embedding, which
        vLLM makes at its start and then forgets."""
        for module in self.model_runner.get_model().modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and hasattr(module, "org_vocab_size") and weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def weight_checksums(self) -> dict:
        """Of every parameter that this rank holds, by vLLM's name: the first 8 bytes of its SHA-256, in hex.

        On a CPU vLLM packs the weights of linear layers for its kernels and empties the parameters; their checksums are
        of nothing, and say nothing.
        """
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        return {
            "tp_rank": get_tensor_model_parallel_rank(),
            "tp_size": get_tensor_model_parallel_world_size(),
            "checksums": {name: checksum(tensor) for name, tensor in self.model_runner.get_model().named_parameters()},
        }


def checksum(tensor: torch.Tensor) -> str:
    """Of the bytes of its elements, in order."""
    digest = hashlib.sha256()
    plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for piece in plain.split(_PIECE_BYTES):
        digest.update(piece.cpu().numpy())
    return digest.digest()[:CHECKSUM_BYTES].hex()
