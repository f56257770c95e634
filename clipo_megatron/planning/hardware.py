"""The rates of GPUs by their makers' data sheets, and the share of them that a plan assumes."""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.config.ranges import within

GB = 1e9


@dataclass(frozen=True, slots=True)
class Hardware:
    """A kind of GPU in its usual server. Rates are those of one GPU, in one direction."""

    name: str
    memory_bytes: float
    flops: float  # bf16, dense
    memory_bytes_per_s: float
    node_bytes_per_s: float  # to other GPUs of the node
    network_bytes_per_s: float  # to other nodes
    fp8_flops: float | None = None  # dense; None: it has no FP8
    gpus_per_node: int = 8
    host_bytes: float = 2000 * GB  # memory of a node's host


HARDWARE: dict[str, Hardware] = {
    each.name: each
    for each in (
        Hardware("a100", 80 * GB, 312e12, 2.04e12, 300 * GB, 25 * GB),
        Hardware("h100", 80 * GB, 989e12, 3.35e12, 450 * GB, 50 * GB, 1979e12),
        Hardware("h200", 141 * GB, 989e12, 4.8e12, 450 * GB, 50 * GB, 1979e12),
        Hardware("b200", 180 * GB, 2250e12, 8.0e12, 900 * GB, 50 * GB, 4500e12),
        Hardware("mi300x", 192 * GB, 1307e12, 5.3e12, 448 * GB, 50 * GB, 2615e12),
    )
}


def hardware_of_gpu(name: str) -> Hardware | None:
    """The row of a GPU by the name that its driver gives it, such as "NVIDIA H200"; None: the table has none."""
    words = name.lower().replace("-", " ").replace(",", " ").split()
    return next((each for each in HARDWARE.values() if each.name in words), None)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the hardware's rates that are reached, and other numbers that a plan cannot know.

    None of them was measured by this project; they are of the order that well-tuned runs report. `clipo plan --assume`
    sets others.
    """

    train_flops: float = within(0.40, above=0, most=1)  # of `flops`, in forward and backward
    fp8_flops: float = within(0.26, above=0, most=1)  # of the GPU's, in layers' products with `megatron.fp8`
    prefill_flops: float = within(0.40, above=0, most=1)  # in the servers' forward over prompts
    decode_bandwidth: float = within(0.50, above=0, most=1)  # of `memory_bytes_per_s`, while servers generate
    network: float = within(0.60, above=0, most=1)  # of `network_bytes_per_s`
    memory: float = within(
        0.92, above=0, most=1
    )  # of `memory_bytes` that may be planned for; fragments and spikes take the rest
    reserve_bytes: float = within(
        3.0 * GB, 0, 1000 * GB
    )  # context, communication buffers and workspaces of one process
    server_memory: float = within(0.85, above=0, most=1)  # of the GPU that a server takes for weights and cache
    host_memory: float = within(0.9, above=0, most=1)  # of `host_bytes` that may be planned for
    transfer_s: float = within(
        1.0e-4, 0, 1
    )  # of a micro-batch between two pipeline stages, beside its bytes: its shape is sent first
    error: float = within(0.1, 0, below=1)  # share by which times must differ before the plan tells them apart
    mean_response: float = within(0.5, above=0, most=1)  # of rollout.max_new_tokens
    mean_prompt: float = within(0.5, above=0, most=1)  # of data.max_prompt_tokens
