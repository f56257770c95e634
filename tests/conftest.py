"""The tiers of the tests, and the fixtures that tests of several subpackages share."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from progress import Watchdog, begin_session
from ranks import RankPool
from served import Servers
from small_runs import once, undisturbed_run, write_config, write_model
from tiny_models import tiny_llama

# Tests, their ranks and their servers share the cores: a second thread for tensors this small would mostly spin. On two
# busy cores an SGLang server with two threads takes ten times as long for a token as with one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# Folders of tests, the slowest first: that is the order in which worker processes take them up.
TIERS = ("soak", "cluster", "engines", "runs", "ranks", "unit")
ONLY_FULL = ("soak", "cluster")
ONE_WORKER = ("soak", "cluster", "engines")  # whose servers are started once
SERVERS = pytest.StashKey[Servers]()
STARTING_PROCESSES = {"ranks", "servers", "undisturbed", "undisturbed_pp2"}


def pytest_configure(config: pytest.Config) -> None:
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup, and in a shell's background: tests send these
            signal.signal(number, handler)
    for tier in TIERS:
        config.addinivalue_line("markers", f"{tier}: a test in tests/{tier}; set by the folder")
    config.addinivalue_line("markers", "full: left out of `make test`; so are all of " + " and ".join(ONLY_FULL))
    begin_session()
    config.pluginmanager.register(Watchdog(config))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test with the tier that its folder names."""
    tier = tier_of(item)
    item.add_marker(tier)
    if tier in ONLY_FULL:
        item.add_marker("full")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if tier == "unit" and (found := STARTING_PROCESSES & (set(item.fixturenames) - set(parameters))):
        raise pytest.UsageError(f"{item.nodeid} asks for {', '.join(found)}: it belongs into another tier")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let worker processes begin with the tiers that take longest."""
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: TIERS.index(tier_of(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand worker processes whole files, and whole tiers where tests share servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            tier = file.removeprefix("tests/").partition("/")[0]
            return tier if tier in ONE_WORKER else file

    return ByFile(config, log)


def tier_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_finish() -> None:
    """Spare the garbage collector all that has been imported, which stays until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give a test the same random tensors each time it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that a test runs a function on, as the ranks of a process group."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Real SGLang and vLLM servers, started when a test first asks for one."""
    started = Servers()
    request.config.stash[SERVERS] = started
    yield started
    started.close()


@pytest.hookimpl(trylast=True)  # after the fixtures of the test are torn down
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Servers are not kept beyond their tier: they would take memory and time from all that follows."""
    if SERVERS in item.config.stash and (nextitem is None or tier_of(nextitem) != tier_of(item)):
        item.config.stash[SERVERS].close()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all worker processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that servers share, with heads that vLLM can compute on a CPU; not to be written to."""
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", tied=False, head_dim=32)


@pytest.fixture(scope="session")
def smollm2(shared_folder: Path) -> Path:
    """The quickstart's model, fetched as the quickstart fetches it; not to be written to."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    script = "import sys; from pathlib import Path; from smollm2 import fetch; fetch(Path(sys.argv[1]))"
    where = ROOT / "examples" / "quickstart"
    with once(shared_folder / "smollm2") as missing:
        if missing:
            subprocess.run([sys.executable, "-c", script, str(folder)], cwd=where, check=True)
    return folder


@pytest.fixture(scope="session")
def small_config(shared_folder: Path) -> Path:
    """The configuration file of a small run."""
    folder = shared_folder / "small"
    with once(folder) as missing:
        if missing:
            folder.mkdir()
            write_config(folder, write_model(folder / "model"))
    return folder / "small.yaml"


@pytest.fixture(scope="session")
def undisturbed(small_config: Path) -> Path:
    """The output folder of a small run on one rank that nothing happened to; not to be written to.

    It is started cold, so runs that are equal to it do not depend on the seed of string hashes.
    """
    return undisturbed_run(small_config, "undisturbed", cold=True)


@pytest.fixture(scope="session")
def undisturbed_pp2(small_config: Path) -> Path:
    """The output folder of the same run on two pipeline stages; not to be written to."""
    return undisturbed_run(small_config, "undisturbed_pp2", "layout.pp=2")
