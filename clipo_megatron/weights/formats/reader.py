"""Reads a Hugging Face folder of safetensors, one file or many, and no more of it than is asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from clipo_megatron.config.errors import spell
from clipo_megatron.config.model_folder import read_object
from clipo_megatron.weights.errors import WeightsFolderError
from clipo_megatron.weights.formats.header import StoredTensor, dtype_of
from clipo_megatron.weights.formats.safetensors import SafetensorsFile, SlicedRead

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_NAME = 255  # bytes
_PART_BYTES = 1 << 24  # of each tensor, while two are compared


class LazyTensor(SlicedRead):
    """A tensor on disk; indexing it reads only the rows that are asked for."""

    def __init__(self, reader: HFReader, file: SafetensorsFile, name: str) -> None:
        stored = file.header.tensors[name]
        super().__init__(stored.shape)
        self.kind = stored.kind
        self._reader, self._file, self._name = reader, file, name

    @property
    def dtype(self) -> torch.dtype:
        """The element type as torch names it."""
        return dtype_of(self.kind)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._file.read(self._name, slice(start, stop))

    def whole(self) -> Tensor:
        return self._file.read(self._name)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        part = super().__getitem__(index)
        self._reader.bytes_read += part.nbytes
        return part


class HFReader:
    """The tensors of a folder by name. Use it as a context manager, or call `close`.

    Of the files, headers are read at once and tensors when they are asked for. Several threads may read at a time.
    `bytes_read` counts what was indexed; `unindexed` are the tensors that the index leaves out, each with its file.

    Raises:
        WeightsFolderError: there are no safetensors, the folder lacks a file that the index names, a file is damaged
            or truncated, two files hold one tensor, or a tensor is not there; names file or tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._open: dict[str, SafetensorsFile] | None = {}
        self._opening = threading.Lock()
        self.unindexed: Mapping[str, str] = {}
        self._files = self._locate()

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, sorted."""
        return tuple(sorted(self._files))

    def get(self, name: str) -> Tensor:
        """Read a whole tensor into memory."""
        return self.view(name)[:]

    def view(self, name: str) -> LazyTensor:
        """Return a view of a tensor, which has its shape and reads parts of it when it is indexed."""
        if name not in self._files:
            raise WeightsFolderError(f"{self.folder} has no tensor {name!r}")
        file = self._handle(self._files[name])
        if name not in file.header.tensors:
            raise WeightsFolderError(f"{file.path} does not hold {name!r}, though {INDEX} says so")
        return LazyTensor(self, file, name)

    def stored(self, name: str) -> StoredTensor:
        """Return dtype and shape of a tensor."""
        return self.view(name)._file.header.tensors[name]

    def same_bytes(self, name: str, other: str) -> bool:
        """Tell whether two tensors are equal bit for bit, element type and shape included; holds a part at a time."""
        mine, its = self.stored(name), self.stored(other)
        if (mine.kind, mine.shape) != (its.kind, its.shape):
            return False
        files = [(self._handle(self._files[each]), each) for each in (name, other)]
        for start in range(0, mine.nbytes, _PART_BYTES):
            first, second = (file.read_bytes(each, start, _PART_BYTES) for file, each in files)
            if first != second:
                return False
        return True

    @property
    def files(self) -> dict[str, SafetensorsFile]:
        """All files of the folder by name; opens them."""
        return {name: self._handle(name) for name in sorted(set(self._files.values()))}

    def close(self) -> None:
        """Close the files; calling it again does nothing, and reading afterwards is an error."""
        for handle in (self._open or {}).values():
            handle.close()
        self._open = None

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locate(self) -> Mapping[str, str]:
        """Return the file of each tensor, as transformers finds it.

        A single file takes precedence over an index, and a file that the index names counts with all its tensors.
        """
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._handle(SINGLE).header.tensors, SINGLE)
        index = self.folder / INDEX
        if not index.is_file():
            raise WeightsFolderError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; other weight formats are not read "
                "(save the model with save_pretrained to get safetensors)"
            )
        try:
            files = read_object(index)["weight_map"]
            for name, file in files.items():
                if not isinstance(file, str) or "\0" in file or len(file.encode()) > _LONGEST_NAME:
                    raise ValueError(f"{spell(file)} is no file name, and weight_map gives it to {spell(name)}")
            names = sorted(set(files.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"it has no weight_map ({error!r})"
            raise WeightsFolderError(f"{index} cannot be read: {reason}") from error
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if name not in outside and not (self.folder / name).is_file()]
        if outside:
            raise WeightsFolderError(f"{index} names files outside its folder: {', '.join(outside)}")
        if missing:
            raise WeightsFolderError(f"{self.folder} lacks files that {INDEX} names: {', '.join(missing)}")
        self.unindexed = self._unindexed(files, names)
        return {**files, **self.unindexed}

    def _unindexed(self, files: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
        """Find tensors that the files `names` hold and the index leaves out, each with its file.

        A file that cannot be read is passed over: it is named when one of its tensors is asked for.
        """
        found: dict[str, str] = {}
        for file in names:
            try:
                held = self._handle(file).header.tensors
            except WeightsFolderError:
                continue
            for name in held:
                place = files.get(name, found.get(name))
                if place is None:
                    found[name] = file
                elif place != file and self._holds(place, name):
                    raise WeightsFolderError(
                        f"{self.folder / place} and {self.folder / file} both hold {name}, and which of them counts "
                        "depends on the reader. Remove one of the two, or save the model again with save_pretrained"
                    )
        return found

    def _holds(self, file: str, name: str) -> bool:
        try:
            return name in self._handle(file).header.tensors
        except WeightsFolderError:
            return False

    def _handle(self, file: str) -> SafetensorsFile:
        if self._open is None:
            raise WeightsFolderError(f"the reader of {self.folder} is closed")
        with self._opening:
            if file not in self._open:
                path = self.folder / file
                try:
                    self._open[file] = SafetensorsFile(path)
                except OSError as error:
                    raise WeightsFolderError(f"{path} is damaged or truncated: {error}") from error
            return self._open[file]
