"""The sandbox alone suffices: a grader that runs every answer as code does no harm in it, and does without it."""

import json
import os
import socket
import subprocess
import sys

import pytest

from clipo_megatron.checks.grading import grading_problems
from clipo_megatron.config.schema import GraderMode, GraderSandbox, RewardConfig
from clipo_megatron.data.asked import NOTHING
from clipo_megatron.rewards import sandbox

# A real worker whose grader of numbers is replaced by one that trusts its answers.
EVALUATING_WORKER = """
from clipo_megatron.rewards import modes, worker

def evaluate(response, ground_truth, **_):
    scope = {}
    exec(response, scope)
    return float(bool(scope.get("harm", True)))

modes._GRADERS["number"] = evaluate
worker.main()
"""
SECRET = "the-secret-of-this-test"
needs_all_layers = pytest.mark.skipif(
    bool(sandbox.missing(sandbox.layers_of_this_machine())), reason="this machine offers no Landlock or no seccomp"
)


def attacks(folder, port: int) -> dict[str, str]:
    """Programs that each do one thing that no grader may do; `harm` says whether it could."""
    victim, parent = str(folder / "victim"), os.getpid()
    return {
        "writes a file": f"open({str(folder / 'written')!r}, 'w').write('x')",
        "writes by a descriptor": f"import os; os.open({str(folder / 'opened')!r}, os.O_CREAT | os.O_RDONLY)",
        "empties a file": f"import os; os.truncate({victim!r}, 0)",
        "deletes a file": f"import os; os.unlink({victim!r})",
        "renames a file": f"import os; os.rename({victim!r}, {victim!r} + '2')",
        "changes rights": f"import os; os.chmod({victim!r}, 0)",
        "makes a folder": f"import os; os.mkdir({str(folder / 'made')!r})",
        "reads a file of the user": f"open({victim!r}).read()",
        "reads the run's environment": f"harm = {SECRET!r} in open('/proc/{parent}/environ').read()",
        "finds the secret in its own": f"import os; harm = {SECRET!r} in repr(os.environ)",
        "lists a folder": f"import os; harm = 'victim' in os.listdir({str(folder)!r})",
        "connects": f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
        "opens a socket": "import socket; socket.socket(socket.AF_UNIX)",
        "runs a program": f"import subprocess; subprocess.run(['/bin/touch', {str(folder / 'touched')!r}], check=True)",
        "runs a shell": "import os; harm = os.system('true') == 0",
        "becomes a program": "import os; os.execv('/bin/true', ['true'])",
        "forks": "import os; os.fork() or os._exit(0)",
        "signals the run": f"import os; os.kill({parent}, 0)",
        "signals the run as a pipe's owner": f"import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {parent})",
        "limits the run": f"import resource as r; r.prlimit({parent}, r.RLIMIT_CORE, (0, 0))",
        "outlives the run": "import ctypes; harm = ctypes.CDLL(None).prctl(1, 0) == 0",
        "raises its limits": "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (1 << 40, 1 << 40))",
        "keeps a file in memory": "import os; os.memfd_create('x')",
        "traces the run": f"import ctypes; harm = ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0",
        "leaves its folder": "import os; os.chdir('/')",
    }


def run(choice: GraderSandbox, programs: dict[str, str], monkeypatch) -> dict[str, dict]:
    """The worker's reply to each program, and under "" the layers that it reports."""
    monkeypatch.setenv("CLIPO_API_KEY", SECRET)
    answer = {"ground_truth": "", "data_source": "", "extra": None, "asked": NOTHING.as_json()}
    requests = [
        json.dumps({"mode": "number", "deadline_s": 60.0, "answer": {**answer, "response": program}}) + "\n"
        for program in programs.values()
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", EVALUATING_WORKER, str(2 << 30), str(os.getpid()), choice.value],
        input="".join(requests),
        capture_output=True,
        text=True,
        env=sandbox.environment(),
        cwd="/",
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(replies) == 2 * len(programs), done.stderr[-2000:]
    return {"": replies[0], **dict(zip(programs, replies[1::2], strict=True))}


def harmed(replies: dict[str, dict]) -> list[str]:
    return [name for name, reply in replies.items() if reply["event"] == "graded" and reply["score"] == 1.0]


@needs_all_layers
def test_an_answer_that_is_run_as_code_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        replies = run(GraderSandbox.auto, attacks(tmp_path, listener.getsockname()[1]), monkeypatch)
        assert harmed(replies) == []
        with pytest.raises(BlockingIOError):  # nobody has connected
            listener.accept()
    assert set(sandbox.NEEDED) <= set(replies[""]["layers"])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("victim", "kept")]


def test_without_the_sandbox_the_same_answers_do_harm(tmp_path, monkeypatch):
    """The programs of the test before are able to do what they try."""
    (tmp_path / "victim").write_text("lost")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        able = ("writes a file", "reads a file of the user", "connects", "runs a program", "signals the run")
        programs = attacks(tmp_path, listener.getsockname()[1])
        replies = run(GraderSandbox.none, {name: programs[name] for name in able}, monkeypatch)
    assert replies[""]["layers"] == ["limits"]
    assert harmed(replies) == list(able)
    assert (tmp_path / "written").exists() and (tmp_path / "touched").exists()


def test_a_worker_finds_no_secret_even_without_the_sandbox(tmp_path, monkeypatch):
    program = {"finds the secret in its own": attacks(tmp_path, 0)["finds the secret in its own"]}
    assert harmed(run(GraderSandbox.none, program, monkeypatch)) == []


def test_a_grader_still_computes_in_the_sandbox(monkeypatch):
    programs = {
        "imports late": "import sympy, math_verify, zoneinfo, decimal; harm = sympy.sqrt(8) == 2 * sympy.sqrt(2)",
        "has threads": "import threading; t = threading.Thread(target=int); t.start(); t.join()",
        "tells the time": "import time; time.sleep(0.001); harm = time.localtime().tm_year > 2000",
        "draws": "import os, random; random.seed(); harm = len(os.urandom(8)) == 8",
    }
    if os.getuid() != 0:
        del programs["has threads"]  # the limit of processes counts threads too, but for root
    assert harmed(run(GraderSandbox.auto, programs, monkeypatch)) == list(programs)


def test_a_run_that_requires_the_sandbox_is_refused_where_it_lacks(monkeypatch):
    config = RewardConfig(mode=GraderMode.number, sandbox=GraderSandbox.required)
    monkeypatch.setattr(sandbox, "layers_of_this_machine", lambda: ("limits", "seccomp"))
    problem = str(*grading_problems(config, {"math": 1}))
    assert problem.startswith("reward.sandbox = required: graders run without Landlock")
    assert "reward.sandbox to auto" in problem
    config.sandbox = GraderSandbox.auto
    assert list(grading_problems(config, {"math": 1})) == []
    monkeypatch.setattr(sandbox, "layers_of_this_machine", lambda: sandbox.NEEDED)
    config.sandbox = GraderSandbox.required
    assert list(grading_problems(config, {"math": 1})) == []
