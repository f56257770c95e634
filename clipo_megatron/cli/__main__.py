"""`python -m clipo_megatron.cli`, which torchrun and Slurm start ranks with."""

import sys

from clipo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
