"""Pack what `clipo prove` needs on a bare machine with Python, torch and transformers, as one file that runs itself.

    python tools/pack_machine.py machine.pyz --python 3.12
    scp machine.pyz gpu-node: && ssh gpu-node python3 machine.pyz            # is `clipo prove`
    ssh gpu-node python3 machine.pyz prove --only updates                    # any command of clipo

The machine needs no network, no pip and no rights. The file holds this package, Megatron, and what their commands on
models import, in the versions of constraints/ for the machine's Python; it unpacks itself into a temporary folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipapp
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 60 * 10**6
# Packages with compiled parts, of which the wheels for the machine's Python are taken, and packages without any.
COMPILED = ("megatron-core", "psutil", "safetensors", "aiohttp", "orjson", "PyYAML", "multidict", "yarl", "frozenlist",
            "propcache")  # fmt: skip
PURE = ("omegaconf", "antlr4-python3-runtime==4.9.3", "rich", "markdown-it-py", "mdurl", "pygments", "math-verify",
        "latex2sympy2_extended", "aiosignal", "aiohappyeyeballs", "attrs", "idna", "packaging")  # fmt: skip
_MAIN = '''\
"""Unpacks this file, and runs the command line of clipo from there."""
import os, subprocess, sys, tempfile, zipfile

with tempfile.TemporaryDirectory(prefix="clipo-machine-") as folder:
    zipfile.ZipFile(os.path.dirname(os.path.abspath(__file__))).extractall(folder)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    words = sys.argv[1:] or ["prove"]
    command = [sys.executable, "-m", "clipo_megatron.cli", *words]
    sys.exit(subprocess.call(command, env=os.environ | {"PYTHONPATH": path}))
'''


def fill(folder: Path, constraints: Path, python: str) -> None:
    """Put the packages into a folder that an interpreter of version `python` can import from."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    pip += ["--target", str(folder), "--constraint", str(constraints)]
    wheels = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in ("manylinux2014_x86_64", "manylinux_2_28_x86_64"):
        wheels += ["--platform", platform]
    subprocess.run([*pip, *wheels, *COMPILED], check=True)
    subprocess.run([*pip, *PURE], check=True)
    shutil.copytree(ROOT / "clipo_megatron", folder / "clipo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for left in ("bin", "include"):
        shutil.rmtree(folder / left, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the file to write, such as machine.pyz")
    parser.add_argument("--python", default="3.12", help="of the machine; default 3.12")
    parser.add_argument(
        "--set", default="megatron-0.16", help="versions: a file of constraints/; default megatron-0.16"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fill(folder, ROOT / "constraints" / f"{options.set}.txt", options.python)
        (folder / "__main__.py").write_text(_MAIN)
        zipapp.create_archive(folder, options.file, interpreter="/usr/bin/env python3", compressed=True)
    size = options.file.stat().st_size
    print(f"{options.file}: {size / 1e6:.1f} MB for Python {options.python}")
    if size > MOST_BYTES:
        sys.exit(
            f"{options.file} is larger than {MOST_BYTES / 1e6:.0f} MB. Leave out what `clipo prove` does not import."
        )


if __name__ == "__main__":
    main()
