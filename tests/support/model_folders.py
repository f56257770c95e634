"""Model folders for checks, which read config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FACTS = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 30,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "vocab_size": 263,
}


def model_folder(path: Path, facts: dict[str, Any]) -> str:
    """A folder with these facts, weights and a chat template, all but the facts empty."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(facts))
    (path / "model.safetensors").touch()
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return str(path)
