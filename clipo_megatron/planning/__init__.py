"""What a configuration would need and take on given GPUs, before it is queued: memory, time, layouts that fit.

architecture  finding a model's config.json           memory   bytes on one GPU, part by part
hardware      rates of GPUs, and assumed shares       timing   seconds of a step, phase by phase
parameters    how many parameters each rank holds     layouts  planning a layout, searching for layouts
dry_run       ranks built without memory              tables   what `clipo plan` prints
measured      what `clipo prove` found, for assumptions
"""
