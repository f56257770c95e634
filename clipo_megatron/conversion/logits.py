"""The logits of a folder's weights, computed by transformers on fixed prompts in float32.

Equal tensors under another config.json give other logits, so these show a wrong rope or norm, which no comparison of
tensors can.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as library_logging

from clipo_megatron.conversion.compare import Weights
from clipo_megatron.weights.errors import CoverageError, WeightsError

PROMPTS, LENGTH = 2, 128  # number of sequences, and tokens of each unless the model takes fewer


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """How far the logits of two folders differ."""

    largest: float  # largest absolute difference
    scale: float  # largest absolute value of A's logits
    tokens: int  # number of tokens compared

    @property
    def relative(self) -> float:
        """The largest difference divided by the scale; infinite if a logit is NaN."""
        return self.largest / self.scale if self.largest else 0.0


def fixed_prompts(vocab_size: int, max_positions: int) -> Tensor:
    """Make token ids [PROMPTS, T] spread over the vocabulary, the same for every model with the same vocabulary."""
    length = min(LENGTH, max_positions)
    return (torch.arange(PROMPTS * length) * 7919 + 11).remainder(vocab_size).view(PROMPTS, length)


def logits(weights: Weights, config_folder: Path) -> Tensor:
    """Compute the logits of the fixed prompts, [PROMPTS, T, vocabulary] float32, by the model of config.json.

    All tensors are in memory at once, as float32.

    Raises:
        CoverageError: transformers misses tensors, or does not know some; lists all.
    """
    config = AutoConfig.from_pretrained(config_folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    state = {name: weights.get(name) for name in weights.names()}
    shown, bar = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()  # its warnings are raised as errors below
    library_logging.disable_progress_bar()
    try:
        model, loading = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"transformers cannot load the weights of {config_folder}: {error}") from error
    finally:
        library_logging.set_verbosity(shown)
        if bar:
            library_logging.enable_progress_bar()
    del state
    problems = [f"transformers finds no tensor {name}" for name in sorted(loading["missing_keys"])]
    problems += [f"transformers does not know tensor {name}" for name in sorted(loading["unexpected_keys"])]
    problems += [f"transformers gets another shape of {each}" for each in sorted(map(str, loading["mismatched_keys"]))]
    if problems:
        raise CoverageError(problems)
    prompts = fixed_prompts(config.vocab_size, config.max_position_embeddings)
    with torch.no_grad():
        found = model.eval()(prompts).logits.float()
    del model
    gc.collect()
    return found


def difference(a: Tensor, b: Tensor) -> LogitsDifference:
    """Compare two results of `logits`.

    Raises:
        WeightsError: the vocabularies differ in size.
    """
    if a.shape != b.shape:
        raise WeightsError(f"A's logits have shape {list(a.shape)} and B's {list(b.shape)}: they are of other models")
    largest = float((a - b).abs().max())
    if largest != largest:
        largest = float("inf")
    return LogitsDifference(largest, float(a.abs().max()), a.shape[0] * a.shape[1])
