"""Warnings of libraries that tell a user of this package nothing, by module and message; everything else is shown."""

from __future__ import annotations

import sys
import warnings

# (start of the message, module that warns)
NOISE: tuple[tuple[str, str], ...] = (
    # Optional kernels are absent: `clipo doctor` says so, and what runs instead.
    ("Transformer Engine and Apex are not installed", r"megatron\.core\."),
    ("Apex is not installed", r"megatron\.core\."),
    # An expert is divided over fewer ranks than the rest.
    ("`sequence_parallel` is set to `True`, but tensor model parallel size is 1", r"megatron\.core\.tensor_parallel\."),
    # Megatron's own use of what it or torch has deprecated.
    ("full scope is deprecated", r"megatron\.core\.transformer\."),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\."),
    ("`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    ("Please use DTensor instead and we are deprecating ShardedTensor", r"torch\.distributed\."),
    # Megatron asks every parameter for a gradient, its fp32 views included.
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer\."),
)


def quiet_libraries() -> None:
    """Ignore `NOISE` in this process; before the libraries are imported. `python -W` and PYTHONWARNINGS win."""
    if sys.warnoptions:
        return
    for message, module in NOISE:
        warnings.filterwarnings("ignore", message=message, module=module)
