"""Checkpoints: the state of a run in one folder per step, complete or absent.

    checkpoints/step_000010/          written as .step_000010.partial, then renamed
        manifest.json                 step, facts of the run, size and CRC-32 of every file; written last
        policy/                       Megatron's torch_dist: parameters and optimizer, loadable in any layout
        critic/                       the same of the critic, if the run has one
        hf/                           config.json, tokenizer and the other files beside the model's first weights
        <item>.safetensors, .json     tensors and plain values of each other item

All ranks take a snapshot together (`states.py`). It is written afterwards, in a thread while training continues or at
once (`writing.py`); `retention.py` decides which older checkpoints stay. A checkpoint that was truncated or changed on
disk is recognised by its manifest, and an older one is used.
"""

from clipo_megatron.checkpoint.checkpoints import Checkpoints, newest
from clipo_megatron.checkpoint.states import CheckpointContents, CheckpointError, CheckpointItem, ModelCheckpointer

__all__ = ["CheckpointContents", "CheckpointError", "CheckpointItem", "Checkpoints", "ModelCheckpointer", "newest"]
