"""A conversion that is stopped, killed, or cannot be done leaves nothing that looks like a result."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conversion_steps import contents, ended, export_model, import_model, shard_as_released, start, tensors_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from clipo_megatron.conversion import running
from clipo_megatron.conversion.conversion import ConversionError
from clipo_megatron.conversion.running import convert
from clipo_megatron.conversion.to_hf import ToHF
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.runtime.manifest import manifest_defects
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.parallel_division import ParallelDivision

KILLS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three files of weights; read-only."""
    return shard_as_released(tiny_llama(tmp_path_factory.mktemp("source") / "hf", tied=False, vocab=263))


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """A conversion of `source`; read-only."""
    return import_model(source, source.with_name("checkpoint"), tp=2)


def both_ways(source: Path, checkpoint: Path, folder: Path) -> list[tuple[object, Path]]:
    """Return, for each direction, a function that makes the conversion, and its target."""
    back, forth = folder / "checkpoint", folder / "release"
    return [
        (lambda: ToMegatron(source, back, division=ParallelDivision(tp=2)), back),
        (lambda: ToHF(checkpoint, forth, shard_bytes=100_000), forth),
    ]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide even tiny models into many units."""
    for module in ("to_megatron", "to_hf"):
        monkeypatch.setattr(f"clipo_megatron.conversion.{module}.UNIT_BYTES", 20_000)
        monkeypatch.setattr(f"clipo_megatron.conversion.{module}.PIECE_BYTES", 4_000)


def _convert_in_a_fork(make: object) -> int:
    """Start a conversion in a child of this process and return its id."""
    child = os.fork()
    if child:
        return child
    try:  # the child: never return into the test
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        convert(make(), threads=2)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("direction", [0, 1], ids=["to-megatron", "to-hf"])
def test_kills_at_random_moments_leave_nothing_that_looks_complete(
    source: Path, checkpoint: Path, tmp_path: Path, direction: int
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    make, target = both_ways(source, checkpoint, tmp_path)[direction]
    began = time.monotonic()
    assert os.waitpid(_convert_in_a_fork(make), 0)[1] == 0
    whole = time.monotonic() - began
    expected = contents(target)
    shutil.rmtree(target)
    finished = 0
    for _ in range(KILLS):
        child = _convert_in_a_fork(make)
        time.sleep(chance.uniform(0, 0.9 * whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if target.exists():  # then it is complete
            assert contents(target) == expected
            finished += 1
            shutil.rmtree(target)
        assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert finished < KILLS, "no kill came in time"
    assert os.waitpid(_convert_in_a_fork(make), 0)[1] == 0
    assert contents(target) == expected
    assert list(tmp_path.iterdir()) == [target], "something was left over"


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("direction", [0, 1], ids=["to-megatron", "to-hf"])
def test_a_disk_that_fills_up_ends_it_with_a_sentence(
    source: Path, checkpoint: Path, tmp_path: Path, direction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, target = both_ways(source, checkpoint, tmp_path)[direction]
    convert(make())
    expected = contents(target)
    shutil.rmtree(target)
    first = make()
    write, begun = type(first).write, []

    def until_full(self: object, unit: object, *rest: object) -> object:
        begun.append(unit)
        if len(begun) > 5:
            raise OSError(28, "No space left on device")
        return write(self, unit, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(type(first), "write", until_full)
        with pytest.raises(ConversionError, match=r"cannot be written: .*No space left.*Nothing is left of it"):
            convert(first)
    assert list(tmp_path.iterdir()) == []
    convert(make())
    assert contents(target) == expected


def test_a_target_that_cannot_be_made_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / "checkpoint"
    with pytest.raises(ConversionError, match=rf"{target} cannot be written: .*Choose another place"):
        convert(ToMegatron(source, target))


def test_what_a_killed_conversion_left_is_removed(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    left = target.with_name(".checkpoint.partial")
    (left / "content" / "policy").mkdir(parents=True)
    (left / "content" / "policy" / "stray.distcp").write_text("old")
    (left / "journal.0.jsonl").write_text("of an older release\n")
    convert(ToMegatron(source, target, division=ParallelDivision()))
    assert not (target / "policy" / "stray.distcp").exists()
    assert manifest_defects(target) == []
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_overwritten(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    for make, target in both_ways(source, checkpoint, tmp_path):
        target.mkdir()
        (target / "precious").write_text("x")
        with pytest.raises(ConversionError, match=rf"{target} exists already.*rm -r {target}"):
            convert(make())
        assert contents(target).keys() == {"precious"}
        assert not target.with_name(f".{target.name}.partial").exists()


def test_a_full_disk_is_noticed_before_the_first_byte(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for make, target in both_ways(source, checkpoint, tmp_path):
        with pytest.raises(ConversionError, match=r"needs [\d,]+ bytes .*and 1,000 .*are free"):
            convert(make())
        assert not target.exists()


def test_two_at_once_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    write = ToMegatron.write
    refused: list[str] = []

    def meanwhile(self: ToMegatron, *rest: object) -> object:
        with pytest.raises(ConversionError, match=rf"process {os.getpid()} on .* is writing {target} already") as error:
            running.WorkFolder(target).__enter__()
        refused.append(str(error.value))
        return write(self, *rest)

    monkeypatch.setattr(ToMegatron, "write", meanwhile)
    convert(ToMegatron(source, target))
    assert refused
    assert manifest_defects(target) == []


def test_damaged_sources_are_named(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    def damaged(original: Path, name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(original, folder)
        return folder

    flipped = damaged(checkpoint, "flipped")
    file = next((flipped / "policy").glob("__0_tp1*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConversionError, match=rf"the bytes of {file} are not those that were written"):
        export_model(flipped, tmp_path / "out")

    shorter = damaged(checkpoint, "shorter")
    file = next((shorter / "policy").glob("__0_tp0*.distcp"))
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(WeightsError, match=rf"{file} has \d+ bytes, \d+ were written"):
        export_model(shorter, tmp_path / "out")

    cut = damaged(source, "cut")
    file = next(cut.glob("model-00002*"))
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(WeightsError, match=rf"{file} is damaged or truncated"):
        import_model(cut, tmp_path / "out")

    gone, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"
    wrong = tiny_llama(tmp_path / "wrong", tied=False)
    tensors = load_file(wrong / "model.safetensors")
    tensors[extra] = tensors.pop(gone)
    save_file(tensors, wrong / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        import_model(wrong, tmp_path / "out")
    assert gone in str(error.value)
    assert extra in str(error.value)
    assert not (tmp_path / "out").exists()


def test_under_a_launcher_rank_0_does_all_of_it(source: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    checkpoint, release = tmp_path / "checkpoint", tmp_path / "release"
    code, output = ended(start("to-megatron", source, checkpoint, "--pp", 4, launcher=launcher))
    assert code == 0, output
    assert "rank 1 has nothing to do" in output
    assert manifest_defects(checkpoint) == []
    export_model(checkpoint, release)
    assert contents(release) == contents(source)
    assert tensors_of(release).keys() == tensors_of(source).keys()


def test_a_signal_stops_a_conversion_with_a_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoint"
    write = ToMegatron.write

    def interrupted(self: ToMegatron, *rest: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return write(self, *rest)

    monkeypatch.setattr(ToMegatron, "write", interrupted)
    with pytest.raises(
        running.Interrupted, match=r"stopped by SIGINT; there is no .*same command starts from the beginning"
    ) as error:
        convert(ToMegatron(source, target))
    assert error.value.exit_code == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(ToMegatron, "write", write)
    convert(ToMegatron(source, target))
    assert manifest_defects(target) == []
