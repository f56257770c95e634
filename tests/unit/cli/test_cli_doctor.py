"""`clipo doctor`: what it reports of this machine, and of one that pretends to have GPUs."""

import os
import platform as host
from importlib import metadata

import pytest
from rich.console import Console

from clipo_megatron.cli import doctor
from clipo_megatron.cli import main as cli
from clipo_megatron.runtime.platform import platform


def told():
    return {finding.what: finding for finding in doctor.findings()}


def test_the_table_has_all_sections(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for section in ("machine", "packages", "optional packages", "launchers", "a run would use"):
        assert section in shown
    assert metadata.version("megatron-core") in shown and host.python_version() in shown


def test_device_and_backend_are_those_of_the_platform():
    found = told()
    assert (found["device"].value, found["backend"].value) == (platform().name, platform().backend)


def test_the_layers_of_the_graders_sandbox_are_told():
    finding = told()["sandbox of graders"]
    assert finding.value.split(", ")[0] == "limits"
    assert ("graders run without" in finding.remark) == (not {"Landlock", "seccomp"} <= set(finding.value.split(", ")))


def test_absent_packages_are_reported_as_absent():
    assert doctor.version("no-such-distribution") is None
    for name in doctor.OPTIONAL:
        expected = doctor.version(name) or doctor.version(f"{name}-cpu") or "not installed"
        assert told()[name].value == expected


@pytest.mark.parametrize(
    ("installed", "release", "is_taken"),
    [("2.8.0", "0.16.1", False), ("2.11.0", "0.16.1", True), ("2.12.0", "0.16.1", False), ("2.20.0", "0.19.2", True)],
)
def test_a_transformer_engine_that_megatron_was_not_made_for_is_told(
    tmp_path, monkeypatch, installed, release, is_taken
):
    """The requirements are those of the releases' own metadata, of their extras "dev" and "te"."""
    bounds = {"0.16.1": '<2.12.0,>=2.9.0a0; extra == "dev"', "0.19.2": '; extra == "te"'}
    found = {
        "transformer_engine": f"Name: transformer-engine\nVersion: {installed}\n",
        "megatron_core": f"Name: megatron-core\nVersion: {release}\n"
        f"Requires-Dist: transformer-engine[core_cu13,pytorch]{bounds[release]}\n",
    }
    for name, text in found.items():
        folder = tmp_path / f"{name}-{installed if name == 'transformer_engine' else release}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{text}")
    monkeypatch.syspath_prepend(tmp_path)
    finding = told()["transformer-engine"]
    assert finding.value == installed
    assert ("megatron-core 0.16.1 takes <2.12.0,>=2.9.0a0" in finding.remark) == (not is_taken)


@pytest.mark.skipif(platform().has_gpu, reason="needs a torch without GPUs")
def test_gpus_that_torch_cannot_use(tmp_path, monkeypatch):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'Some GPU, 80000 MiB, 999.1'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert told()["GPU"].value == "Some GPU, 80000 MiB, 999.1"
    assert "cannot use them" in told()["GPU"].remark
    driver.write_text("#!/bin/sh\necho broken >&2; exit 9\n")
    assert told()["GPU"].value == "none" and "broken" in told()["GPU"].remark


def test_a_rank_of_a_slurm_job_is_recognised(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "42", "RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert told()["Slurm"].remark == "in job 42" and told()["this process"].value == "rank 1 of 4"


def test_the_table_fits_a_narrow_terminal():
    console = Console(width=40, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    doctor.examine(console)
    assert "megatron-core" in console.export_text()
