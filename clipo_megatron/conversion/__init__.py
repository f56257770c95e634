"""Checkpoints between Hugging Face folders and Megatron's torch_dist, as streams, safe against being killed.

    to_megatron  what a conversion to torch_dist writes     work     the hidden folder it is written in; the journal
    to_hf        what a conversion to safetensors writes    running  threads, ranks, signals: doing it
    commands     `clipo convert`

A conversion is a list of units (`plan.Unit`). A unit reads tensors, writes its own spans of files, and is noted in a
journal once they are on disk; so whoever starts the same conversion again goes on after the last unit. The result is
renamed into its place when everything is there.
"""
