"""Which models the local engine computes, told from their configuration. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Settings of some families that change the logits after the LM head, which the decoding loop does not do.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def unusable(folder: Path) -> str:
    """Say why the local engine cannot use the model of a Hugging Face folder; "" if it can."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json; model.path must be a Hugging Face folder."
    try:
        config = configuration(folder)
    except Exception as error:  # transformers checks values in several ways
        return f"The configuration in {folder} cannot be loaded: {' '.join(str(error).split())}"
    unsupported = [kind for kind in sorted(set(getattr(config, "layer_types", None) or ())) if kind != "full_attention"]
    unsupported += [f"{name} = {getattr(config, name)}" for name in _LOGIT_CHANGES if getattr(config, name, None)]
    if unsupported:
        return (
            f"The model in {folder} has {', '.join(unsupported)}, which the local engine does not compute; use another "
            "engine for it."
        )
    return ""


def configuration(folder: Path) -> Any:
    """The configuration of the model in a folder, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
