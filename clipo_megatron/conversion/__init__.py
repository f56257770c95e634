"""Checkpoints between Hugging Face folders and Megatron's torch_dist, as streams, and the proof that they are equal.

    plan         a conversion as a list of units     running  threads and signals: doing it
    to_megatron  writing torch_dist                  work     the hidden folder it is written in
    to_hf        writing safetensors                 dry_run  what it would write, and how long that would take
    verify       comparing two folders, with compare (tensors), logits and verdict (what is shown)

A unit reads tensors and writes its own parts of files. The result gets its name in one rename when everything is on
disk; a conversion that was killed starts again from the beginning.
"""
