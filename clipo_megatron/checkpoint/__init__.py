"""Checkpoints: every state owner's state in one directory a step, complete or not there at all.

    checkpoints/step_000010/          written as .step_000010.partial, then renamed
        manifest.json                 step, facts of the run, size and CRC-32 of every file; written last
        policy/                       Megatron's torch_dist: parameters and optimizer, loadable in any layout
        hf/                           config.json, tokenizer and what else stood beside the model's first weights
        <owner>.safetensors, .json    tensors and plain values of each other owner

A checkpoint is the state of one moment, taken by all ranks together (`states.py`), and written afterwards, by threads
while training goes on or at once (`writing.py`). Which old ones stay is `retention.py`'s. A checkpoint that was cut
short or changed on disk is recognised by its manifest and passed over for an older one.
"""

from clipo_megatron.checkpoint.checkpoints import Checkpoints, newest
from clipo_megatron.checkpoint.states import CheckpointError, Owner, PolicyState

__all__ = ["CheckpointError", "Checkpoints", "Owner", "PolicyState", "newest"]
