"""Commands that compute nothing answer without torch, which takes seconds to import, and without what nobody named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import whole_folder
from paths import EXAMPLES

FACTS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 8,
    "vocab_size": 260,
}
PROGRAM = """
import sys
from clipo_megatron.runtime import launch
launch.supervise_again = lambda *words, **options: 0  # starts no ranks
from clipo_megatron.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = {"torch", "megatron", "transformers", "matplotlib", "sympy"} & set(sys.modules)
assert code == 0 and not heavy, (code, heavy)
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose method, plug-ins and generator are checked, on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    whole_folder(folder, FACTS)
    file = folder / "run.yaml"
    file.write_text(f"""
name: quick
model: {{path: {folder}}}
layout: {{pp: 2}}
data: {{train: [{{generator: gcd, size: 40}}]}}
algorithm: {{name: dapo, plugins: [{{name: hapo}}, {{name: pipo}}]}}
train: {{output: {folder / "out"}}}
""")
    return file


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["settings"],
        ["methods"],
        ["train", "RUN", "--check"],
        ["train", "RUN"],
        ["plan", str(EXAMPLES / "recipes" / "qwen2.5-7b-math.yaml")],
        ["submit", "RUN", "--nodes", "2", "--dry-run"],
    ],
    ids=lambda words: " ".join(Path(word).name for word in words),
)
def test_a_command_answers_without_torch(words: list[str], run_file: Path) -> None:
    given = [str(run_file) if word == "RUN" else word for word in words]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
