"""What `clipo prove` measures of a machine, with random models: that it computes as a CPU does, and how fast.

outcome      a line of the table, and what a check returns       drift        bf16 against fp32
models       random models and rollouts                          speed        log-probs, attention, whole updates
machine      versions, and the attention kernel of each shape    states       a snapshot during updates, a resume
agreement    this device against the CPU                         memory       handles of memory, release and restore
checks       all checks in their order

Each check runs in a process of its own, and imports neither pyarrow nor reasoning-gym.
"""
