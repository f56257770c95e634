"""How fast new weights reach servers, against one plain broadcast of the same bytes in the same run.

    python tools/bench_sync.py MODEL http://127.0.0.1:30000 [more servers ...] --pp 2

The servers are real ones that hold the same model (`clipo serve`). Ranks of a trainer are started here: they hold the
model's weights, change them before each update, and send them as a run does. An update is timed from the call to its
return, with the groups formed before, once without checksums and once with them.

The plain broadcast runs between updates: as many processes as a sender's group has members exchange the same number of
bytes, once into new memory, as servers receive their buckets, and once into memory that they have used before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from clipo_megatron.config.schema import PoolConfig, SyncConfig
from clipo_megatron.rollout.engine import InFlight
from clipo_megatron.runtime.platform import LOCAL_RENDEZVOUS_ENV, platform
from clipo_megatron.sync.shard import Shard
from clipo_megatron.weights.export import Holder
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import HFReader
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.mapping import Coordinates, even_stages
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import read_config

TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("servers", nargs="+", help="URLs of SGLang servers of that model")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages of the trainer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=SyncConfig().bucket_mb)
    parser.add_argument("--changed", type=float, help="change this share of the values, and send only what has changed")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()

    nbytes = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors"))
    plain = Ranks(plain_rank, 1 + len(options.servers), nbytes)
    trainer = Ranks(trainer_rank, options.pp, options.model, options.servers, options.bucket_mb, options.changed)
    try:
        figures: dict[str, list[Any]] = {"plain": [], "update": [], "verified": []}
        figures["first"] = [trainer.ask(("update", True))]  # forms the groups, and takes the memory that senders keep
        for _ in range(options.rounds):
            figures["plain"].append(plain.ask(())[0])
            figures["update"].append(trainer.ask(("update", False)))
            figures["plain"].append(plain.ask(())[0])
            figures["verified"].append(trainer.ask(("update", True)))
    finally:
        plain.close()
        trainer.close()
    show(figures, options)


def show(figures: dict[str, list[Any]], options: argparse.Namespace) -> None:
    reports = {kind: [ranks[0][0] for ranks in figures[kind]] for kind in ("update", "verified")}
    nbytes = reports["update"][0].nbytes
    plain, used = (statistics.median(each) for each in zip(*figures["plain"], strict=True))
    facts: dict[str, Any] = {
        "pp": options.pp,
        "servers": len(options.servers),
        "bucket_mb": options.bucket_mb,
        "bytes": nbytes,
        "plain_s": plain,
        "plain_used_memory_s": used,
        "plain_all_s": figures["plain"],
    }
    print(
        f"{nbytes / 1e6:.0f} MB, {options.pp} senders, {len(options.servers)} servers, {options.bucket_mb} MiB a bucket"
    )
    print(f"plain broadcast     {plain:6.3f} s  {nbytes / plain / 1e6:6.0f} MB/s")
    print(f"  into used memory  {used:6.3f} s  {nbytes / used / 1e6:6.0f} MB/s")
    for kind, words in (("update", "update"), ("verified", "with checksums")):
        seconds = statistics.median(report.seconds for report in reports[kind])
        phases = {
            name: statistics.median(report.phases.get(name, 0.0) for report in reports[kind])
            for name in reports[kind][0].phases
        }
        facts |= {f"{kind}_s": seconds, f"{kind}_ratio": plain / seconds, f"{kind}_phases_s": phases}
        facts[f"{kind}_all_s"] = [report.seconds for report in reports[kind]]
        sent = statistics.median(report.sent for report in reports[kind])
        facts[f"{kind}_sent_bytes"] = sent
        print(
            f"{words:<18}  {seconds:6.3f} s  {nbytes / seconds / 1e6:6.0f} MB/s  {plain / seconds:5.0%} of plain   "
            f"{sent / 1e6:.1f} MB sent   " + "  ".join(f"{name} {value:.3f}" for name, value in phases.items())
        )
    bucket = options.bucket_mb * 2**20
    for rank in range(options.pp):
        peak = max(ranks[rank][1] for kind in ("first", "update", "verified") for ranks in figures[kind])
        facts[f"peak_buckets_rank{rank}"] = peak / bucket
        print(f"rank {rank}: peak extra memory {peak / 2**20:.0f} MiB, {peak / bucket:.2f} buckets")
    if options.json:
        Path(options.json).write_text(json.dumps(facts, indent=1))


# --- processes -------------------------------------------------------------------------------------------------------


class Ranks:
    """Processes in one process group that do something each time they are asked."""

    def __init__(self, function: Any, world: int, *args: Any):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self._store.port, rank, world, function, args))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, question: Any) -> list[Any]:
        """Ask all ranks, and return their answers in order of rank."""
        for pipe in self._pipes:
            pipe.send(question)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S:.0f} s")
            answers.append(pipe.recv())
        return answers

    def close(self) -> None:
        """Kill all ranks."""
        for process in self._processes:
            process.kill()
            process.join()


def serve(pipe: Connection, port: int, rank: int, world: int, function: Any, args: tuple[Any, ...]) -> None:
    os.environ |= LOCAL_RENDEZVOUS_ENV
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    platform().init_process_group(rank, world, timeout_s=TIMEOUT_S, store=store)
    answers = function(*args)
    next(answers)
    while True:
        pipe.send(answers.send(pipe.recv()))


def plain_rank(nbytes: int) -> Any:
    """Receives, or sends, all bytes at once; seconds until everybody has them, in new memory and in used memory."""
    used = torch.ones(nbytes, dtype=torch.uint8)
    answer = None
    while True:
        yield answer
        answer = []
        for again in (False, True):
            dist.barrier()
            start = time.perf_counter()
            data = used if again or dist.get_rank() == 0 else torch.empty(nbytes, dtype=torch.uint8)
            dist.broadcast(data, src=0)
            dist.barrier()
            answer.append(time.perf_counter() - start)
            del data


def trainer_rank(model: str, urls: list[str], bucket_mb: int, changed: float | None) -> Any:
    """Update the servers to changed weights; yields the report and by how many bytes this process has grown."""
    from clipo_megatron.config.schema import EngineKind
    from clipo_megatron.rollout.servers.pool import ServerPool
    from clipo_megatron.sync.broadcast import BroadcastSync

    shard, parameters = load(model)
    pool = None
    if shard.is_coordinator:
        pool = ServerPool(EngineKind.sglang, decode=str, config=PoolConfig(), endpoints=urls)
    config = SyncConfig(bucket_mb=bucket_mb, delta=changed is not None)
    sync = BroadcastSync(shard, pool, config, in_flight=InFlight.retract, join_deadline_s=60.0)
    answer, version = None, 0
    while True:
        _, verified = yield answer
        version += 1
        with torch.no_grad():
            for parameter in parameters.values():
                if changed is None:
                    parameter.mul_(1.0 + 0.01 * version)
                else:
                    parameter[torch.rand(parameter.shape) < changed] *= -1.0
        sync.config.verify_every = int(verified)
        before = reset_peak()
        report = sync.update_weights(version)
        answer = (report, peak() - before)


def load(folder: str) -> tuple[Shard, dict[str, torch.Tensor]]:
    """This pipeline stage of a model in bf16, without a network around it."""
    spec = model_spec(read_config(folder))
    rank, pp = dist.get_rank(), dist.get_world_size()
    stages = even_stages(spec.num_layers, pp)
    mine = entries(spec, stages[rank])
    parameters = {
        entry.megatron[0]: torch.empty(entry.sharding.local_shape(entry.shapes, 1), dtype=torch.bfloat16)
        for entry in mine
    }
    with HFReader(folder) as reader:
        load_into(parameters.items(), mine, reader, Coordinates())
    division, holder = ParallelDivision(pp=pp), Holder(pp_rank=rank)
    return Shard(spec, division, holder, lambda: [parameters], torch.bfloat16, rank), parameters


def reset_peak() -> int:
    """Resident bytes now; what `peak` says starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """Most resident bytes since `reset_peak`."""
    return status("VmHWM")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
