"""What `train` refuses before its first step, `train --check` and `submit` refuse too, in the same words.

Each case spoils one thing of a run that is sound. Three commands are given the result in this process, with programs in
the place of Slurm's, and with a trap where ranks would be built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from model_folders import TEMPLATE, sparse_weights, tensors_of, whole_folder, write_tokenizer

from clipo_megatron.cli import main as cli

FACTS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 260,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
PLUGIN = """
from dataclasses import dataclass
from clipo_megatron.algorithms.hook import Hook, MethodOptions

@dataclass
class Options(MethodOptions):
    weight: float = 1.0

class Mine(Hook):
    options_class = Options
{body}
"""


class Case:
    """A run in a folder of its own, sound until something of it is spoilt."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.rows = folder, folder / "model", folder / "train.jsonl"
        whole_folder(self.model, FACTS)
        self.write_rows([self.row(number) for number in range(4)])
        self.settings: dict[str, Any] = {
            "name": "case",
            "model": {"path": str(self.model)},
            "data": {"train": [{"path": str(self.rows)}], "prompts_per_step": 2},
            "train": {"output": str(folder / "out"), "steps": 3},
            "algorithm": {},
            "reward": {},
        }

    @staticmethod
    def row(number: int, **fields: Any) -> dict[str, Any]:
        turn = {"role": "user", "content": f"What is {number} and one? Put the answer into \\boxed{{}}."}
        return {"data_source": "math", "prompt": [turn], "reward_model": {"ground_truth": str(number + 1)}, **fields}

    def write_rows(self, rows: list[Any]) -> None:
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, **facts: Any) -> None:
        """Other facts in config.json; the weights stay."""
        (self.model / "config.json").write_text(json.dumps({**FACTS, **facts}))

    def tensors(self, **changed: tuple[str, tuple[int, ...]] | None) -> None:
        """Other tensors in the weights, None for none; names have `__` for dots."""
        file = self.model / "model.safetensors"
        found = tensors_of(file) | {name.replace("__", "."): each for name, each in changed.items()}
        sparse_weights(file, {name: each for name, each in found.items() if each is not None})

    def template(self, text: str) -> None:
        (self.model / "chat_template.jinja").write_text(text)

    def tokenizer(self, **settings: Any) -> None:
        """Other settings of the tokenizer, and no file of a chat template."""
        file = self.model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        (self.model / "chat_template.jinja").unlink()

    def parquet(self, rows: list[dict[str, Any]], **columns: Any) -> None:
        """Rows in a parquet file, with further columns."""
        file, table = self.folder / "train.parquet", pyarrow.Table.from_pylist(rows)
        for name, values in columns.items():
            table = table.append_column(name, pyarrow.array(values))
        pyarrow.parquet.write_table(table, file)
        self.settings["data"]["train"] = [{"path": str(file)}]

    def plugin(self, text: str, name: str = "Mine", **options: Any) -> None:
        (self.folder / "mine.py").write_text(text)
        self.settings["algorithm"]["plugins"] = [{"name": f"{self.folder}/mine.py:{name}", "options": options}]

    def source(self, **fields: Any) -> None:
        self.settings["data"]["train"][0] = {**self.settings["data"]["train"][0], **fields}

    def file(self) -> str:
        path = self.folder / "run.yaml"
        path.write_text(json.dumps(self.settings))
        return str(path)


def _set(section: str, **values: Any) -> Callable[[Case], None]:
    return lambda case: case.settings.setdefault(section, {}).update(values)


def _facts(**facts: Any) -> Callable[[Case], None]:
    return lambda case: case.config(**facts)


def _rope(**fields: Any) -> Callable[[Case], None]:
    return _facts(rope_scaling=fields)


def _cut(case: Case) -> None:
    file = case.model / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def _index(case: Case) -> None:
    (case.model / "model.safetensors").rename(case.model / "model-00001-of-00002.safetensors")
    names = {name: "model-00002-of-00002.safetensors" for name in ("model.norm.weight",)}
    (case.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _bin(case: Case) -> None:
    (case.model / "model.safetensors").rename(case.model / "pytorch_model.bin")


def _other_output_layer(case: Case) -> None:
    """A tied model whose output layer is not its embedding: the last byte of the file is another one."""
    case.config(tie_word_embeddings=True)
    file = case.model / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size - 1)
        opened.write(b"\1")


def _named_templates(case: Case) -> None:
    case.tokenizer(chat_template=[{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}])


def _template_folder(case: Case) -> None:
    (case.model / "additional_chat_templates").mkdir()
    (case.model / "chat_template.jinja").rename(case.model / "additional_chat_templates" / "rag.jinja")


def _template_json(case: Case) -> None:
    (case.model / "chat_template.jinja").unlink()
    (case.model / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _no_template(case: Case) -> None:
    write_tokenizer(case.model, None)
    (case.model / "chat_template.jinja").unlink()


def _small_vocabulary(case: Case) -> None:
    whole_folder(case.model, {**FACTS, "vocab_size": 50})


def _all_held_out(case: Case) -> None:
    case.settings["data"]["eval"] = [{"path": str(case.rows), "name": "same"}]


def _damaged_parquet(case: Case) -> None:
    (case.folder / "train.parquet").write_bytes(b"PAR1 and nothing more")
    case.settings["data"]["train"] = [{"path": str(case.folder / "train.parquet")}]


def _without(field: str) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        rows = [case.row(number) for number in range(3)]
        del rows[2][field]
        case.write_rows(rows)

    return spoil


def _wrong_critic(case: Case) -> None:
    whole_folder(case.folder / "critic", FACTS)
    sparse_weights(case.folder / "critic" / "model.safetensors", {"model.norm.weight": ("BF16", (16,))})
    case.settings["critic"] = {"path": str(case.folder / "critic")}
    case.settings["algorithm"]["name"] = "ppo"


def _output(place: Callable[[Case], Path]) -> Callable[[Case], None]:
    return lambda case: case.settings["train"].update(output=str(place(case)))


def _link(case: Case) -> Path:
    link = case.folder / "link"
    link.symlink_to(case.folder / "nowhere" / "out")
    return link


CASES: dict[str, tuple[Callable[[Case], Any], str]] = {
    # --- config.json
    "yarn": (_rope(rope_type="yarn", factor=4.0), "rope_type='yarn' is not supported: it scales attention too"),
    "longrope": (_rope(rope_type="longrope", long_factor=[1.0], short_factor=[1.0]), "rope_type='longrope'"),
    "dynamic rope": (_rope(rope_type="dynamic", factor=2.0), "rope_type='dynamic'"),
    "unknown rope": (_rope(rope_type="spiral"), "rope_type='spiral'"),
    "linear rope without factor": (_rope(rope_type="linear"), "rope_scaling.factor=None"),
    "rope by layer": (
        _facts(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "all layers rotate alike, by one set of parameters",
    ),
    "part of a head rotated": (_facts(partial_rotary_factor=0.5), "only whole heads are rotated"),
    "fp8": (_facts(quantization_config={"quant_method": "fp8"}), "the policy trains unquantised weights"),
    "attention bias": (_facts(attention_bias=True), "attention_bias=True is not supported"),
    "mlp bias": (_facts(mlp_bias=True), "mlp_bias=True is not supported"),
    "another activation": (_facts(hidden_act="gelu"), "hidden_act='gelu'"),
    "layers of several kinds": (_facts(layer_types=["full_attention", "sliding_attention"]), "layer_types="),
    "scaled logits": (_facts(logits_scaling=8), "logits_scaling=8"),
    "heads that are not divided": (_facts(num_key_value_heads=3), "num_key_value_heads=3"),
    "a size that is text": (_facts(max_position_embeddings="long"), "max_position_embeddings='long' is not supported"),
    "no vocabulary": (_facts(vocab_size=None), "vocab_size=None"),
    "gemma": (_facts(architectures=["Gemma2ForCausalLM"], model_type="gemma2"), "it caps logits"),
    "gpt2": (_facts(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "its architecture is GPT2LMHeadModel"),
    "no config.json": (lambda case: (case.model / "config.json").unlink(), "the folder has no config.json"),
    "config.json cut": (lambda case: (case.model / "config.json").write_text("{"), "is no valid JSON"),
    "config.json a list": (lambda case: (case.model / "config.json").write_text("[]"), "holds a list"),
    "no folder": (_set("model", path="models/nothing-here"), "there is no such folder"),
    "a name on the hub": (
        _set("model", path="Someone/Some-7B"),
        "`hf download Someone/Some-7B --local-dir models/Some-7B`; then set model.path=models/Some-7B",
    ),
    # --- weights
    "a larger vocabulary": (_facts(vocab_size=300), "embed_tokens.weight of"),
    "more layers": (_facts(num_hidden_layers=3), "has no tensor model.layers.2."),
    "fewer layers": (_facts(num_hidden_layers=1), "no parameter takes tensor model.layers.1."),
    "a larger MLP": (_facts(intermediate_size=32), "its config.json gives [32, 16]"),
    "a missing tensor": (lambda case: case.tensors(model__norm__weight=None), "has no tensor model.norm.weight"),
    "one tensor more": (lambda case: case.tensors(score__weight=("BF16", (2, 16))), "no parameter takes tensor score"),
    "integers": (lambda case: case.tensors(model__norm__weight=("I32", (16,))), "holds I32, and weights are"),
    "8-bit floats": (lambda case: case.tensors(model__norm__weight=("F8_E4M3", (16,))), "holds F8_E4M3"),
    "no output layer": (lambda case: case.tensors(lm_head__weight=None), "has no tensor lm_head.weight"),
    "a cut file": (_cut, "is damaged or truncated"),
    "an empty file": (lambda case: (case.model / "model.safetensors").write_bytes(b""), "is damaged or truncated"),
    "a missing shard": (_index, "lacks files that model.safetensors.index.json names"),
    "weights as .bin": (_bin, "the folder has no *.safetensors"),
    "tied, and two tables": (_other_output_layer, "lm_head.weight differs from model.embed_tokens.weight"),
    "a critic without weights": (_wrong_critic, "critic.path = "),
    # --- tokenizer and chat template
    "no tokenizer": (lambda case: (case.model / "tokenizer.json").unlink(), "the tokenizer of model.path"),
    "a damaged tokenizer": (lambda case: (case.model / "tokenizer.json").write_text('{"a": 1}'), "cannot be loaded"),
    "an unheard-of family": (_facts(model_type="unheard"), "model_type='unheard'"),
    "no chat template": (_no_template, "has no chat template. Use an instruct model"),
    "chat_template.json": (_template_json, "Tokenizers do not read its chat_template.json"),
    "named templates": (_named_templates, "has the chat templates rag, tool_use, and none of them is the default"),
    "a folder of templates": (_template_folder, "has the chat templates rag, and none of them is the default"),
    "a template that does not parse": (lambda case: case.template("{% for %}"), "the chat template does not parse"),
    "an unknown filter": (lambda case: case.template("{{ messages | shout }}"), "No filter named 'shout'"),
    "a template that refuses": (
        lambda case: case.template("{{ raise_exception('no thanks') }}"),
        "prompt train/0: the chat template refuses the turns: no thanks",
    ),
    "a template without the question": (lambda case: case.template("hello"), "leaves out what the user says"),
    "a template that fails": (lambda case: case.template("{{ 1 + 'a' }}"), "the chat template cannot render"),
    "no system prompt possible": (
        lambda case: (case.template("{{ messages[-1].content }}"), _set("model", system_prompt="")(case)),
        "this chat template cannot be rendered without a system prompt",
    ),
    "tokens beyond the vocabulary": (_small_vocabulary, "and the vocabulary of model.path = "),
    # --- data
    "no prompt fits": (_set("data", max_prompt_tokens=5), "leaves out all 4 prompts"),
    "all held out": (_all_held_out, "training problems are also evaluation problems"),
    "no file": (lambda case: case.rows.unlink(), "there is no such file"),
    "another kind of file": (lambda case: case.source(path=str(case.folder / "run.csv")), "this kind of file"),
    "a damaged file": (_damaged_parquet, "cannot be read as parquet"),
    "an empty data file": (lambda case: case.rows.write_text(""), "has no rows"),
    "a line that is no JSON": (lambda case: case.rows.write_text("{no}\n"), "row 0 (line 1): not valid JSON"),
    "a row without gold": (_without("reward_model"), "row 2 (line 3) has no reward_model; it has "),
    "a row without prompt": (_without("prompt"), "row 2 (line 3) has no prompt; it has "),
    "fewer rows than asked for": (lambda case: case.source(size=9), "has 4 rows, and size = 9 asks for more"),
    "pictures in a row": (
        lambda case: case.write_rows([case.row(0), case.row(1, images=["a.png"])]),
        "row 1 (line 2), field images: the question comes with images",
    ),
    "pictures in a column": (
        lambda case: case.parquet([case.row(0), case.row(1)], images=[[], ["a.png"]]),
        "train.parquet, row 1, field images",
    ),
    "a missing column": (lambda case: case.parquet([{"prompt": "x"}]), "no data_source, reward_model; it has prompt"),
    "an unknown generator": (_set("data", train=[{"generator": "gdc", "size": 9}]), "Did you mean gcd"),
    "an option of no generator": (
        _set("data", train=[{"generator": "gcd", "size": 9, "options": {"colour": 1}}]),
        "the generator gcd has no option 'colour'",
    ),
    "a grader for no row": (_set("reward", by_source={"maths": "math"}), "Did you mean 'math'?"),
    "a data set nobody has": (
        lambda case: case.write_rows([case.row(0, data_source="reasoning_gym/nothing")]),
        "graded by reasoning-gym, which has no such data set",
    ),
    # --- the method
    "no such plug-in": (_set("algorithm", plugins=[{"name": "nowhere.py:Mine"}]), "there is no such file"),
    "a plug-in that does not parse": (lambda case: case.plugin("class Mine(:"), "cannot be imported: SyntaxError"),
    "a plug-in that ends the process": (lambda case: case.plugin("raise SystemExit(3)"), "SystemExit: 3"),
    "a plug-in of another class": (lambda case: case.plugin("class Mine: pass"), "is no subclass of"),
    "a plug-in by another name": (lambda case: case.plugin(PLUGIN.format(body=""), "Yours"), "Yours is not in it"),
    "a misspelt option": (lambda case: case.plugin(PLUGIN.format(body=""), wieght=2.0), "wieght"),
    "an option of another type": (lambda case: case.plugin(PLUGIN.format(body=""), weight="much"), "weight"),
    "another constructor": (
        lambda case: case.plugin(PLUGIN.format(body="    def __init__(self): pass")),
        "cannot be built",
    ),
    "a constructor that raises": (
        lambda case: case.plugin(PLUGIN.format(body="    def __init__(self, options): raise ValueError('tired')")),
        "its constructor raises ValueError: tired",
    ),
    "a need that nothing meets": (
        lambda case: case.plugin(PLUGIN.format(body="    needs = frozenset({'moonlight'})")),
        "needs moonlight, which nothing provides",
    ),
    "a plug-in that cannot be bound": (
        lambda case: case.plugin(PLUGIN.format(body="    def bind(self, context): context.nothing")),
        "Mine.bind raises AttributeError",
    ),
    "no demonstrations": (_set("algorithm", name="hpt"), "hpt learns from demonstrations"),
    "no rubrics": (_set("algorithm", plugins=[{"name": "c_grpo"}]), "training prompt train/0 has no list of texts"),
    # --- the output
    "the output is a file": (_output(lambda case: case.rows), "is no folder"),
    "the output is below a file": (_output(lambda case: case.rows / "out"), "is no folder"),
    "the output is a link to nothing": (_output(_link), "is a link to"),
    "the output takes no files": (_output(lambda case: Path("/proc/self/out")), "cannot be written to"),
}  # fmt: skip


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A sound run, and what three commands say of it; nothing is queued, and no rank is built."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", "echo 7"), ("scontrol", "echo JobState=COMPLETED")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipo_megatron.cli.ranks.on_ranks", lambda *words, **options: 0)
    monkeypatch.setattr("clipo_megatron.cli.train.on_ranks", lambda *words, **options: 0)

    def said(*words: str) -> tuple[int, str]:
        code = cli.main(words)
        return code, capsys.readouterr().err

    return Case(tmp_path), said


def test_a_sound_run_passes(commands) -> None:
    case, said = commands
    file = case.file()
    assert said("train", file, "--check") == (0, "")
    assert not (case.folder / "out").exists(), "--check leaves nothing behind"
    assert said("train", file) == (0, "")
    assert said("submit", file, "--nodes", "1") == (0, "")


@pytest.mark.parametrize("name", CASES)
def test_check_train_and_submit_refuse_the_same(name: str, commands) -> None:
    spoil, part = CASES[name]
    case, said = commands
    spoil(case)
    file = case.file()
    checked, trained, submitted = (
        said(*words) for words in (("train", file, "--check"), ("train", file), ("submit", file, "--nodes", "1"))
    )
    assert checked[0] == 2 and part in checked[1] and "Traceback" not in checked[1]
    assert trained == checked
    assert submitted == checked or (submitted[0] == 2 and part in submitted[1])


def test_there_are_sixty_cases_and_more() -> None:
    assert len(CASES) >= 60
