"""What a configuration would need and take on given GPUs, before it is queued: memory, time, layouts that fit.

architecture  finding a model's config.json           activations  what layers keep for the backward pass
hardware      rates of GPUs, and assumed shares       timing       seconds of a step, phase by phase
parameters    how many parameters each rank holds     layouts      planning a layout, searching for layouts
memory        bytes on one GPU, part by part          tables       what `clipo plan` prints
host          bytes on a node's host                  dry_run      ranks built without memory
measured      what `clipo prove` found, for assumptions
"""
