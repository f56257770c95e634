"""What a configuration would need and take on given GPUs, before anything is queued: memory, time, layouts that fit.

hardware      what GPUs can do, and which share of it is assumed to be reached
parameters    how many parameters each rank holds, exactly
memory        bytes on one GPU, part by part
timing        seconds of a step, phase by phase
layouts       the layouts that fit, cheapest first
architecture  the model's facts, from its config.json alone
dry_run       ranks built without memory, and held against the plan
command       `clipo plan`
"""
