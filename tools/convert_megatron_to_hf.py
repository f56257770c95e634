"""`clipo convert to-hf`, as a script: python tools/convert_megatron_to_hf.py CHECKPOINT OUT [--dtype ...]."""

import sys

from clipo_megatron.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.main(["convert", "to-hf", *sys.argv[1:]]))
