"""`clipo convert --dry-run` prints what a conversion then does, and needs no weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conversion_steps import import_model
from paths import ARCHITECTURES
from rich.console import Console
from tiny_models import tiny_llama, tiny_qwen3_moe

from clipo_megatron.cli import main as cli
from clipo_megatron.conversion import dry_run
from clipo_megatron.conversion.running import convert
from clipo_megatron.conversion.to_hf import ToHF
from clipo_megatron.conversion.to_megatron import ToMegatron
from clipo_megatron.weights.formats.reader import INDEX
from clipo_megatron.weights.formats.torch_dist import TorchDist
from clipo_megatron.weights.parallel_division import ParallelDivision


class Disk(NamedTuple):
    """The result of shutil.disk_usage."""

    total: int
    used: int
    free: int


def have_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2 * nbytes, nbytes, nbytes))


def plan(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = cli.main(["convert", *map(str, arguments), "--dry-run"])
    return code, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "nbytes", "options", "words"),
    [
        ("qwen2.5-72b", 145_412_407_296, (), ("80 layers", "layers of the pipeline ranks: 10 each")),
        ("llama-3.1-70b", 141_107_412_992, (), ("theta 500000", "Llama3Rope(factor=8.0", "TP 8 x PP 8")),
        (
            "qwen3-235b-a22b",
            470_187_269_120,
            ("--ep", 8, "--etp", 1, "--first-layers", 11, "--last-layers", 11),
            ("128 experts of 1536, 8 a token", "EP 8 x ETP 1", "11, 12, 12, 12, 12, 12, 12, 11"),
        ),
    ],
)
def test_a_large_model_from_its_config_alone(
    name: str,
    nbytes: int,
    options: tuple[Any, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_free(monkeypatch, 10**12)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ARCHITECTURES / f"{name}.json", source / "config.json")
    code, shown = plan(capsys, "to-megatron", source, tmp_path / "out", "--tp", 8, "--pp", 8, *options)
    assert code == 0
    for word in (f"{nbytes:,}", "bfloat16, as config.json says", "free disk 1 TB", "measured on this machine", *words):
        assert word in shown, word
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_plan_needs_no_weights_and_is_the_same_with_them(tmp_path: Path) -> None:
    source = tiny_qwen3_moe(tmp_path / "source", vocab=263)
    division = ParallelDivision(tp=2, pp=2, ep=2, etp=1)
    with_weights = ToMegatron(source, tmp_path / "out", division=division)
    files = with_weights.files()
    with_weights.close()
    (source / "model.safetensors").unlink()
    alone = dry_run.ConfigOnlyConversion(source, tmp_path / "out", division=division, dtype=None)
    assert alone.files() == files and len(files) >= 8
    in_bf16 = dry_run.ConfigOnlyConversion(source, tmp_path / "out", division=division, dtype=torch.bfloat16)
    assert in_bf16.files() == {name: nbytes // 2 for name, nbytes in files.items()}


def test_the_conversion_does_what_was_planned(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", vocab=263, tied=False)
    there = ToMegatron(source, tmp_path / "checkpoint", division=ParallelDivision(tp=4, pp=2))
    planned, units = there.files(), there.nbytes
    convert(there)
    written = {
        f"policy/{path.name}": path.stat().st_size
        for path in (tmp_path / "checkpoint" / "policy").glob("*.distcp")
        if "extra_state" not in path.name
    }
    assert written.keys() == planned.keys()
    assert all(planned[name] < written[name] < planned[name] + 100_000 for name in planned)  # and archives' headers
    assert sum(planned.values()) == units
    store = TorchDist(tmp_path / "checkpoint" / "policy")
    assert store.tensors["embedding.word_embeddings.weight"].shape == (264, 64)
    store.close()
    assert dry_run.padding(there.spec, there.division).startswith(
        "1 rows of zeros: embedding and output layer each 264"
    )

    back = ToHF(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=200_000)
    planned = back.files()
    convert(back)
    written = {path.name: path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")}
    assert planned == written and len(written) > 2
    assert (tmp_path / "back" / INDEX).is_file()


def test_a_plan_of_the_way_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_llama(tmp_path / "source")
    convert(ToMegatron(source, tmp_path / "checkpoint"))
    code, shown = plan(capsys, "to-hf", tmp_path / "checkpoint", tmp_path / "back")
    assert code == 0
    assert f"{(source / 'model.safetensors').stat().st_size:,}" in shown
    assert "dtype as in the checkpoint" in shown and "reading" in shown and "Nothing was written." in shown
    assert not (tmp_path / "back").exists()


def test_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "source")
    have_free(monkeypatch, 609_279)  # a byte less than the weights
    code, shown = plan(capsys, "to-megatron", source, tmp_path / "out")
    assert code == 1 and "NOT enough" in shown
    have_free(monkeypatch, 609_280)
    code, shown = plan(capsys, "to-megatron", source, tmp_path / "out")
    assert code == 0 and "NOT enough" not in shown


def test_a_division_that_does_not_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_llama(tmp_path / "source")
    assert cli.main(["convert", "to-megatron", str(source), str(tmp_path / "out"), "--pp", "3", "--dry-run"]) == 2
    assert "4 layers cannot be divided into 3 equal parts, but into 2 or 4" in capsys.readouterr().err


def test_a_checkpoint_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = import_model(tiny_llama(tmp_path / "source"), tmp_path / "checkpoint")
    assert cli.main(["convert", "to-megatron", str(checkpoint), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "is a checkpoint already" in capsys.readouterr().err


def test_many_files_are_summed(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    conversion = ToMegatron(source, tmp_path / "out", division=ParallelDivision(tp=4, pp=4))
    files = conversion.files()
    console = Console(record=True, width=120)
    dry_run.run(conversion, console)
    shown = console.export_text()
    listed = [int(line.split()[1].replace(",", "")) for line in shown.splitlines() if line.startswith("policy/")]
    (more,) = [line.split() for line in shown.splitlines() if line.startswith("and ")]
    assert len(listed) + int(more[1]) == len(files) == 16
    assert sum(listed) + int(more[3].replace(",", "")) == 609_280 + 256 * (-259 % 4)


def test_rates_are_measured(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(8_000_000))
    rates = dry_run.measure([tmp_path / "weights"], tmp_path)
    assert rates.read is not None and rates.read > 1e6 and rates.write > 1e6
    assert rates.seconds(10**9) == pytest.approx(1e9 / rates.read + 1e9 / rates.write)
    assert dry_run.measure([], tmp_path).read is None
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
