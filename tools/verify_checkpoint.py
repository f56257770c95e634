"""`clipo convert verify`, as a script: python tools/verify_checkpoint.py A B [--logits] [--dtype ...] [--json]."""

import sys

from clipo_megatron.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.main(["convert", "verify", *sys.argv[1:]]))
