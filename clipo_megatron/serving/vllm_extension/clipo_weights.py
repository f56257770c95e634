"""The extension of vLLM's workers (`--worker-extension-cls clipo_weights.TrainerCalls`), for weights in buckets."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import pickle
import socket
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

CHECKSUM_BYTES = 8
_PIECE_BYTES = 64 * 2**20  # how much is copied to the host at once

# What a handle may be made of, beside the description of its tensors.
_REBUILDING = "torch.multiprocessing.reductions"
_ALLOWED = {
    (_REBUILDING, "rebuild_tensor"),
    (_REBUILDING, "rebuild_typed_storage"),
    (_REBUILDING, "rebuild_storage_empty"),
    (_REBUILDING, "rebuild_storage_fd"),
    (_REBUILDING, "rebuild_storage_filename"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "UntypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # makes bytes of text
}


class TrainerCalls:
    """Methods that are added to the worker for calls through /collective_rpc.

    An update is `begin_buckets`, then every bucket by `receive_bucket` or `open_bucket`, then `end_buckets`; or
    `load_folder`. Buckets have tensors by Hugging Face name, whole, of which each rank loads its share. After
    `keep_tensors` an update may also consist of changes (clipo_delta.py). It then ends with loading all tensors,
    because vLLM brings a layer into the form in which it is used once all tensors of it were loaded.
    """

    def keep_tensors(self) -> None:
        """Keep the tensors of all updates from now on."""
        from clipo_delta import WholeTensors

        self._whole_tensors = WholeTensors()

    # --- groups with trainer ranks -----------------------------------------------------------------------------------

    def join_trainer(self, name: str, host: str, port: int, rank_offset: int, world: int, timeout_s: float) -> None:
        """Join the group `name`, whose rank 0 is a trainer rank that listens on host and port; waits for all members.

        The prefixes of the keys are those that torch derives from a group's name.
        """
        rank, timeout = rank_offset + _tensor_parallel()[0], timedelta(seconds=timeout_s)
        store: dist.Store = dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False)
        for prefix in (name, f"{name}/", f"{self.device.type}/"):
            store = dist.PrefixStore(prefix, store)
        if self.device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()
            options._timeout, options._devices = timeout, [_device_towards(host, port)]
            self._trainers()[name] = dist.ProcessGroupGloo(store, rank, world, options)
        else:
            self._trainers()[name] = dist.ProcessGroupNCCL(store, rank, world, dist.ProcessGroupNCCL.Options())

    def leave_trainer(self, name: str) -> None:
        """Leave a group; does nothing if this is no member."""
        self._trainers().pop(name, None)

    def _trainers(self) -> dict[str, Any]:
        if "_trainer_groups" not in self.__dict__:
            self._trainer_groups: dict[str, Any] = {}
        return self._trainer_groups

    # --- buckets -----------------------------------------------------------------------------------------------------

    def begin_buckets(self, changes: bool = False) -> None:
        """Take the parameters into the form in which they are loaded; ends an update that was interrupted.

        Args:
            changes: whether what follows are changes.
        """
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self.__dict__.get("_is_loading_buckets"):
            self.end_buckets()
        self._takes_changes = changes
        if changes:
            return
        with self._configured():
            initialize_layerwise_reload(self.model_runner.get_model())
        self._is_loading_buckets = True

    def receive_bucket(self, group: str, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Receive a bucket that the group's rank 0 broadcasts as bytes, and load it."""
        kinds = [(name, getattr(torch, dtype), shape) for name, dtype, shape in zip(names, dtypes, shapes, strict=True)]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in kinds]
        # New memory each time: parts of a bucket wait in it until the rest of their layer has come.
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._trainers()[group].broadcast([flat], options).wait()
        pieces = flat.split(sizes)
        self._load(
            (name, piece.view(dtype).view(shape)) for (name, dtype, shape), piece in zip(kinds, pieces, strict=True)
        )

    def open_bucket(self, handles: list[str]) -> None:
        """Copy a bucket out of the trainer's memory on this rank's GPU; a pickle in base 64 for each rank."""
        opened = _Unpickler(io.BytesIO(base64.b64decode(handles[_tensor_parallel()[0]]))).load()
        # A copy, because the trainer reuses the memory and parts of a bucket wait for the rest of their layer.
        flat = opened["flattened_tensor"].clone()
        self._load(
            (each.name, flat[each.start_idx : each.end_idx].view(each.dtype).view(each.shape))
            for each in opened["metadata"]
        )

    def end_buckets(self) -> None:
        """Bring the parameters into the form in which they are used."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._takes_changes:
            self.begin_buckets()
            self._load_into_model(self._whole_tensors.tensors.items())
        with self._configured():
            finalize_layerwise_reload(self.model_runner.get_model(), self.vllm_config.model_config)
        self._is_loading_buckets = False
        self.repack_output_layer()

    def load_folder(self, folder: str, changes: bool) -> None:
        """Load the safetensors of a folder: all weights, or changes."""
        from safetensors.torch import load_file

        self.begin_buckets(changes)
        for file in sorted(Path(folder).glob("*.safetensors")):
            self._load(iter(load_file(file).items()))
        self.end_buckets()

    def _load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        if (whole := self.__dict__.get("_whole_tensors")) is not None:
            tensors = whole.take(tensors)
        if self._takes_changes:
            for _ in tensors:
                pass  # they are noted, and loaded at the end
            return
        self._load_into_model(tensors)

    def _load_into_model(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        with self._configured(), torch.no_grad():
            self.model_runner.get_model().load_weights(tensors)

    def _configured(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.vllm_config)

    def repack_output_layer(self) -> None:
        """Pack the output layer again after weights were loaded.

        On a CPU a tied output layer uses a packed copy of the embedding, which vLLM makes only at its start.
        """
        for module in self.model_runner.get_model().modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and hasattr(module, "org_vocab_size") and weight.numel():
                module.quant_method.process_weights_after_loading(module)

    # --- verification ------------------------------------------------------------------------------------------------

    def weight_checksums(self) -> dict:
        """The first 8 bytes, in hex, of the SHA-256 of every parameter of this rank, by vLLM's name.

        On a CPU vLLM packs the weights of linear layers and empties the parameters, whose checksums cover no bytes.
        """
        rank, size = _tensor_parallel()
        return {
            "tp_rank": rank,
            "tp_size": size,
            "checksums": {name: checksum(tensor) for name, tensor in self.model_runner.get_model().named_parameters()},
        }


class _Unpickler(pickle.Unpickler):
    """Opens a handle, and nothing else: a tensor in memory of another process, and where in it which tensor lies."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "FlattenedTensorMetadata":
            return SimpleNamespace
        if module == _REBUILDING and name == "rebuild_cuda_tensor":
            return _rebuilt_on_this_device
        if (module, name) in _ALLOWED:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"a handle names {module}.{name}")


def _rebuilt_on_this_device(*args: Any) -> torch.Tensor:
    """Open memory of the GPU with a UUID, which torch knows by a number that differs between processes."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuids = [str(torch.cuda.get_device_properties(place).uuid) for place in range(torch.cuda.device_count())]
    return rebuild_cuda_tensor(*args[:6], uuids.index(args[6]), *args[7:])


def _tensor_parallel() -> Sequence[int]:
    """This rank's number among the tensor-parallel ranks, and how many there are."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def _device_towards(host: str, port: int) -> Any:
    """A gloo device on the network interface through which `host` is reached."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return dist.ProcessGroupGloo.create_device(hostname=probe.getsockname()[0])


def checksum(tensor: torch.Tensor) -> str:
    """The checksum of the bytes of a tensor's elements, in order."""
    digest = hashlib.sha256()
    plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for piece in plain.split(_PIECE_BYTES):
        digest.update(piece.cpu().numpy())
    return digest.digest()[:CHECKSUM_BYTES].hex()
