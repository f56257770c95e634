"""Recognises tensors under the names that a wrapper around the model gave them, and says how to save it without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

_SAVE = "and save it again with save_pretrained"
_PEFT = f"PEFT puts it there: merge the adapter with merge_and_unload() {_SAVE}"
# What puts a part into names, and how the model is saved without it.
_REMEDIES = {
    "base_model": _PEFT,
    "base_layer": _PEFT,
    "module": f"data parallelism (DDP, DeepSpeed, Accelerate) puts it there: take model.module {_SAVE}",
    "_orig_mod": f"torch.compile puts it there: take model._orig_mod {_SAVE}",
    "_fsdp_wrapped_module": f"FSDP puts it there: gather the full state dict of the unwrapped model {_SAVE}",
    "_checkpoint_wrapped_module": f"activation checkpointing puts it there: take the model without it {_SAVE}",
    "_forward_module": f"a trainer's strategy puts it there: take the model inside {_SAVE}",
    "language_model": f"a model that also sees or hears puts it there: take its language model {_SAVE}",
}
_OTHERWISE = f"a wrapper around the model puts it there: take the model inside {_SAVE}"
# These stand before a module's own name, wherever the module is.
_WRAPPERS = {"base_layer", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Parts of names of an adapter that was not merged.
_ADAPTER = (".lora_", ".base_layer.", ".lora_magnitude_vector", ".modules_to_save.")
_BODY = "model."  # what a model with its output layer has, and one without it has not
_ENOUGH = 0.5  # share of the missing names that have to be there under the other name


def prefix_problem(missing: Sequence[str], unknown: Sequence[str], folder: str | Path) -> str:
    """Say in one sentence what makes names unknown and others missing; "" where nothing known explains them.

    Args:
        missing: names of tensors that the model needs and the folder does not have.
        unknown: names of tensors that the folder has and the model does not need.
        folder: named in the sentence.
    """
    needed = set(missing)
    found: Counter[str] = Counter(part for name in unknown for part in _added(name, needed))
    enough = _ENOUGH * len(needed)
    if found and (most := max(found.values())) > enough:
        part = min((each for each in found if found[each] == most), key=len)
        example = next(name for name in unknown if part in _added(name, needed))
        known = next((_REMEDIES[word] for word in part.split(".") if word in _REMEDIES), _OTHERWISE)
        remedy = _PEFT if any(word in name for name in unknown for word in _ADAPTER) else known
        return f"{most} tensors of {folder} have {part!r} in their names, as {example} has; {remedy}"
    bare = [name.removeprefix(_BODY) for name in missing if name.startswith(_BODY)]
    if (count := len(set(bare) & set(unknown))) and count > enough:
        example = next(name for name in bare if name in unknown)
        return (
            f"{count} tensors of {folder} lack {_BODY!r} before their names, as {example} does; a model without its "
            f"output layer has such names: load it with AutoModelForCausalLM {_SAVE}"
        )
    return ""


def _added(name: str, needed: set[str]) -> Iterator[str]:
    """Yield what `name` has more than a needed name: a prefix, a prefix in place of "model.", or a wrapper's name."""
    parts = name.split(".")
    plain = [part for part in parts if part != "base_layer"]
    prefixed = False
    for start in range(1, len(plain)):
        rest = ".".join(plain[start:])
        before = ".".join(plain[:start]) + "."
        if rest in needed or (before != _BODY and _BODY + rest in needed):
            prefixed = True
            yield before
    if not prefixed and ".".join(part for part in parts if part not in _WRAPPERS) in needed:
        yield from (f"{wrapper}." for wrapper in _WRAPPERS.intersection(parts))
