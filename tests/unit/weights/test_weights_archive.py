"""Archives of our writer: torch and zip read them, and their checksums are right."""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipo_megatron.runtime.durable_files import StreamedFile, joined_crc32
from clipo_megatron.weights.formats import archive
from clipo_megatron.weights.formats.archive import find_elements, write_tensor

TENSORS = {
    "bf16": torch.randn(7, 5).bfloat16(),
    "fp16, more than one system call": torch.randn(700, 500).half(),
    "fp32, rows of a larger one": torch.randn(9, 5, 3)[2:6],
    "fp64": torch.randn(3, dtype=torch.float64),
    "numbers": torch.arange(5),
    "a scalar": torch.tensor(3.0),
    "nothing": torch.zeros(0, 3),
    "a dtype of no name": torch.randn(3, 4).to(torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int]], int]:
    """Write all tensors into a file after other bytes; return it, the place of each tensor, and the CRC-32."""
    path = tmp_path_factory.mktemp("archive") / "tensors"
    places = {}
    with StreamedFile(path) as file:
        file.write(b"something before")
        for name, tensor in TENSORS.items():
            start = file.nbytes
            write_tensor(tensor, file)
            places[name] = (start, file.nbytes - start)
        assert file.nbytes == path.stat().st_size
        return path, places, file.crc32


@pytest.mark.parametrize("name", TENSORS)
def test_torch_and_zip_read_what_was_written(name: str, written: tuple[Path, dict[str, tuple[int, int]], int]) -> None:
    path, places, _ = written
    start, length = places[name]
    archive = io.BytesIO(path.read_bytes()[start : start + length])
    assert zipfile.ZipFile(archive).testzip() is None
    archive.seek(0)
    found = torch.load(archive, weights_only=True)
    assert found.dtype == TENSORS[name].dtype and found.shape == TENSORS[name].shape
    assert raw(found) == raw(TENSORS[name])


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "a dtype of no name"])
def test_elements_are_found_where_they_lie(name: str, written: tuple[Path, dict[str, tuple[int, int]], int]) -> None:
    path, places, _ = written
    start, length = places[name]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = find_elements(descriptor, start, length)
        assert (found.dtype, found.shape) == (TENSORS[name].dtype, tuple(TENSORS[name].shape))
        assert (found.start - start) % 64 == 0, "torch maps files into memory"
        assert os.pread(descriptor, TENSORS[name].nbytes, found.start) == raw(TENSORS[name])
    finally:
        os.close(descriptor)


def test_a_file_of_one_tensor_can_be_mapped(tmp_path: Path) -> None:
    with StreamedFile(tmp_path / "one.pt") as file:
        write_tensor(TENSORS["bf16"], file)
    assert torch.equal(torch.load(tmp_path / "one.pt", mmap=True), TENSORS["bf16"])


def test_the_checksum_of_the_file_is_that_of_its_bytes(written: tuple[Path, dict[str, tuple[int, int]], int]) -> None:
    path, _, code = written
    assert zlib.crc32(path.read_bytes()) == code


@pytest.mark.parametrize("sizes", [(0, 0), (5, 0), (0, 7), (3, 9), (100, 1 << 20), (1, (1 << 22) + 1)])
def test_checksums_of_two_parts_make_that_of_the_whole(sizes: tuple[int, int]) -> None:
    first, second = (os.urandom(size) for size in sizes)
    assert joined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_checksums_of_parts_beyond_four_gigabytes() -> None:
    """Zeros, doubled until there are 2^36 of them, in two orders."""
    code, nbytes = zlib.crc32(bytes(1 << 20)), 1 << 20
    while nbytes < 1 << 36:
        code, nbytes = joined_crc32(code, code, nbytes), 2 * nbytes
    start = zlib.crc32(b"start")
    at_once = joined_crc32(start, code, nbytes)
    quarter = zlib.crc32(bytes(1 << 20))
    for power in range(20, 35):
        quarter = joined_crc32(quarter, quarter, 1 << power)
    for _ in range(2):
        start = joined_crc32(start, quarter, 1 << 35)
    assert at_once == start


def test_the_description_of_a_tensor_changes_no_function() -> None:
    """A pickle could give the call that it names another default, such as the dtype of every tensor read later."""
    payload = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__ctorch\nfloat64\n\x85stb."
    pickletools.dis(payload, out=io.StringIO())
    with pytest.raises(AttributeError):
        archive._TensorUnpickler(io.BytesIO(payload)).load()


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
