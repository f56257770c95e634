"""Where a command begins, `clipo` or `python -m clipo_megatron.cli`, which is how torchrun and Slurm start ranks.

Signals are handled before anything else is imported, so that none ends the process with a traceback.
"""

import os
import signal
import sys

signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

from clipo_megatron.runtime import stop_requests  # noqa: E402


def start() -> int:
    """Run this process's command line; returns the exit code: that of `main`, or 128 + the signal that ended it."""
    try:
        stop_requests.REQUESTS.install(tolerated=stop_requests.tolerated_at_start(sys.argv[1:]))
        from clipo_megatron.cli.main import main

        return main()
    except KeyboardInterrupt as request:
        return stop_requests.report(request)
    finally:
        stop_requests.ignore()


if __name__ == "__main__":
    sys.exit(start())
