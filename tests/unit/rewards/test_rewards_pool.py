"""The grader pool and its failures: answers that hang, killed and stopped workers, limits, a parent that dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from grading import grade_many, worker_pids
from progress import wait_until

from clipo_megatron.config.schema import GraderMode, RewardConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
from clipo_megatron.rewards import GraderPool
from clipo_megatron.rewards.pool import Answer
from clipo_megatron.rewards.process import GraderStartError

# Mode `reference` of the source "strict" lets SymPy evaluate this power, which takes hours.
STRICT = {"strict": GraderMode.reference}
HANGING = Answer("\\boxed{9999999**99999999}", "0.75", "strict")
RIGHT = Answer("\\boxed{\\frac{2}{4}}", "1/2", "math")
WRONG = Answer("\\boxed{4}", "5", "math")


def group(position: int, texts: list[str], gold: str = "5", source: str = "math") -> RolloutGroup:
    tokens = torch.tensor([1])
    prompt = Prompt(f"test/{position}", ({"role": "user", "content": "?"},), tokens, source, gold)
    rollouts = [
        Rollout(tokens, torch.zeros(1), text, finish="stop", versions=torch.zeros(1, dtype=torch.int64), sample=i)
        for i, text in enumerate(texts)
    ]
    return RolloutGroup(position, prompt, rollouts)


@pytest.fixture(scope="module")
def pool():
    config = RewardConfig(
        mode=GraderMode.auto,
        by_source=STRICT,
        workers=2,
        deadline_s=2.0,
        correct_reward=2.0,
        wrong_reward=-1.0,
    )
    with GraderPool(config) as pool:
        yield pool


@pytest.fixture(scope="module")
def number_pool():
    """A pool whose workers load no library, so that a new one costs little."""
    with GraderPool(RewardConfig(mode=GraderMode.number, workers=2, deadline_s=2.0)) as pool:
        yield pool


def test_groups_get_their_verdicts_and_rewards(pool):
    groups = [
        group(0, ["\\boxed{C}", "\\boxed{(c)}"], gold="C", source="cais/mmlu"),
        group(1, ["\\boxed{5}", "\\boxed{6}", "no box"]),
        group(2, ["7"], gold="7", source="reasoning_gym/chain_sum"),
    ]
    begun = [pool.grade(each) for each in groups]
    scored = [each.result() for each in begun]
    assert [each.group for each in scored] == groups and all(each.done() for each in begun)
    assert [[v.correct for v in each.verdicts] for each in scored] == [[True, True], [True, False, False], [True]]
    assert [v.reward for v in scored[1].verdicts] == [2.0, -1.0, -1.0]
    assert all(v.reason == "" and v.seconds >= 0 for each in scored for v in each.verdicts)


def test_modes_by_source_win_over_the_default(pool):
    halves = [Answer("\\boxed{\\frac{2}{4}}", "1/2", source) for source in ("math", "strict")]
    assert [v.correct for v in grade_many(pool, halves)] == [True, False]


def test_a_hang_is_killed_counted_and_ungraded(pool):
    pool.take_statistics()
    before = set(worker_pids(pool))
    verdicts = grade_many(pool, [RIGHT, HANGING, WRONG])
    assert [v.correct for v in verdicts] == [True, None, False]
    assert "no verdict within 2 s" in verdicts[1].reason
    assert verdicts[1].reward == 0.0
    assert 2.0 <= verdicts[1].seconds < 30.0
    statistics = pool.take_statistics()
    assert (statistics.answers, statistics.ungraded, statistics.timeouts, statistics.deaths) == (3, 1, 1, 0)
    assert grade_many(pool, [RIGHT, WRONG])[0].correct is True
    assert len(set(worker_pids(pool)) & before) == 1


def test_a_worker_killed_while_it_grades_leaves_that_answer_ungraded():
    with GraderPool(RewardConfig(by_source=STRICT, workers=1, deadline_s=600.0)) as pool:
        # The worker is up and the libraries of both modes are loaded: from here on, CPU time is grading.
        grade_many(pool, [RIGHT, Answer("\\boxed{0.75}", "0.75", "strict")])
        worker = psutil.Process(worker_pids(pool)[0])
        idle_s = sum(worker.cpu_times()[:2])
        verdict = pool.submit_answer(HANGING)
        wait_until(lambda: sum(worker.cpu_times()[:2]) > idle_s + 0.3, "the worker at work")
        worker.kill()
        assert verdict.result().correct is None
        assert verdict.result().reason == "grader process was ended by SIGKILL"
        assert [v.correct for v in grade_many(pool, [RIGHT, WRONG])] == [True, False]
        statistics = pool.take_statistics()
        assert (statistics.answers, statistics.ungraded, statistics.deaths) == (5, 1, 1)


def test_workers_killed_while_idle_are_replaced_and_inherit_no_sockets(number_pool):
    grade_many(number_pool, [RIGHT] * 4)
    before = worker_pids(number_pool)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert [v.correct for v in grade_many(number_pool, [RIGHT, WRONG] * 4)] == [True, False] * 4
        assert not set(worker_pids(number_pool)) & set(before)
        for pid in worker_pids(number_pool):
            targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            assert not [target for target in targets if target.startswith("socket:")]


def test_a_stopped_worker_is_replaced_and_its_answer_graded(number_pool):
    grade_many(number_pool, [RIGHT] * 8)
    stopped = worker_pids(number_pool)[0]
    os.kill(stopped, signal.SIGSTOP)
    assert [v.correct for v in grade_many(number_pool, [RIGHT, WRONG])] == [True, False]
    wait_until(lambda: not psutil.pid_exists(stopped), "the stopped worker gone")


def test_megabytes_and_odd_characters_arrive_whole(pool):
    long = "x" * 1_000_000
    answers = [
        Answer(long + "\\boxed{5}", "5", "math"),
        Answer("\x00\ud800\\boxed{5}", "5", "math"),
        Answer("\\boxed{" + long + "}", "5", "math"),
        Answer("\\boxed{5}", long + "\\boxed{5}", "math"),
    ]
    assert [v.correct for v in grade_many(pool, answers)] == [True, True, False, True]


def test_an_exception_in_the_grader_is_ungraded_with_its_reason(pool):
    verdict = grade_many(pool, [Answer("COLD,CORD", "COLD", "reasoning_gym/word_ladder")])[0]
    assert verdict.correct is None
    assert "KeyError" in verdict.reason


def test_an_entry_that_json_cannot_carry_is_ungraded(pool):
    answers = [Answer("7", "7", "reasoning_gym/chain_sum", {("a", "tuple"): 1}), RIGHT]
    verdicts = grade_many(pool, answers)
    assert [v.correct for v in verdicts] == [None, True]
    assert "TypeError" in verdicts[0].reason
    assert grade_many(pool, [Answer("\\boxed{5}", "5", "math", {("a", "tuple"): 1})] * 4)[0].correct is True


def test_a_data_source_without_grader_stops_the_run(pool):
    with pytest.raises(ValueError, match="no data set 'nothing'"):
        grade_many(pool, [Answer("1", "1", "reasoning_gym/nothing")])
    with pytest.raises(ValueError, match="no data set 'nothing'"):
        pool.grade(group(0, ["1"], source="reasoning_gym/nothing")).result()
    assert grade_many(pool, [RIGHT])[0].correct is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_every_process_of_a_job_ends_no_grader(number_pool, number):
    grade_many(number_pool, [RIGHT] * 4)
    before = worker_pids(number_pool)
    for pid in before:
        os.kill(pid, number)
    assert all(verdict.correct for verdict in grade_many(number_pool, [RIGHT] * 4))
    assert worker_pids(number_pool) == before


def test_memory_is_limited():
    hungry = Answer("\\boxed{1<<99999999999}", "0.75", "math")  # an integer of 12 GB
    with GraderPool(RewardConfig(mode=GraderMode.reference, workers=1), memory_bytes=1 << 30) as pool:
        verdict = grade_many(pool, [hungry])[0]
        assert verdict.correct is None
        assert "MemoryError" in verdict.reason
        before = worker_pids(pool)
        assert grade_many(pool, [WRONG])[0].correct is False
        assert worker_pids(pool) != before  # a fresh process, not one that ran out of memory


def test_close_kills_the_workers_and_settles_what_waits():
    pool = GraderPool(RewardConfig(by_source=STRICT, workers=1, deadline_s=30.0))
    grade_many(pool, [RIGHT])
    waiting = [pool.submit_answer(HANGING), pool.submit_answer(RIGHT)]
    pids = worker_pids(pool)
    begun = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - begun < 30.0
    assert [future.result(1.0).correct for future in waiting] == [None, None]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit_answer(RIGHT)


PARENT = """
import sys, time
from clipo_megatron.config.schema import GraderMode, RewardConfig
from clipo_megatron.rewards.pool import Answer, GraderPool
pool = GraderPool(RewardConfig(mode=GraderMode.reference, workers=2, deadline_s=600.0))
answers = [pool.submit_answer(Answer("\\\\boxed{1}", "1", "math")) for _ in range(2)]
assert [answer.result().correct for answer in answers] == [True, True]
pool.submit_answer(Answer("\\\\boxed{9999999**99999999}", "0.75", "math"))
print(*(process.pid for process in pool._processes), flush=True)
time.sleep(600)
"""  # no __main__ guard: workers must not import the caller's script


def test_no_worker_outlives_its_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()

    def gone():
        return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)

    wait_until(gone, "the orphans' end")


@pytest.mark.parametrize(("setting", "value"), [("workers", 0), ("deadline_s", 0.0)])
def test_a_pool_that_cannot_grade_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"reward.{setting}"):
        GraderPool(RewardConfig(**{setting: value}))


@pytest.mark.parametrize("breaks", ["the start", "the interpreter"])
def test_graders_that_cannot_start_end_the_run_with_the_reason(monkeypatch, breaks):
    """Else every answer would be ungraded, which an evaluation reports as a model that solves nothing."""
    if breaks == "the start":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    else:
        monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with GraderPool(RewardConfig(mode=GraderMode.number, workers=2)) as pool:
        begun = pool.grade(group(0, ["5", "6"]))
        with pytest.raises(GraderStartError, match="no grader process begins to judge"):
            begun.result()


def test_graders_that_could_start_once_cost_an_answer_its_verdict_alone(monkeypatch):
    with GraderPool(RewardConfig(mode=GraderMode.number, workers=1)) as pool:
        assert pool.submit_answer(Answer("5", "5", "math")).result().correct
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        os.kill(pool._processes[0].pid, signal.SIGKILL)
        assert pool.submit_answer(Answer("5", "5", "math")).result().correct is None
        monkeypatch.undo()
        assert pool.submit_answer(Answer("5", "5", "math")).result().correct
