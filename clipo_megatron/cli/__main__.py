"""Runs the command line as `python -m clipo_megatron.cli`, which is how torchrun and Slurm start ranks."""

import sys

from clipo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
