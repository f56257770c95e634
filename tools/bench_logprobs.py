"""Time and memory of the log-probs of chosen tokens, forward and backward: in tiles (ours) against full logits.

Both ways are measured in one run, each in its own process, on the same inputs in fp32. Memory is the growth of the
process's peak resident memory over one forward and backward; the states, the weight and its fp32 gradient buffer, which
both ways need, are allocated before. Time is the best of --repeats; the ways alternate, so that both see the same load.
`full` is plain autograd: logits of all tokens, log_softmax, gather.

`--drift MODEL_DIR` measures something else: what rounding logits to bf16 adds to the mismatch of trainer and engine. It
samples responses in bf16, token by token with a cache as an engine does, scores them in one forward as the trainer
does, and takes the log-probs of both from the states of each, with logits in bf16 and in fp32.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
WAYS = ("tiled", "full")


def resident(kind: str) -> int:
    """Resident bytes of this process: the current ones ("VmRSS"), or the peak since `forget_peak` ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", status).group(1)) * 1024


def forget_peak() -> None:
    """Reset the peak to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def passes(way: str, tokens: int, hidden: int, vocab: int) -> Callable[[], tuple[Any, Any, Any]]:
    """Make inputs for one way; the returned function runs a forward and a backward: log-probs and both gradients."""
    import torch

    from clipo_megatron.policy.model.logprobs import token_logprobs

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).mul_(hidden**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    buffer = torch.full_like(weight, 0.0, requires_grad=False)
    states.grad = torch.full_like(states, 0.0)

    def once() -> tuple[Any, Any, Any]:
        buffer.zero_()
        states.grad.zero_()
        if way == "tiled":
            logprobs, _ = token_logprobs(states, weight, targets, main_grad=buffer)
        else:
            weight.grad = buffer
            logits = torch.nn.functional.linear(states, weight)
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            del logits
        logprobs.backward(upstream)
        if way == "tiled":
            weight.grad = None  # a stand-in that nothing reads, as in Megatron
        return logprobs.detach(), states.grad, buffer

    return once


def serve(way: str, tokens: int, hidden: int, vocab: int, threads: int) -> None:
    """Measure once for every line on stdin, and print the result as a JSON line."""
    import torch

    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 else time.perf_counter  # CPU time does not tell of other processes
    passes(way, 8, hidden, 64)()
    once = passes(way, tokens, hidden, vocab)
    forget_peak()
    before = resident("VmRSS")
    for _ in sys.stdin:
        start = now()
        once()
        seconds = now() - start
        print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before}), flush=True)


def compare(
    tokens: int, hidden: int, vocab: int, *, threads: int = 2, repeats: int = 3, deadline_s: float = 600.0
) -> dict[str, dict[str, float]]:
    """The best seconds and the peak bytes of each way.

    Raises:
        RuntimeError: a measuring process failed; its message is quoted.
    """
    sizes = [str(size) for size in (tokens, hidden, vocab, threads)]
    started = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--serve", way, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for way in WAYS
    }
    figures: dict[str, dict[str, float]] = {}
    deadline = time.monotonic() + deadline_s
    try:
        for _ in range(repeats):
            for way, process in started.items():
                process.stdin.write("\n")
                process.stdin.flush()
                figure = _answer(process, way, deadline)
                first = figures.setdefault(way, figure)
                first["seconds"] = min(first["seconds"], figure["seconds"])
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
    return figures


def _answer(process: subprocess.Popen[str], way: str, deadline: float) -> dict[str, float]:
    import select

    ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
    line = process.stdout.readline() if ready else ""
    if not line:
        process.kill()
        said = process.communicate()[1].strip()
        raise RuntimeError(f"measuring {way} " + (f"failed:\n{said}" if ready else "did not end in time"))
    return json.loads(line)


def drift(folder: Path, *, prompts: int = 16, tokens: int = 64) -> dict[str, float]:
    """The mismatch, as `policy/mult_prob_error`, of trainer and engine with logits in bf16 and fp32 on each side."""
    import torch
    from transformers import AutoModelForCausalLM

    from clipo_megatron.policy.model.logprobs import token_logprobs

    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weight = model.get_output_embeddings().weight.detach()

    def of_states(states: Any, targets: Any, wide: bool) -> Any:
        """Log-probs [N] of the targets [N] from states [N, H]."""
        if wide:
            return token_logprobs(states, weight, targets)[0]
        return (states @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    with torch.no_grad():
        ids = torch.randint(0, len(weight), (prompts, 8), generator=generator)
        first, states, cache, step = ids.shape[1], [], None, ids
        for _ in range(tokens):
            out = model.model(step, past_key_values=cache, use_cache=True)
            cache, state = out.past_key_values, out.last_hidden_state[:, -1]
            odds = (state.float() @ weight.float().t()).softmax(-1)
            step = torch.multinomial(odds, 1, generator=generator)
            states.append(state)
            ids = torch.cat([ids, step], dim=1)
        targets = ids[:, first:].reshape(-1)
        sides = {
            "engine": torch.stack(states, dim=1).flatten(0, 1),
            "trainer": model.model(ids, use_cache=False).last_hidden_state[:, first - 1 : -1].flatten(0, 1),
        }
        made = {(name, wide): of_states(each, targets, wide) for name, each in sides.items() for wide in (False, True)}

    def mismatch(one: Any, other: Any) -> float:
        return float((one - other).double().abs().exp().mean())

    return {
        "one state, bf16 against fp32": mismatch(made["trainer", False], made["trainer", True]),
        "both bf16": mismatch(made["trainer", False], made["engine", False]),
        "trainer fp32, engine bf16": mismatch(made["trainer", True], made["engine", False]),
        "both fp32": mismatch(made["trainer", True], made["engine", True]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, metavar="T")
    parser.add_argument("--hidden", type=int, default=896, metavar="H")
    parser.add_argument("--vocab", type=int, default=151936, metavar="V")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--drift", type=Path, metavar="MODEL_DIR", help="measure the mismatch that bf16 logits add")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        way, *sizes = args.serve
        serve(way, *map(int, sizes))
        return
    if args.drift:
        for name, value in drift(args.drift).items():
            print(f"{name:>30} {value:.5f}")
        return
    figures = compare(
        args.tokens, args.hidden, args.vocab, threads=args.threads, repeats=args.repeats, deadline_s=args.deadline
    )
    print(f"log-probs at T = {args.tokens}, H = {args.hidden}, V = {args.vocab}, fp32, {args.threads} threads")
    for way, figure in figures.items():
        print(f"{way:>8} {figure['seconds']:7.2f} s {figure['bytes'] / MIB:7.0f} MiB")
    ours, full = figures["tiled"], figures["full"]
    print(f"   ratio {ours['seconds'] / full['seconds']:7.2f}   {ours['bytes'] / full['bytes']:7.3f}")


if __name__ == "__main__":
    main()
