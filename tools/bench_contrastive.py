"""Time and memory of the contrastive loss, forward and backward: grouped (ours) against dense (B x B with masks).

Each figure is measured in its own process, all in one run. Time is the best of --repeats after a warm-up. Memory is the
growth of the process's peak resident memory over one forward and backward without the inputs, but with their gradient.
`dense` is the straightforward way: all similarities of the batch, then masks.
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

MIB = 2**20


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a process starts with its parent's there.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def dense_supcon(embeddings, correct, group, temperature=0.05):
    """Compute supcon_out at group level with masks over the whole batch."""
    import torch

    z = torch.nn.functional.normalize(embeddings, dim=-1)
    logits = z @ z.T / temperature
    peers = (group[:, None] == group[None, :]) & ~torch.eye(len(z), dtype=torch.bool)
    positive = peers & (correct[:, None] == correct[None, :])
    log_prob = logits - logits.masked_fill(~peers, float("-inf")).logsumexp(-1, keepdim=True)
    loss = -(log_prob * positive).sum(-1) / positive.sum(-1).clamp(min=1)
    valid = correct & positive.any(-1) & (peers & ~positive).any(-1)
    return loss.where(valid, 0.0), valid


def measure(form: str, rollouts: int, group_size: int, dim: int, threads: int, repeats: int) -> dict[str, float]:
    """Seconds and bytes of one forward and backward in this process."""
    import torch

    from clipo_megatron.algorithms.clipo import contrastive_loss

    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 else time.perf_counter  # CPU time does not tell of other processes
    forms: dict[str, Callable] = {
        "grouped": lambda *batch: contrastive_loss(*batch, loss="supcon_out"),
        "infonce": lambda *batch: contrastive_loss(*batch),
        "dense": dense_supcon,
    }

    def batch(size: int):
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(size, dim, generator=generator).requires_grad_()
        return embeddings, torch.rand(size, generator=generator) < 0.5, torch.arange(size) // group_size

    def once(inputs) -> float:
        inputs[0].grad = None
        start = now()
        loss, valid = forms[form](*inputs)
        (loss.sum() / valid.sum()).backward()
        return now() - start

    once(batch(4 * group_size))
    inputs = batch(rollouts)
    before = peak_memory()
    once(inputs)
    growth = peak_memory() - before
    seconds = min(once(inputs) for _ in range(repeats))
    return {"form": form, "rollouts": rollouts, "seconds": seconds, "bytes": growth}


def in_own_process(form: str, rollouts: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", form, "--rollouts", str(rollouts), "--group", str(args.group)]
    command += ["--dim", str(args.dim), "--threads", str(args.threads), "--repeats", str(args.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.deadline)
    if done.returncode:
        raise SystemExit(f"measuring {form} at B = {rollouts} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1024, 2048, 4096, 8192], metavar="B")
    parser.add_argument("--group", type=int, default=16, metavar="G")
    parser.add_argument("--dim", type=int, default=512, metavar="d")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for one figure")
    parser.add_argument("--one", choices=["grouped", "infonce", "dense"], help="measure this one here, print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.rollouts[0], args.group, args.dim, args.threads, args.repeats)))
        return

    print(f"contrastive loss, forward + backward, G = {args.group}, d = {args.dim}, fp32, {args.threads} threads")
    print(f"{'B':>6} {'grouped':>20} {'infonce':>20} {'dense':>20} {'dense / grouped':>20}")
    for rollouts in args.rollouts:
        figures = {form: in_own_process(form, rollouts, args) for form in ("grouped", "infonce", "dense")}
        cells = [f"{f['seconds'] * 1e3:8.1f} ms {f['bytes'] / MIB:5.0f} MiB" for f in figures.values()]
        ours, dense = figures["grouped"], figures["dense"]
        time_ratio, memory_ratio = dense["seconds"] / ours["seconds"], dense["bytes"] / max(ours["bytes"], 1)
        print(f"{rollouts:>6} " + " ".join(f"{c:>20}" for c in cells), f"{time_ratio:6.1f}x, {memory_ratio:5.1f}x mem")


if __name__ == "__main__":
    main()
