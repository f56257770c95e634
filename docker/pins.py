"""The packages of an image that no later installation may change: `write FILE` pins them, `check FILE` compares."""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# What computes and communicates, and what was compiled against it or is imported by the image's engine.
KEPT = re.compile(
    r"torch.*|triton|numpy|nvidia-.*|cuda-.*|flash-?attn.*|flashinfer.*|sgl.*|vllm|transformers|apex", re.I
)


def pins() -> dict[str, str]:
    """Version of each such package that is installed, by its name."""
    found = {each.metadata["Name"]: each.version for each in distributions()}
    return {name: version for name, version in sorted(found.items()) if KEPT.fullmatch(name.replace("_", "-"))}


def main(action: str, file: Path) -> None:
    now = pins()
    if action == "write":
        file.write_text("".join(f"{name}=={version}\n" for name, version in now.items()))
        return
    before = dict(line.split("==") for line in file.read_text().splitlines())
    changed = [
        f"{name} {old} became {now.get(name, 'nothing')}" for name, old in before.items() if now.get(name) != old
    ]
    if changed:
        sys.exit("the image's packages were changed: " + "; ".join(changed))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
