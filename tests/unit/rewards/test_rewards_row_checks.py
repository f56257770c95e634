"""Rows that no response could answer rightly are refused before the run: by form, grader, gold answer or mode."""

import json

import pytest
from model_folders import whole_folder

from clipo_megatron.cli import main as cli
from clipo_megatron.config.schema import GraderMode, RunConfig, SourceConfig
from clipo_megatron.data.asked import asked_forms
from clipo_megatron.data.prompt_table import RenderedRow
from clipo_megatron.data.sources import DataError
from clipo_megatron.rewards.row_checks import check_answers, source_problems

BOX = "\nPut your final answer within \\boxed{}."
TESTS = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})


def rows(
    truth: str, *, asks: str = BOX, before: str = "", source: str = "my/set", count: int = 3, first: int = 0
) -> list[RenderedRow]:
    """Rows whose prompt asks for an answer in their turn, or in what a template writes `before` it."""
    text = f"What is it?{asks}"
    forms = asked_forms(f"{before}\n{text}")
    turns = ({"role": "user", "content": text},)
    return [
        RenderedRow(f"set/{number}", turns, source, truth, {}, forms, False) for number in range(first, first + count)
    ]


def config(**reward) -> RunConfig:
    made = RunConfig()
    made.data.train = [SourceConfig(path="folder/set.jsonl", name="set")]
    for key, value in reward.items():
        setattr(made.reward, key, value)
    return made


SOUND = [
    ("42", BOX),
    ("So it is \\boxed{42}.", BOX),
    ("She has 6*7 = 42.\n#### 42", '\nOutput the final answer after "####".'),
    ("42", "\nThe last line of your response should be of the form Answer: $Answer (without quotes)."),
    ("42", "\nGive it in <answer> </answer> tags."),
    ("C", f"\nA. one\nB. two\nC. three{BOX}"),
    ("three", f"\nA. one\nB. two\nC. three{BOX}"),
    ("[1, 2]", BOX),
    ("\\text{Wednesday}", BOX),
    ("$\\boxed{(-2,18)}$ and $\\boxed{(8,38)}$", BOX),
]


@pytest.mark.parametrize(("truth", "asks"), SOUND)
def test_rows_whose_gold_answer_earns_its_reward_are_sound(truth, asks):
    check_answers(config(), rows(truth, asks=asks))


REFUSED = [
    ("42", "", "my/set", "asks for no form of the answer.*suffix"),
    (TESTS, BOX, "codecontests", "no grader for data source 'codecontests'"),
    (TESTS, BOX, "my/programs", "a JSON object with 'inputs', 'outputs'.*reward.by_source"),
    ('["42"]', BOX, "my/set", "a JSON list"),
    ("def answer(x):\n    return x + 1", BOX, "my/set", "program code"),
    ("word " * 100, BOX, "my/set", "a text of 100 words"),
    ("first line\nsecond line", '\nOutput the final answer after "####".', "my/set", "is not found right by mode math"),
]


@pytest.mark.parametrize(("truth", "asks", "source", "message"), REFUSED)
def test_rows_that_are_wrong_for_ever_are_refused_with_file_and_row(truth, asks, source, message):
    with pytest.raises(DataError, match=message) as caught:
        check_answers(config(), rows(truth, asks=asks, source=source))
    assert str(caught.value).startswith("folder/set.jsonl, row 0")


def test_what_is_rendered_before_the_turn_may_ask():
    check_answers(config(), rows("42", asks="", before="Put your final answer within \\boxed{}."))


def test_modes_that_need_no_form_and_modes_that_need_the_box():
    check_answers(config(mode=GraderMode.number), rows("42", asks=""))
    check_answers(config(by_source={"my/set": GraderMode.number}), rows("42", asks=""))
    with pytest.raises(DataError, match="holds no number"):
        check_answers(config(mode=GraderMode.number), rows("forty", asks=""))
    with pytest.raises(DataError, match="the only form that mode reference reads"):
        check_answers(config(mode=GraderMode.reference), rows("42", asks='\nAnswer after "####".'))


def test_one_row_of_tests_among_many_is_found():
    found = [
        *rows("42", count=2000),
        *rows(TESTS, count=1, first=2000),
        *rows("42", count=2000),
    ]
    with pytest.raises(DataError, match="row 2000"):
        check_answers(config(), found)


def test_a_key_of_by_source_that_no_row_has_is_a_problem():
    reward = config(by_source={"openai/gsm8": GraderMode.number}).reward
    problems = [str(problem) for problem in source_problems(reward, ["openai/gsm8k", "conrl/math"])]
    assert len(problems) == 1
    assert "no row has the data source 'openai/gsm8'" in problems[0] and "Did you mean 'openai/gsm8k'?" in problems[0]
    assert not [*source_problems(config(by_source={"openai/gsm8k": GraderMode.number}).reward, ["openai/gsm8k"])]


def test_check_refuses_what_no_response_can_answer(tmp_path, capsys):
    facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "vocab_size": 260}
    facts |= {"num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 8}
    model = whole_folder(tmp_path / "model", facts)
    row = {
        "data_source": "my/set",
        "prompt": [{"role": "user", "content": "6*7?"}],
        "reward_model": {"ground_truth": "42"},
    }
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: demo\nmodel: {{path: {model}}}\ndata: {{train: [{{path: {tmp_path}/set.jsonl}}]}}\n"
        f"train: {{output: {tmp_path}/out}}\n"
    )
    assert cli.main(["train", str(file), "--check"]) == 2
    assert "set.jsonl, row 0" in (shown := capsys.readouterr().err) and "suffix" in shown
    assert cli.main(["train", str(file), "--check", "reward.mode=number"]) == 0
    assert cli.main(["train", str(file), "--check", "reward.by_source={other: number}", "reward.mode=number"]) == 2
    assert "no row has the data source 'other'" in capsys.readouterr().err


def test_rows_of_a_generator_without_what_its_scorer_needs_are_refused():
    """Every response would be ungraded for ever: the scorer fails, whatever it is given."""
    with pytest.raises(DataError, match=r"row 0.*scorer of 'reasoning_gym/countdown' fail \(KeyError.*extra_info"):
        check_answers(config(), rows("1+1", asks="", source="reasoning_gym/countdown"))
    check_answers(config(), rows("42", asks="", source="reasoning_gym/chain_sum"))
    check_answers(config(), rows("42", asks="", source="reasoning_gym/nothing-of-that-name"))  # refused elsewhere
