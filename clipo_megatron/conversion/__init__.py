"""Checkpoints between Hugging Face folders and Megatron's torch_dist, as streams, and the proof that they are equal.

    conversion   a conversion as a list of units     running      does it: threads, signals, the final rename
    to_megatron  writes torch_dist                   work_folder  the hidden folder in which it is written
    to_hf        writes safetensors                  dry_run      what it would write, and how long that would take
    verify       compares two folders, with compare (tensors), logits, and verification_report (what is shown)

A unit of work reads some tensors and writes its own parts of files. When everything is on disk, one rename gives the
result its name; a conversion that was killed starts again from the beginning.
"""
