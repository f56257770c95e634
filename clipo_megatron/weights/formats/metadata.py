"""Reads `.metadata` of torch_dist folders: a pickle, of which nothing runs.

A pickle can name any code. Here it gets the classes that the format is made of, each by its exact module and name, and
nothing that these could lead to. Other classes of torch and Megatron, which some writers add, become empty objects;
whatever else is named is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from clipo_megatron.runtime.manifest import read_checked
from clipo_megatron.weights.errors import WeightsFolderError

METADATA = ".metadata"
_CLASSES = (
    dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta,
    dcp.TensorProperties, dcp.TensorStorageMetadata, dcp._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, filesystem._StoragePrefix,
)  # fmt: skip
_PLAIN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    # The method of a dict, because a pickle can set the attributes of a function.
    ("torch.serialization", "_get_layout"): {str(each): each for each in (torch.strided, torch.sparse_coo)}.__getitem__,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # as Python 3.13 names it
    ("pathlib", "PurePosixPath"): PurePosixPath,
}
_ALLOWED = {(each.__module__, each.__name__): each for each in _CLASSES} | _PLAIN
_EMPTIED = ("torch", "megatron")  # packages whose other classes are read as empty objects


def read_metadata(folder: Path) -> dcp.Metadata:
    """Read the metadata of a torch_dist folder.

    Raises:
        WeightsFolderError: there is none, it is damaged, or it names code; names the file and the reason.
        ManifestError: it is not the one that the checkpoint's manifest lists.
    """
    path = folder / METADATA
    try:
        pickled = read_checked(path)
    except FileNotFoundError:
        raise WeightsFolderError(f"{folder} has no {METADATA}: it is no torch_dist checkpoint") from None
    except OSError as error:
        raise WeightsFolderError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with _restored(*_CLASSES, PosixPath, PurePosixPath, _Emptied):
            found = _MetadataUnpickler(io.BytesIO(pickled)).load()
        reason = _defect(found)
    except _NamesCodeError as error:
        raise WeightsFolderError(
            f"{path} is refused: it names {error}, which no checkpoint needs and which could run as code. Nothing of "
            "it was run. Get the checkpoint again from somebody whom you trust"
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception, even MemoryError
        raise WeightsFolderError(f"{path} is damaged or truncated: {error!r}") from error
    if reason:
        raise WeightsFolderError(f"{path} is damaged: {reason}")
    return found


class _NamesCodeError(pickle.UnpicklingError):
    """The pickle names something that is not of the format."""


@contextmanager
def _restored(*classes: type) -> Iterator[None]:
    """Undo what is done to the attributes of classes here, which a pickle can set as those of any object.

    Raises:
        _NamesCodeError: an attribute was set.
    """
    before = {each: dict(vars(each)) for each in classes}
    try:
        yield
    finally:
        changed = []
        for each, attributes in before.items():
            for name in vars(each).keys() | attributes.keys():
                if vars(each).get(name) is not attributes.get(name):
                    changed.append(f"{each.__name__}.{name} to change it")
        for each, attributes in before.items():
            for name in set(vars(each)) - set(attributes):
                delattr(each, name)
            for name, value in attributes.items():
                if vars(each).get(name) is not value:
                    setattr(each, name, value)
    if changed:
        raise _NamesCodeError(changed[0][:200])


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the classes of the format, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if found := _ALLOWED.get((module, name)):
            return found
        # Only an exact name of torch itself: a dotted one would be looked up step by step, through any module.
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module.partition(".")[0] in _EMPTIED and "." not in name:
            return _Emptied
        raise _NamesCodeError(f"{module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> Any:
        raise _NamesCodeError("an object outside the file")


class _Emptied:
    """Replaces a class that is not needed; accepts any arguments and state."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _defect(found: Any) -> str:
    """Say what contradicts the format, so that those who use the metadata need not doubt it; "" if nothing does."""
    if not isinstance(found, dcp.Metadata):
        return f"it holds a {type(found).__name__} where metadata was expected"
    for index, info in found.storage_data.items():
        if not isinstance(index, dcp.MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            return f"it places a {type(index).__name__} in a {type(info).__name__}"
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            return f"it names a file outside its folder: {_shown(name)}"
        placed = index.offset is None or _are_counts(index.offset)
        if not isinstance(index.fqn, str) or not placed or not _are_counts((info.offset, info.length)):
            return f"it places {_shown(index.fqn)} where nothing can be"
    for key, tensor in found.state_dict_metadata.items():
        if not isinstance(key, str) or not (isinstance(tensor, dcp.BytesStorageMetadata) or _is_tensor(tensor)):
            return f"it describes no tensor under {_shown(key)}"
    return ""


def _shown(name: Any) -> str:
    """A name as a message shows it; lists in lists can be too large for any."""
    return repr(name[:200]) if isinstance(name, str) else f"a {type(name).__name__}"


def _is_tensor(found: Any) -> bool:
    if not isinstance(found, dcp.TensorStorageMetadata) or not isinstance(found.properties.dtype, torch.dtype):
        return False
    boxes = [part for chunk in found.chunks for part in (chunk.offsets, chunk.sizes)]
    return all(_are_counts(each) and len(each) == len(found.size) for each in (found.size, *boxes))


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(type(each) is int and each >= 0 for each in values)
