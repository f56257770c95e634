"""Enters the sandbox and prints the layers that are in force: `python -m clipo_megatron.rewards.sandbox`."""

from __future__ import annotations

import json

from clipo_megatron.config.schema import GraderSandbox
from clipo_megatron.rewards.sandbox import enter

if __name__ == "__main__":
    print(json.dumps(enter(GraderSandbox.auto)))
