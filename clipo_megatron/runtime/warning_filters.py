"""Filters for warnings of libraries that a user of this package can do nothing about; all others are shown."""

from __future__ import annotations

import sys
import warnings

# (start of the message, module that warns)
NOISE: tuple[tuple[str, str], ...] = (
    # Optional kernels are absent; `clipo doctor` reports it, and what runs instead.
    ("Transformer Engine and Apex are not installed", r"megatron\.core\."),
    ("Apex is not installed", r"megatron\.core\."),
    ("absl.logging is not installed", r"megatron\.core\."),
    (r"\w+ is experimental and still under active development", r"megatron\.core\."),
    # Experts are divided over fewer ranks than the other layers.
    ("`sequence_parallel` is set to `True`, but tensor model parallel size is 1", r"megatron\.core\.tensor_parallel\."),
    # Megatron itself uses what it or torch has deprecated.
    ("full scope is deprecated", r"megatron\.core\.transformer\."),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\."),
    ("`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    ("Please use DTensor instead and we are deprecating ShardedTensor", r"torch\.distributed\."),
    # Megatron reads the gradient of every parameter, its fp32 views included.
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer\."),
)


def quiet_libraries() -> None:
    """Ignore `NOISE` in this process. Call it before the libraries are imported; `python -W` and PYTHONWARNINGS win."""
    if sys.warnoptions:
        return
    for message, module in NOISE:
        warnings.filterwarnings("ignore", message=message, module=module)
