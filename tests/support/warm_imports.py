"""What a fork server imports for all ranks and runs; see `warm`."""

import gc
import multiprocessing
import warnings

with warnings.catch_warnings(action="ignore"):
    import clipo_megatron.cli.main
    import clipo_megatron.rollout.local.engine
    import clipo_megatron.training.trainer  # noqa: F401

MAIN_PROCESS = multiprocessing.current_process()
gc.collect()
gc.freeze()
