"""Trains the initial policy, a small Llama, on sound and unfaithful responses; the result is a Hugging Face folder."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from task import SYMBOLS, NotedSum, response
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<end>", "<pad>"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ?' }}{% endif %}"
)
# (updates, probability that a response is unfaithful, probability that a step is wrong). Sums are learned first, from
# responses that are mostly correct.
LESSONS = ((400, 0.15, 0.0), (350, 0.5, 0.1))
BATCH, LEARNING_RATE, WARMUP, DECAY = 128, 2e-3, 50, 100


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each symbol."""
    vocabulary = {symbol: index for index, symbol in enumerate((PAD, END, *SYMBOLS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD, unk_token=PAD)
    found.chat_template = TEMPLATE
    return found


def teach(folder: Path, lessons: list[NotedSum], *, seed: int) -> None:
    """Train the student from scratch on responses to `lessons`, and write it to `folder`."""
    torch.manual_seed(seed)
    draw, tokens = random.Random(seed), tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    plan = [(unfaithful, slip) for updates, unfaithful, slip in LESSONS for _ in range(updates)]
    for number, (unfaithful, slip) in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (number + 1) / WARMUP, (len(plan) - number) / DECAY)
        chosen = draw.choices(lessons, k=BATCH)
        texts = [f"{each.question} ? {response(each, draw, unfaithful=unfaithful, slip=slip)} {END}" for each in chosen]
        ids = torch.tensor(tokens(texts)["input_ids"])  # every text has the same length
        prompt_length = len(tokens(f"{chosen[0].question} ?")["input_ids"])
        labels = ids.clone()
        labels[:, :prompt_length] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 100 == 99:
            print(f"student: {number + 1} of {len(plan)} updates, loss {loss.item():.3f}", flush=True)
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
