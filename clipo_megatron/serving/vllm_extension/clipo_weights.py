"""The extension of vLLM's workers (`--worker-extension-cls clipo_weights.WeightChecksums`); imports only torch."""

from __future__ import annotations

import hashlib

import torch

CHECKSUM_BYTES = 8
_PIECE_BYTES = 64 * 2**20  # how much is copied to the host at once


class WeightChecksums:
    """Methods that are added to the worker for calls through /collective_rpc."""

    def repack_output_layer(self) -> None:
        """Pack the output layer again after weights were loaded.

        On a CPU a tied output layer uses a packed copy of the embedding, which vLLM makes only at its start.
        """
        for module in self.model_runner.get_model().modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and hasattr(module, "org_vocab_size") and weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def weight_checksums(self) -> dict:
        """The first 8 bytes, in hex, of the SHA-256 of every parameter of this rank, by vLLM's name.

        On a CPU vLLM packs the weights of linear layers and empties the parameters, whose checksums cover no bytes.
        """
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        return {
            "tp_rank": get_tensor_model_parallel_rank(),
            "tp_size": get_tensor_model_parallel_world_size(),
            "checksums": {name: checksum(tensor) for name, tensor in self.model_runner.get_model().named_parameters()},
        }


def checksum(tensor: torch.Tensor) -> str:
    """The checksum of the bytes of a tensor's elements, in order."""
    digest = hashlib.sha256()
    plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for piece in plain.split(_PIECE_BYTES):
        digest.update(piece.cpu().numpy())
    return digest.digest()[:CHECKSUM_BYTES].hex()
