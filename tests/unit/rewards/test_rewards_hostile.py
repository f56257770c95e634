"""The pool survives three hundred answers that hang, crash or flood a grader."""

import random
import time

import pytest
from grading import grade_many

from clipo_megatron.config.schema import GraderMode, RewardConfig
from clipo_megatron.data.asked import Asked
from clipo_megatron.rewards import GraderPool, grade
from clipo_megatron.rewards.final_answer import stated_answers
from clipo_megatron.rewards.pool import Answer

DEADLINE_S = 1.0
# Machines that run the tests are shared: the transfer of an answer and scheduling get this much on top.
SLACK_S = 20.0
GOLDS = ("3", "\\frac{3}{4}", "x^2+1", "0.75", "(1, 2)", "C")
COUNT = 300
HANGING_EVERY = 20  # a hang costs its deadline and a new process, so most answers only flood; each kind comes twice


def hostile_answers() -> list[str]:
    """300 responses; the sizes are drawn with a fixed seed."""
    draw = random.Random(0)

    def nested(opening: str, closing: str) -> str:
        return opening * draw.choice((50, 500, 50_000)) + "1" + closing * draw.choice((50, 500, 50_000))

    hanging = (
        lambda: f"{draw.randrange(10**6, 10**7)}**{draw.randrange(10**7, 10**8)}",
        lambda: "^".join(["9"] * draw.choice((3, 12))),
        lambda: "9^{" * draw.choice((3, 12)) + "9" + "}" * draw.randrange(0, 12),
        lambda: nested(*draw.choice((("{", "}"), ("(", ")"), ("\\frac{1}{", "}"), ("\\sqrt{", "}")))),
        lambda: f"{10**9}" + "!" * draw.randrange(1, 4),
        lambda: "+".join(draw.choice(("1", "x", "\\frac12")) for _ in range(20_000)),
        lambda: draw.choice("19x(") * 10**6,
    )
    exotic = (0x1D7D8, 0x202E, 0x0661, 0x1F600, 0xFF11)  # digits of other alphabets, right-to-left marks, emoji
    code = (
        "__import__('os')._exit(3)",
        "exec('while 1: pass')",
        "().__class__.__base__.__subclasses__()",
        "import os; os.kill(os.getpid(), 9)",
        "\\input{/etc/passwd}",
        "[x for x in iter(int, 1)]",
        "\\def\\x{\\x}\\x",
    )
    flooding = (
        lambda: (
            draw.choice(("{", "}", "((", "\\left(", "\\frac{", "\\sqrt{", "\\begin{pmatrix}")) * draw.randrange(1, 9)
        ),
        lambda: "}" * draw.choice((50, 500, 50_000)),
        lambda: draw.choice(("word ", "\\foo ", "3 ", "\\text{a}")) * draw.choice((100, 200_000)),
        lambda: "".join(chr(draw.choice(exotic) + draw.randrange(9)) for _ in range(99)),
        lambda: draw.choice(("\x00", "\ud800", "3\x00", "\udfff3", "\x1b[2J")) * draw.choice((1, 1000)),
        lambda: draw.choice(code),
        lambda: "1" * draw.choice((4301, 100_000)) + draw.choice(("", "/7", ".5", "%")),
        lambda: draw.choice(
            ("\\frac", "\\sqrt", "\\frac1", "^", "_", "=", "\\", "1/0", "0^{-1}", "nan", "inf", "1e999")
        ),
    )
    wrappers = ("\\boxed{%s}", "<think></think>\\boxed{%s}", "\\boxed{\\boxed{%s}", "\\boxed{%s")
    return [
        draw.choice(wrappers)
        % (draw.choice(flooding) if index % HANGING_EVERY else hanging[index // HANGING_EVERY % len(hanging)])()
        for index in range(COUNT)
    ]


def test_three_hundred_hostile_answers_leave_the_pool_alive():
    answers = [
        Answer(response, gold, "mmlu" if gold == "C" else "math" if index % HANGING_EVERY else "strict")
        for index, response in enumerate(hostile_answers())
        for gold in [GOLDS[index // HANGING_EVERY % len(GOLDS)]]
    ]
    modes = {"strict": GraderMode.reference}  # SymPy evaluates there; mode `math` ends by itself
    with GraderPool(RewardConfig(mode=GraderMode.auto, by_source=modes, workers=2, deadline_s=DEADLINE_S)) as pool:
        verdicts = grade_many(pool, answers)
        statistics = pool.take_statistics()
        after = grade_many(pool, [Answer("\\boxed{\\frac{2}{4}}", "0.5", "math"), Answer("\\boxed{4}", "3", "math")])

    assert [verdict.correct for verdict in after] == [True, False]
    assert len(verdicts) == statistics.answers == COUNT
    assert [ascii(a.response[:80]) for a, v in zip(answers, verdicts, strict=True) if v.correct] == []
    for verdict in verdicts:
        assert verdict.seconds < 2 * DEADLINE_S + SLACK_S
        assert (verdict.correct is None) == bool(verdict.reason)
    assert statistics.ungraded == sum(verdict.correct is None for verdict in verdicts)
    assert 1 <= statistics.timeouts < 100  # some do hang; most are plainly wrong, and are called so


@pytest.mark.parametrize("part", ["so so ", "and ", "1!", "%", "\\%", "10^", "(", "x=", "1,", "\\text{"])
@pytest.mark.parametrize("mode", ["math", "choice", "number"])
def test_an_answer_that_nests_without_end_is_wrong(mode, part):
    """It was ungraded, which costs nothing, so that it paid to give such answers in place of wrong ones."""
    for gold in ("5", "C"):
        assert grade(f"\\boxed{{{part * (2000 // len(part))}}}", gold, data_source="my/set", mode=mode) == 0.0


def test_many_tags_take_time_in_proportion():
    """Each tag that opens was searched for its end through all the text."""
    spent = []
    for count in (2_000, 20_000):
        began = time.process_time()
        for _ in range(3):
            assert stated_answers("</answer>" + "<answer>" * count, Asked(("<answer>",))) == []
            assert stated_answers("<answer>" * count + "5</answer>", Asked(("<answer>",))) != []
        spent.append(time.process_time() - began)
    assert spent[1] < 40 * spent[0], "ten times the text takes about ten times as long"
