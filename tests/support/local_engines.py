"""Local engines of tiny models, what they are asked, and what transformers says to that."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clipo_megatron.flow import Prompt, RolloutGroup
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine


def reference(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine_of(folder: Path, *, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> LocalEngine:
    engine = LocalEngine(folder, dtype=dtype, device="cpu", batch_size=batch_size)
    engine.load_weights(reference(folder).named_parameters(), version=0)
    return engine


def chat_prompts(folder: Path, texts: list[str]) -> list[Request]:
    """Prompts of different lengths that share the beginning of the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for row, text in enumerate(texts):
        messages = ({"role": "user", "content": text},)
        tokens = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        prompts.append(Request(row, Prompt(f"test/{row}", messages, torch.tensor(tokens), "test", "")))
    return prompts


def bare_prompts(lengths: list[int], vocab: int = 259) -> list[Request]:
    """Prompts of random tokens, which have nothing in common."""
    generator = torch.Generator().manual_seed(7)
    return [
        Request(row, Prompt(f"bare/{row}", (), torch.randint(3, vocab, (length,), generator=generator), "test", ""))
        for row, length in enumerate(lengths)
    ]


TEXTS = [f"Solve {what}" for what in ("one", "a longer question, for the padding", "two plus two?", "x", "it", "one")]


def by_prompt(groups) -> dict[str, list[list[int]]]:
    return {group.prompt.id: [rollout.tokens.tolist() for rollout in group.rollouts] for group in groups}


def run(engine: LocalEngine, prompts, **params) -> list[RolloutGroup]:
    return list(engine.generate(prompts, SamplingParams(**params), deadline_s=60))


def alone(model, prompt: torch.Tensor, response: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [R] of a response by one plain forward."""
    with torch.no_grad():
        logits = model(torch.cat((prompt, response))[None]).logits[0, prompt.numel() - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]
