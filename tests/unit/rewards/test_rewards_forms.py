"""Mode `math` on thousands of rewritten gold answers: equal forms are accepted, unequal ones never."""

import random

import pytest
from answer_forms import Form, forms_of, made_golds
from paths import SHARED

from clipo_megatron.rewards import grade
from clipo_megatron.rewards.final_answer import gold_answer

DATA = SHARED / "data"
MOST_FALSE_REJECTS = 0.02


def judged(golds: list[str], draw: random.Random) -> tuple[list[Form], list[Form], list[Form]]:
    """All forms of the golds, the equal ones that are refused, and the unequal ones that are accepted."""
    forms = [form for gold in golds for form in forms_of(gold, draw)]
    wrong = [form for form in forms if grade(form.response, form.gold, data_source="my/set") != float(form.equal)]
    return forms, [form for form in wrong if form.equal], [form for form in wrong if not form.equal]


def hold(golds: list[str], draw: random.Random) -> None:
    forms, rejected, accepted = judged(golds, draw)
    assert len(forms) > 2500 and len(forms) > 10 * len(golds)
    assert accepted == []
    equal = sum(form.equal for form in forms)
    assert len(rejected) <= MOST_FALSE_REJECTS * equal, rejected[:20]


def test_forms_of_golds_of_every_kind():
    draw = random.Random(7)
    hold(made_golds(184, draw), draw)


@pytest.mark.skipif(not DATA.is_dir(), reason="the paper's data sets (../shared/data) are not here")
def test_forms_of_golds_of_the_data_sets():
    import pyarrow.parquet

    draw, golds = random.Random(8), set()
    for file in ("train_math75", "test_math", "test_gsm_p2"):
        table = pyarrow.parquet.read_table(DATA / f"{file}.parquet", columns=["reward_model"])
        golds |= {gold_answer(model["ground_truth"]) for model in table["reward_model"].to_pylist()}
    hold(draw.sample(sorted(gold for gold in golds if "boxed" not in gold), 220), draw)
