"""Model folders without weights worth the name: for checks of settings, and for checks of what folders hold."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

FACTS = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 30,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "vocab_size": 263,
}


TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
_BYTES_OF = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "BOOL": 1, "F8_E4M3": 1}


def model_folder(path: Path, facts: dict[str, Any]) -> str:
    """A folder with these facts, weights and a chat template, all but the facts empty."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(facts))
    (path / "model.safetensors").touch()
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return str(path)


def whole_folder(path: Path, facts: dict[str, Any], kind: str = "BF16") -> Path:
    """A folder that a run could load: tensors as the facts have them, all zero and without bytes on the disk, and a
    byte-level tokenizer of 259 tokens with ChatML turns."""
    from clipo_megatron.weights.families import entries, model_spec
    from clipo_megatron.weights.mapping import PipelineStage

    path.mkdir(exist_ok=True, parents=True)
    (path / "config.json").write_text(json.dumps(facts))
    spec = model_spec(facts)
    whole = entries(spec, PipelineStage(0, spec.num_layers, first=True, last=True))
    shapes = {tensor.name: tensor.shape for entry in whole if not entry.copy for tensor in entry.hf}
    sparse_weights(path / "model.safetensors", {name: (kind, shape) for name, shape in shapes.items()})
    write_tokenizer(path)
    return path


def sparse_weights(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros, which takes no room on the disk but for its header."""
    entries, end = {}, 0
    for name, (kind, shape) in tensors.items():
        nbytes = prod(shape) * _BYTES_OF[kind]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(entries).encode()
    with file.open("wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        written.truncate(8 + len(header) + end)


def tensors_of(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `sparse_weights` takes, of a file that is there."""
    data = file.open("rb")
    header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    return {name: (each["dtype"], tuple(each["shape"])) for name, each in header.items() if name != "__metadata__"}


def write_tokenizer(path: Path, template: str | None = TEMPLATE) -> None:
    """The files of a byte-level tokenizer: ids 3 to 258 are the bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*_SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL])
    core.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|pad|>"}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
