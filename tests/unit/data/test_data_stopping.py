"""What ends a response: the ids that transformers would stop at, and chat templates whose turns nothing ends."""

import json

import pytest
import torch
from tiny_models import tiny_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from clipo_megatron.checks.stopping import check_stopping
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import ModelConfig, RolloutConfig, RunConfig
from clipo_megatron.data.sources import DataError
from clipo_megatron.data.stopping import declared_ids, stop_ids, unended_turn

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISSING = object()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen2(tmp_path_factory.mktemp("stopping") / "model", layers=1)


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the model's folder whose files a test may change; its weights are the model's own."""
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file) if file.suffix == ".safetensors" else (
            tmp_path / file.name
        ).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    return tmp_path


def write(file, **changes):
    facts = json.loads(file.read_text()) if file.exists() else {}
    for name, value in changes.items():
        facts.pop(name, None)
        if value is not MISSING:
            facts[name] = value
    file.write_text(json.dumps(facts))


def tokenizer_of(folder, **changes):
    write(folder / "tokenizer_config.json", **changes)
    return AutoTokenizer.from_pretrained(folder)


# (eos_token_id of generation_config.json, or no file; of config.json; of its text_config) -> ids
PLACES = {
    "generation_config.json": (7, 5, None, (7,)),
    "several in generation_config.json": ([9, 7], 5, None, (7, 9)),
    "config.json where there is no other file": (None, 5, None, (5,)),
    "several in config.json": (None, [0, 2], None, (0, 2)),
    "config.json where the other file names none": ({}, [0, 2], None, (0, 2)),
    "the text model's settings": (None, MISSING, [11, 12], (11, 12)),
    "the model's own settings before its text model's": (None, 5, 11, (5,)),
    "the first token, whose id is 0": (None, 0, None, (0,)),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_end_is_found_where_transformers_finds_it(folder, case):
    generation, config, text, expected = PLACES[case]
    if generation is not None:
        write(folder / "generation_config.json", **({} if generation == {} else {"eos_token_id": generation}))
    write(folder / "config.json", eos_token_id=config, **({"text_config": {"eos_token_id": text}} if text else {}))
    assert tuple(sorted(declared_ids(folder))) == expected
    if generation != {}:  # there transformers never stops, and both servers do
        try:
            theirs = GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:
            theirs = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
            theirs = theirs.eos_token_id
        assert tuple(sorted(theirs if isinstance(theirs, list) else [theirs])) == expected


def test_the_loaded_model_stops_at_the_same_ids(folder):
    write(folder / "config.json", eos_token_id=[0, 2])
    ids = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert tuple(ids) == declared_ids(folder) == (0, 2)


def test_the_tokenizers_end_and_named_tokens_are_added(folder):
    write(folder / "config.json", eos_token_id=[0, 2])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 1
    assert stop_ids(folder, tokenizer) == (0, 1, 2)
    assert stop_ids(folder, tokenizer, ["a"]) == tuple(sorted({0, 1, 2, tokenizer.get_vocab()["a"]}))
    with pytest.raises(DataError, match=r"rollout.stop_tokens: '<\|nope\|>' is no single token .* it has <\|im_end\|>"):
        stop_ids(folder, tokenizer, ["<|nope|>"])


@pytest.mark.parametrize("named", ["x", [1, "x"], True, 1.5, {"id": 1}])
def test_an_end_that_is_no_token_id_is_refused(folder, named):
    write(folder / "config.json", eos_token_id=named)
    with pytest.raises(DataError, match=r"config.json has eos_token_id = .* is no token id. Write the number"):
        declared_ids(folder)


def test_ids_that_no_token_has_end_nothing(folder):
    write(folder / "generation_config.json", eos_token_id=-1)
    write(folder / "config.json", eos_token_id=[5, 100_000])
    assert declared_ids(folder) == (5,)


def test_the_local_engine_stops_where_config_json_says(folder):
    from clipo_megatron.flow import Prompt
    from clipo_megatron.rollout.engine import Request, SamplingParams
    from clipo_megatron.rollout.local.engine import LocalEngine

    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = LocalEngine(folder, dtype=torch.float32, device="cpu")
    engine.load_weights(model.state_dict().items(), version=0)
    prompt = Prompt("a/0", (), torch.tensor([5, 6, 7]), "a", "")

    def answer(ids):
        params = SamplingParams(max_new_tokens=12, temperature=0.0, stop_ids=ids)
        (group,) = engine.generate([Request(0, prompt)], params, deadline_s=60)
        return group.rollouts[0]

    free = answer(())
    end = int(free.tokens[3])
    write(folder / "config.json", eos_token_id=[0, end])
    stopped = answer(declared_ids(folder))
    assert (free.finish, stopped.finish) == ("length", "stop")
    assert stopped.tokens[-1] == end and stopped.tokens.numel() <= 4


# ---------------------------------------------------------------- the end of a turn


def problems(folder, **settings):
    config = RunConfig(model=ModelConfig(path=str(folder)), rollout=RolloutConfig(**settings))
    try:
        check_stopping(config, AutoTokenizer.from_pretrained(folder))
    except (ConfigError, DataError) as error:
        return [str(error)]
    return []


def test_a_turn_that_ends_with_the_end_of_text_is_sound(folder):
    assert problems(folder) == []


def other_end(folder):
    """The tokenizer's end is <|pad|>, and the template ends turns with <|im_end|>, as base models have it."""
    write(folder / "config.json", eos_token_id=2)
    return tokenizer_of(folder, eos_token="<|pad|>")


def test_a_turn_that_nothing_ends_is_refused_with_the_candidates(folder):
    other_end(folder)
    (problem,) = problems(folder)
    assert "nothing ends a turn" in problem and "rollout.max_new_tokens" in problem
    assert "the chat template ends a turn with <|im_end|>, at which nothing stops" in problem
    assert "rollout.stop_tokens=['<|im_end|>']" in problem


def test_a_named_token_ends_the_turn(folder):
    tokenizer = other_end(folder)
    assert problems(folder, stop_tokens=["<|im_end|>"]) == []
    assert stop_ids(folder, tokenizer, ["<|im_end|>"]) == (1, 2)
    assert problems(folder, stop_tokens=[]) == [], "an empty list says that this is meant"
    assert "no single token" in problems(folder, stop_tokens=["<|eot|>"])[0]


def test_generation_config_may_end_the_turn(folder):
    other_end(folder)
    write(folder / "generation_config.json", eos_token_id=[2, 1])
    assert problems(folder) == []


def test_no_end_anywhere_is_refused_with_the_candidates(folder):
    write(folder / "config.json", eos_token_id=None)
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}\n{% endfor %}")
    tokenizer_of(folder, eos_token=None)
    (problem,) = problems(folder)
    assert (
        "nothing ends a turn" in problem and "neither generation_config.json, config.json nor the tokenizer" in problem
    )
    assert "<|im_end|>" in problem


def test_an_end_of_turn_that_is_no_token_is_refused(folder):
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|turn_over|>"))
    (problem,) = problems(folder)
    assert "ends a turn with '<|turn_over|>', which is no single token" in problem


@pytest.mark.parametrize(
    "template",
    [
        "{% for turn in messages %}{{ turn.content }}\n\n{% endfor %}",  # plain text: the end of the text has to do
        "{{ raise_exception('no') }}",
        "{{ messages | length }}",
    ],
)
def test_templates_that_show_no_end_leave_it_to_the_end_of_text(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    assert unended_turn(AutoTokenizer.from_pretrained(folder), (1,)) is None


def test_check_contents_refuses_it_with_everything_else(folder):
    from small_runs import write_config

    from clipo_megatron.checks.contents import check_contents

    config = load(write_config(folder, folder), [f"train.output={folder / 'out'}"])
    check_contents(config)
    other_end(folder)
    with pytest.raises(ConfigError, match="nothing ends a turn"):
        check_contents(config)
