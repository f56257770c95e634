"""`clipo plan --measured`: rates and bytes of a proof in place of assumptions, and files that are none."""

import json

import pytest
from paths import EXAMPLES

from clipo_megatron.cli import main as cli
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, hardware_of_gpu
from clipo_megatron.planning.measured import read_measured

PROOF = {
    "gpu": "NVIDIA H200",
    "hardware": "h200",
    "measured": {"update_flops_per_s": 0.25 * HARDWARE["h200"].flops, "reserve_bytes": 2e9, "attention_flops_per_s": 1},
}
RECIPE = EXAMPLES / "recipes" / "qwen2.5-7b-math.yaml"


@pytest.fixture
def proof(tmp_path):
    """A function that writes a proof, with changes, and returns its path."""

    def write(**changes):
        path = tmp_path / "proof.json"
        path.write_text(json.dumps(PROOF | changes))
        return str(path)

    return write


def test_rates_become_shares_of_the_data_sheet(proof):
    assert read_measured(proof()) == (HARDWARE["h200"], {"train_flops": 0.25, "reserve_bytes": 2e9})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": None, "gpu": None}, "a machine without a GPU"),
        ({"hardware": "rtx", "gpu": "RTX 9090"}, "measured on RTX 9090"),
        ({"measured": 3}, "no file of `clipo prove`"),
        ({"measured": {"update_flops_per_s": 1e18}}, "at most 1"),
        ({"measured": {"reserve_bytes": "much"}}, "it is no number"),
        ({"measured": {"reserve_bytes": True}}, "it is no number"),
        ({"measured": {"update_flops_per_s": 10**400}}, "at most 1"),
    ],
)
def test_a_file_that_measured_nothing_for_a_plan_is_refused(proof, changes, reason):
    with pytest.raises(PlanError, match=reason):
        read_measured(proof(**changes))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.json cannot be read"):
        read_measured(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("name", "row"),
    [("NVIDIA H200, 143771 MiB, 580.1", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 PCIe", "h100"),
     ("NVIDIA GH200 480GB", None), ("NVIDIA RTX A1000", None)],
)  # fmt: skip
def test_a_gpu_is_found_in_the_table_by_its_drivers_name(name, row):
    found = hardware_of_gpu(name)
    assert (found and found.name) == row


def planned(capsys, *words):
    code = cli.main(["plan", str(RECIPE), "--gpus", "8", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_plans_with_what_was_measured(proof, capsys):
    path = proof()
    assumed = planned(capsys, "--hardware", "h200")[1]
    assert planned(capsys, "--measured", path)[1]["assumptions"]["train_flops"] == 0.25
    assert assumed["assumptions"]["train_flops"] != 0.25
    assert planned(capsys, "--measured", path, "--assume", "train_flops=0.5")[1]["assumptions"]["train_flops"] == 0.5
    assert cli.main(["plan", str(RECIPE), "--measured", path, "--hardware", "h100"]) == 2
    assert "was measured on h200" in capsys.readouterr().err
