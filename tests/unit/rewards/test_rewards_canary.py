"""No answer and no row runs, in no sandbox either: an audit hook sees nothing while payloads are graded."""

import os
import random
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from grading import grade_many, worker_pids
from reasoning_gym.factory import DATASETS

from clipo_megatron.config.schema import GraderMode, GraderSandbox, RewardConfig
from clipo_megatron.rewards import GraderPool, grade
from clipo_megatron.rewards.answer import UnknownGraderError
from clipo_megatron.rewards.gym_scorers import SCORERS, evaluator_in
from clipo_megatron.rewards.pool import Answer

NAMES = sorted(set(DATASETS) - {"composite"})  # which is made of others, and has no rows of its own
RUNNING = ("exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.", "marshal.loads")
HARMLESS = ("os.listdir", "os.scandir", "os.walk")  # of a late import
NUMERALS = {"sympy", "Integer", "Float"}  # names in what math-verify lets SymPy evaluate, which are numerals alone
_seen: list[str] | None = None


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        _, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (mode and set(mode) & set("wax+")):
            _seen.append(f"open {arguments}")
    elif event.startswith(RUNNING) and event not in HARMLESS and not _is_import(event, arguments):
        _seen.append(f"{event} {arguments}"[:200])


def _is_import(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether code comes from an installed file, as that of a module does which is imported late, or is a numeral."""
    if event == "marshal.loads":
        return sys._getframe(2).f_code.co_filename.startswith("<frozen importlib")
    if event not in ("exec", "compile"):
        return False
    code, source = arguments[0], arguments[0].co_filename if event == "exec" else arguments[1]
    if source == "<string>" and event == "exec":
        return bool(code.co_names) and set(code.co_names) <= NUMERALS
    if source == "<string>" and isinstance(code, bytes):
        return code == b"from sympy import *" or re.fullmatch(rb"(Integer|Float) \('?[0-9.]+'? \)", code) is not None
    return isinstance(source, str) and (Path(source).is_file() or source.startswith("<frozen"))


sys.addaudithook(_notice)


@contextmanager
def watched() -> Iterator[list[str]]:
    """A list of what runs meanwhile."""
    global _seen
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


def payloads(folder: Path, port: int) -> list[str]:
    """Six forms of code that each write a file, connect, or read the environment's key."""
    key, walk = "__import__('os').environ['CLIPO_API_KEY']", "().__class__.__base__.__subclasses__()"
    return [
        f"__import__('os').system('touch {folder}/a')",
        f"open('{folder}/b', 'w').write({key})",
        f"__import__('socket').create_connection(('127.0.0.1', {port}), 1)",
        f"[c for c in {walk} if c.__name__ == 'Popen'][0](['touch', '{folder}/c'])",
        f"(lambda: exec(\"import os; os.mkdir('{folder}/d')\"))()",
        f"Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('{folder}/e', 'w')",
    ]


def replaced(value: Any, text: str) -> Any:
    """An entry whose every text is `text`."""
    if isinstance(value, dict):
        return {key: replaced(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(item, text) for item in value) if type(value) in (list, tuple) else value
    return text if isinstance(value, str) else value


def hostile_gradings(name: str, code: str) -> Iterator[tuple[str, str, dict]]:
    """Answer, ground truth and entry of gradings in which the answer, each text of the row, or all are code."""
    entry = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
    yield f"<answer>{code}</answer>", entry["answer"], entry
    yield entry["answer"], code, replaced(entry, code)
    yield code, code, replaced(entry, code)
    for field in entry["metadata"]:
        one = {**entry, "metadata": {**entry["metadata"], field: replaced(entry["metadata"][field], code)}}
        yield entry["answer"], entry["answer"], one


@pytest.mark.parametrize(
    "name", [name if name in SCORERS else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_no_answer_and_no_row_of_a_data_set_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPO_API_KEY", "secret")
    source = f"reasoning_gym/{name}"
    entry = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
    grade("warm", entry["answer"], data_source=source, extra=entry)  # imports what the scorer needs
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        for code in payloads(tmp_path, listener.getsockname()[1]):
            for answer, gold, row in hostile_gradings(name, code):
                with watched() as seen:
                    verdict = grade(answer, gold, data_source=source, extra=row)
                assert seen == []
                assert verdict in (0.0, 1.0, None)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["math", "reference", "choice", "number"])
def test_no_answer_of_the_other_modes_runs(mode, tmp_path):
    more = ["x._＿ⅽⅼass_＿", "sqrt.frac", "{0.__class__}", "\\input{/etc/passwd}", "\\frac{x.func}{2}", "1e5(x)(x)"]
    for warm in ("\\frac{2}{4}", "x+1", "\\sum_{k=1}^n k", "\\int x dx"):
        grade(f"\\boxed{{{warm}}}", "1+x", mode=mode)
    for code in [*payloads(tmp_path, 1), *more]:
        for answer, gold in ((code, "x+1"), (code, code), ("x+1", code)):
            with watched() as seen:
                grade(f"\\boxed{{{answer}}}", gold, mode=mode)
            assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_code_that_runs(tmp_path):
    with watched() as seen:
        eval("1 + 1")
        (tmp_path / "a").write_text("a")
        os.system("true")
    assert [line.split()[0] for line in seen] == ["compile", "exec", "open", "os.system"]


def test_every_scorer_that_evaluates_is_replaced():
    own = {name: reasoning_gym.get_score_answer_fn(name) for name in NAMES}
    assert len(own) >= 105
    assert {name for name, scorer in own.items() if evaluator_in(scorer)} == set(SCORERS)


def test_a_data_set_whose_scorer_evaluates_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(SCORERS, "countdown")
    from clipo_megatron.rewards.reasoning_gym import _scorer

    _scorer.cache_clear()
    with pytest.raises(UnknownGraderError, match=r"'reasoning_gym/countdown': .* uses parse_expr"):
        grade("1", "1", data_source="reasoning_gym/countdown")


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_verdicts_are_those_of_the_data_set(name):
    """Texts that the data set has made are graded by its own scorer too, which evaluates them."""
    made, own = reasoning_gym.create_dataset(name, size=2, seed=3), reasoning_gym.get_score_answer_fn(name)
    for entry, other in zip(made, [*[*made][1:], made[0]], strict=True):
        gold = entry["answer"]
        spellings = {gold, gold.replace(" ", ""), f"({gold})", f"{gold}1", other["answer"], gold.replace("+", "-", 1)}
        for answer in {spelling.strip() for spelling in spellings}:
            expected = float(own(answer, entry) >= 1.0 - 1e-9)
            if name == "puzzle24" and answer == other["answer"]:
                expected = 0.0  # made of other numbers than those given, which the data set does not see
            assert grade(answer, gold, data_source=f"reasoning_gym/{name}", extra=entry) == expected, answer
        assert grade(gold, gold, data_source=f"reasoning_gym/{name}", extra=entry) == 1.0


def hostile_answers(folder: Path) -> list[Answer]:
    """500 answers that are code, or long, deep or large, for every scorer that once evaluated, and three modes."""
    draw = random.Random(0)
    patches = ["modes.judge = lambda *a, **k: 1.0", "float.__eq__", "globals().update(judge=1)", "{0.__globals__}"]
    bombs = ["9**9**9", "(" * 5000 + "1" + ")" * 5000, "9" * 100_000, "[0]*10**10", "{}" * 50_000, "1+" * 2_000 + "1"]
    texts = [*payloads(folder, 1), *patches, *bombs, "numpy.ones(10**9)", "lambda: 1", "[x for x in range(10**9)]"]
    sources = [*(f"reasoning_gym/{name}" for name in sorted(SCORERS)), "math", "strict", "mmlu"]
    entries = {f"reasoning_gym/{name}": reasoning_gym.create_dataset(name, size=1, seed=1)[0] for name in SCORERS}
    answers = []
    for index in range(500):
        source, text = sources[index % len(sources)], draw.choice(texts)
        gold = entries[source]["answer"] if source in entries else "C" if source == "mmlu" else "x+1"
        response = draw.choice(("\\boxed{%s}", "<answer>%s</answer>")).replace("%s", text)
        answers.append(Answer(response, gold, source, entries.get(source)))
    return answers


def test_a_worker_judges_rightly_after_five_hundred_hostile_answers(tmp_path):
    entry = reasoning_gym.create_dataset("countdown", size=1, seed=1)[0]
    after = [
        *(Answer(f"\\boxed{{{answer}}}", "1/2", source) for answer in ("0.5", "3") for source in ("math", "mmlu")),
        *(Answer(answer, entry["answer"], "reasoning_gym/countdown", entry) for answer in (entry["answer"], "1+1")),
    ]
    config = RewardConfig(by_source={"strict": GraderMode.reference}, workers=1, sandbox=GraderSandbox.none)
    with GraderPool(config) as pool:
        before = [verdict.correct for verdict in grade_many(pool, after)]
        worker = worker_pids(pool)
        verdicts = grade_many(pool, hostile_answers(tmp_path))
        assert [verdict.correct for verdict in grade_many(pool, after)] == before
        assert worker_pids(pool) == worker
    assert before == [True, False, False, False, True, False]
    assert [verdict for verdict in verdicts if verdict.correct] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("coin_flip", ["0", "0.", "1", "nan"]),
        ("complex_arithmetic", ["nan", "-nan", "nan+nani", "nan + 1j"]),
        ("game_of_life_halting", ["x", "-", "0", "true or false"]),
        ("puzzle24", ["6*4*1*1", "10 + 3 + 4 + 7"]),
        ("gsm_symbolic", ["-{}"]),
        ("spell_backward", ["{} or 5", "{0}{0}"]),
        ("letter_jumble", ["{} or 5", "{} and more"]),
    ],
)
def test_no_answer_fools_every_problem_of_a_data_set(name, answers):
    """The data set's own scorer gives these the full score, most of them for each of its problems."""
    made, source = reasoning_gym.create_dataset(name, size=4, seed=11), f"reasoning_gym/{name}"
    own, fooled = reasoning_gym.get_score_answer_fn(name), 0
    for entry in made:
        gold = str(entry["answer"])
        assert grade(gold, gold, data_source=source, extra=entry) == 1.0
        for answer in (each.format(gold) for each in answers):
            fooled += own(answer, entry) >= 1.0 - 1e-9
            assert answer == gold or grade(answer, gold, data_source=source, extra=entry) == 0.0, (answer, gold)
    assert fooled, "the scorer is not fooled any more, so its data set needs no rule here"


@pytest.mark.parametrize("wrong", ["True", "False"])
def test_a_grid_halts_or_not(wrong):
    gold = {"True": "False", "False": "True"}[wrong]
    for answer, right in ((gold, 1.0), (gold.lower(), 1.0), (wrong, 0.0)):
        assert grade(answer, gold, data_source="reasoning_gym/game_of_life_halting") == right
