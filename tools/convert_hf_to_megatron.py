"""`clipo convert to-megatron`, as a script: python tools/convert_hf_to_megatron.py HF_DIR OUT [--tp N ...]."""

import sys

from clipo_megatron.cli import main as cli

if __name__ == "__main__":
    sys.exit(cli.main(["convert", "to-megatron", *sys.argv[1:]]))
