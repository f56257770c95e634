"""What tests of several rooms share."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from paths import ROOT
from ranks import RankPool
from served import Servers
from small_runs import SmallRun, write_config, write_model
from tiny_models import tiny_llama

# Ranks and servers of tests share the cores: a second thread for tensors this small would mostly spin.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look through it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random tensors in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that a test runs a function on, as the ranks of a process group."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Real SGLang and vLLM servers, started when a test first asks for one."""
    started = Servers()
    yield started
    started.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that servers share, with heads that vLLM can compute on a CPU; not to be written to."""
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", tied=False, head_dim=32)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The quickstart's model, fetched as the quickstart fetches it; not to be written to."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    script = "import sys; from pathlib import Path; from smollm2 import fetch; fetch(Path(sys.argv[1]))"
    where = ROOT / "examples" / "quickstart"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=where, check=True, timeout=280)
    return folder


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a small run."""
    folder = tmp_path_factory.mktemp("small")
    return write_config(folder, write_model(folder / "model"))


@pytest.fixture(scope="session")
def undisturbed(small_config: Path) -> Path:
    """The output folder of a small run on one rank that nothing happened to; not to be written to."""
    output = small_config.with_name("undisturbed")
    SmallRun(small_config, output).wait()
    return output
