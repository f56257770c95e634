"""Tokens per second of the local engine against transformers' `generate`, same model, prompts and run.

    python tools/bench_rollout.py MODEL_DIR --prompts 8 --samples 8 --new-tokens 16 --threads 1

Both decode exactly --new-tokens tokens a sample (no stop ids), then again with the model's end token as stop, in
alternating rounds; the fastest round of each counts. `generate` gives no log-probs, the engine does.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from clipo_megatron.flow import Prompt
from clipo_megatron.rollout.engine import Request, SamplingParams
from clipo_megatron.rollout.local.engine import LocalEngine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder with weights")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each, after one to warm up")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def arithmetic_prompts(tokenizer, count: int) -> list[Prompt]:
    numbers = random.Random(0)
    prompts = []
    for row in range(count):
        question = f"What is {numbers.randint(0, 99)} + {numbers.randint(0, 99)}? Answer with the number only."
        messages = ({"role": "user", "content": question},)
        tokens = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        prompts.append(Prompt(f"bench/{row}", messages, torch.tensor(tokens), "bench", ""))
    return prompts


def fastest(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, tuple[float, int]]:
    """Of each run: seconds of its fastest round, and the response tokens of a round. Rounds alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens = {name: run() for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (min(seconds[name]), tokens[name]) for name in runs}


def up_to_stop(responses: torch.Tensor, stop: tuple[int, ...]) -> int:
    """Tokens of [n, R] padded responses, each up to its first stop token, which counts."""
    stops = torch.isin(responses, torch.tensor(stop, device=responses.device)).int()
    return int((stops.cumsum(1) - stops == 0).sum())


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    engine = LocalEngine(args.model, dtype=dtype, device=args.device, batch_size=args.batch_size)
    engine.load_weights(model.named_parameters(), version=0)
    prompts = arithmetic_prompts(tokenizer, args.prompts)
    padded = tokenizer.pad({"input_ids": [p.tokens.tolist() for p in prompts]}, return_tensors="pt").to(args.device)
    lengths = [p.tokens.numel() for p in prompts]
    print(f"{args.prompts} prompts of {min(lengths)}-{max(lengths)} tokens x {args.samples} samples, {args.dtype}")

    def ours(stop: tuple[int, ...]) -> int:
        params = SamplingParams(
            samples=args.samples,
            max_new_tokens=args.new_tokens,
            stop_ids=stop,
            top_p=args.top_p,
            top_k=args.top_k,
        )
        groups = engine.generate([Request(*each) for each in enumerate(prompts)], params, deadline_s=600)
        return sum(rollout.tokens.numel() for group in groups for rollout in group.rollouts)

    def theirs(stop: tuple[int, ...]) -> int:
        torch.manual_seed(0)
        out = model.generate(
            **padded,
            do_sample=True,
            temperature=1.0,
            top_k=args.top_k,
            top_p=args.top_p,
            max_new_tokens=args.new_tokens,
            num_return_sequences=args.samples,
            eos_token_id=list(stop) or None,
            pad_token_id=tokenizer.pad_token_id,
        )[:, padded.input_ids.shape[1] :]
        return up_to_stop(out, stop)

    model.generation_config.eos_token_id = None
    for label, stop in (("all tokens", ()), ("with stop ids", (tokenizer.eos_token_id,))):
        runs = {"generate": lambda stop=stop: theirs(stop), "engine": lambda stop=stop: ours(stop)}
        rates = {}
        for name, (seconds, tokens) in fastest(runs, args.rounds).items():
            rates[name] = tokens / seconds
            print(f"{label:14s} {name:9s} {tokens:6d} tokens {seconds:7.2f} s {rates[name]:8.1f} tokens/s", flush=True)
        print(f"{label:14s} ratio     {rates['engine'] / rates['generate']:.2f}", flush=True)


if __name__ == "__main__":
    main()
