"""The recipes in examples: each parses, is sound, fits where its table says so, and is built as it is planned."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from model_folders import whole_folder
from paths import EXAMPLES

from clipo_megatron.checks.run import check
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.architecture import find_architecture
from clipo_megatron.planning.dry_run import build_ranks
from clipo_megatron.planning.hardware import HARDWARE, Assumptions
from clipo_megatron.planning.layouts import LayoutPlan, plan_layout, server_gpus_of
from clipo_megatron.planning.parameters import whole_count
from clipo_megatron.slurm.resources import Resources
from clipo_megatron.slurm.submit import submit
from clipo_megatron.weights.spec import ModelSpec

FOLDER = EXAMPLES / "recipes"
# Sums of the tensors that the published checkpoints hold.
PUBLISHED = {
    "qwen2.5-3b-gsm8k": 3_085_938_688,
    "qwen2.5-7b-math": 7_615_616_512,
    "llama-3.1-8b-math": 8_030_261_248,
    "deepseek-r1-distill-7b-math": 7_615_616_512,
    "deepseek-r1-distill-7b-math-64k": 7_615_616_512,
    "qwen2.5-32b-math": 32_763_876_352,
    "qwen2.5-32b-math-32k": 32_763_876_352,
    "llama-3.1-70b-math": 70_553_706_496,
    "qwen3-30b-a3b-math": 30_532_122_624,
}


@dataclass(frozen=True)
class Recipe:
    file: Path
    config: RunConfig
    spec: ModelSpec
    architecture: Path

    @property
    def plan(self) -> LayoutPlan:
        """As `clipo plan` judges it."""
        ranks = self.config.layout.requested_ranks
        servers = server_gpus_of(self.config, ranks)
        return plan_layout(
            self.config, self.spec, self.config.layout.replicas(ranks), servers, HARDWARE["h100"], Assumptions()
        )


@pytest.fixture(scope="module", params=PUBLISHED)
def recipe(request) -> Recipe:
    file = FOLDER / f"{request.param}.yaml"
    config = load(file)
    return Recipe(file, config, *find_architecture(config.model.path, file))


def test_there_is_a_test_for_every_recipe_and_an_architecture_for_every_model():
    files = sorted(FOLDER.glob("*.yaml"))
    assert sorted(file.stem for file in files) == sorted(PUBLISHED)
    named = {Path(yaml.safe_load(file.read_text())["model"]["path"]).name for file in files}
    assert {file.stem for file in (FOLDER / "architectures").iterdir()} == named


def test_the_model_is_the_published_one(recipe):
    assert recipe.config.name == recipe.file.stem
    assert whole_count(recipe.spec).total == PUBLISHED[recipe.file.stem]


def test_the_recipe_is_sound(recipe, tmp_path, monkeypatch):
    """Weights of zeros and one problem stand where the recipe says; all else of `clipo train --check` is real."""
    monkeypatch.chdir(tmp_path)
    model = Path(recipe.config.model.path)
    whole_folder(model, json.loads(recipe.architecture.read_text()))
    for number, source in enumerate(recipe.config.data.train + recipe.config.data.eval):
        Path(source.path).parent.mkdir(exist_ok=True)
        turn = {"role": "user", "content": f"What is {number} and one? Put the answer into \\boxed{{}}."}
        row = {"data_source": "math", "prompt": [turn], "reward_model": {"ground_truth": "1"}}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), source.path)
    check(recipe.config, ranks=recipe.config.layout.requested_ranks)
    plan, node = recipe.plan, HARDWARE["h100"].gpus_per_node
    nodes = Resources(nodes=plan.trainer_gpus // node, gpus_per_node=node)
    if not plan.colocated:
        nodes = replace(nodes, server_nodes=plan.server_gpus // node)
    job = submit(recipe.file, [], nodes, dry_run=True)
    assert (job.ranks, job.gpus) == (plan.trainer_gpus, plan.gpus)
    assert re.match(r"fits: [\d.]+ GB of 80 GB", job.remarks[0]), "the job finds what the plan found"
    assert f"{plan.time.total:.0f} s per step" in job.remarks[0]
    for path in (model, *(Path(source.path).parent for source in recipe.config.data.train)):
        shutil.rmtree(path, ignore_errors=True)
    elsewhere = submit(recipe.file, [], nodes, dry_run=True)  # as on a laptop, with nothing but the recipe
    assert elsewhere.remarks[0] == job.remarks[0] and elsewhere.script == job.script
    assert f"not on this machine: model.path = {model.absolute()}" in elsewhere.remarks
    with pytest.raises(ConfigError, match="there is no such folder"):
        submit(recipe.file, [], nodes)
    assert recipe.config.rollout.servers == plan.server_gpus // plan.server_tp, "all servers are waited for"


def row(name: str) -> list[str]:
    """The recipe's line in the table of the README."""
    (line,) = re.findall(rf"^\| `{re.escape(name)}\.yaml`.*\|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_layout_fits_as_the_table_says(recipe):
    plan = recipe.plan
    assert plan.fits, plan.problems
    context = f" x cp {plan.cp}" if plan.cp > 1 else ""
    layout = f"tp {plan.division.tp}{context} x pp {plan.division.pp} x dp {plan.dp}"
    layout += f", ep {plan.division.ep}" if plan.division.ep > 1 else ""
    where = "the same GPUs" if plan.colocated else f"{plan.server_gpus} more GPUs"
    servers = f"{where}, {plan.server_gpus // plan.server_tp} servers of {plan.server_tp}"
    fullest = max(memory.total for memory in plan.trainer) / 1e9
    assert row(recipe.file.stem)[1:] == [
        str(plan.gpus), layout, servers, f"{fullest:.1f}", f"{plan.time.total:.0f}"
    ]  # fmt: skip
    assert f"{plan.gpus} GPUs" in recipe.file.read_text().splitlines()[0]


def test_ranks_are_built_as_they_are_planned(recipe):
    """First and last rank of each stage; `clipo plan --dry-run` builds all of them, which takes a minute."""
    layout = recipe.config.layout
    width = layout.requested_ranks // layout.pp  # ranks of a stage
    ranks = [stage * width + rank for stage in range(layout.pp) for rank in sorted({0, width - 1})]
    for each in build_ranks(recipe.config, recipe.spec, ranks):
        assert each.equal, each
        assert each.planned_bytes == recipe.plan.trainer[each.stage].weights
