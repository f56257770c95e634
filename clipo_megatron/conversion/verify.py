"""`clipo convert verify A B`: whether two folders hold the same model, and the table that says so.

A folder is a Hugging Face folder or a checkpoint, of a conversion or of training. Compared are the tensors under their
Hugging Face names (`compare`), the architecture that each config.json describes, and on demand the logits (`logits`).
A checkpoint's files are checked against its manifest as well. Tokenizers and other files beside the weights are told
of, and are not part of the verdict.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipo_megatron.config.model_folder import HF_FILES, hf_folder, is_checkpoint
from clipo_megatron.conversion.compare import Fingerprint, TensorComparison, Weights, compare
from clipo_megatron.conversion.logits import LogitsDifference, difference, logits
from clipo_megatron.conversion.verdict import show
from clipo_megatron.weights.errors import UnsupportedModel, WeightsError, WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.manifest import manifest_defects
from clipo_megatron.weights.formats.reader import INDEX, SINGLE
from clipo_megatron.weights.formats.safetensors import SafetensorsFile
from clipo_megatron.weights.formats.source import LAYOUT, Reader, open_weights
from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader
from clipo_megatron.weights.spec import ModelSpec, read_config

TOLERANCE = 1e-5  # of logits, relative to the largest
_NOT_BESIDE = (".safetensors", INDEX, LAYOUT)  # weights, and how they lay


@dataclass(slots=True)
class VerificationReport:
    """Everything that was found."""

    a: Path
    b: Path
    defects: dict[str, list[str]] = field(default_factory=dict)  # by side: what is broken by itself
    comparison: TensorComparison | None = None  # None: a side could not be read at all
    architecture: list[str] = field(default_factory=list)  # facts of config.json that differ
    remarks: list[str] = field(default_factory=list)  # not part of the verdict
    logits: LogitsDifference | None = None
    logits_error: str = ""
    tolerance: float = TOLERANCE
    seconds: float = 0.0

    @property
    def logits_agree(self) -> bool:
        """Whether they are near enough, or nobody asked for them."""
        return not self.logits_error and (self.logits is None or self.logits.relative <= self.tolerance)

    @property
    def equal(self) -> bool:
        """Whether A and B are the same model, both undamaged."""
        return (
            self.comparison is not None
            and not self.comparison.differences
            and not any(self.defects.values())
            and not self.architecture
            and self.logits_agree
        )

    def as_json(self) -> dict[str, Any]:
        """For programs: plain values only."""

        def spell(value: Fingerprint | None) -> dict[str, Any] | None:
            if value is None:
                return None
            return {"sha256": value.sha256, "dtype": _plain(value.dtype), "shape": list(value.shape)}

        found = self.comparison
        return {
            "equal": self.equal,
            "a": {"folder": str(self.a), **(_totals(found.a) if found else {})},
            "b": {"folder": str(self.b), **(_totals(found.b) if found else {})},
            "equal_tensors": found.equal if found else 0,
            "differences": [
                {
                    "name": each.name,
                    "kind": each.kind.value,
                    "detail": each.detail,
                    "a": spell(each.a),
                    "b": spell(each.b),
                }
                for each in (found.differences if found else [])
            ],
            "defects": self.defects,
            "architecture": self.architecture,
            "remarks": self.remarks,
            "logits": asdict(self.logits) | {"relative": self.logits.relative} if self.logits else None,
            "logits_error": self.logits_error,
            "seconds": round(self.seconds, 3),
        }


def run(
    a: str | Path,
    b: str | Path,
    *,
    dtype: torch.dtype | None = None,
    with_logits: bool = False,
    tolerance: float = TOLERANCE,
    shown: int = 20,
    as_json: bool = False,
) -> int:
    """Verify, print what was found, and return the exit code: 0 for equal, 1 for not.

    Args:
        a: a folder, and `b` another.
        b: the other.
        dtype: compare the values after a cast to it, so that a conversion that cast can be verified.
        with_logits: also compare logits, through transformers.
        tolerance: of the logits, relative to the largest.
        shown: differences that are listed; JSON has them all.
        as_json: print JSON instead of tables.

    Raises:
        CheckpointError: a path is no folder of weights at all.
    """
    with _bar() as progress:
        verdict = verify(
            Path(a), Path(b), cast=dtype, with_logits=with_logits, tolerance=tolerance, details=shown, progress=progress
        )
    if as_json:
        print(json.dumps(verdict.as_json(), indent=1))
    else:
        show(verdict, shown)
    return 0 if verdict.equal else 1


def verify(
    a: Path,
    b: Path,
    *,
    cast: torch.dtype | None = None,
    with_logits: bool = False,
    tolerance: float = TOLERANCE,
    details: int = 20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerificationReport:
    """Compare two folders; arguments and errors as for `run`."""
    start = time.monotonic()
    configs = {side: _config(path) for side, path in (("A", a), ("B", b))}
    verdict = VerificationReport(a, b, tolerance=tolerance)
    verdict.defects = {side: _defects(path) for side, path in (("A", a), ("B", b))}
    verdict.architecture, tied = _compare_architectures(configs, verdict.remarks)
    verdict.remarks += _other_files(hf_folder(a), hf_folder(b))
    side = "A"
    try:
        with open_weights(a) as left:
            side = "B"
            with open_weights(b) as right:
                verdict.defects["A"] += _unknown(left)
                verdict.defects["B"] += _unknown(right)
                verdict.comparison = compare(left, right, tied=tied, cast=cast, details=details, progress=progress)
                if with_logits:
                    _compare_logits(verdict, left, right)
    except WeightsError as error:
        verdict.defects[side].append(str(error))
    verdict.seconds = time.monotonic() - start
    return verdict


def _config(path: Path) -> dict[str, Any]:
    if is_checkpoint(path) and not (hf_folder(path) / "config.json").is_file():
        raise WeightsFolderError(
            f"{path} holds no {HF_FILES}/ with config.json (it is older than that, or not ours): convert it with "
            f"`clipo convert to-hf {path} OUT --hf MODEL`, and verify OUT"
        )
    return read_config(hf_folder(path))


def _unknown(weights: Reader) -> list[str]:
    """Parameters of a checkpoint that its architecture has no place for."""
    keys = weights.unknown if isinstance(weights, TorchDistReader) else []
    return [f"{weights.folder} holds {key}, which the model of its config.json does not have" for key in keys]


def _compare_logits(verdict: VerificationReport, left: Weights, right: Weights) -> None:
    found = []
    try:
        for path, weights in ((verdict.a, left), (verdict.b, right)):
            found.append(logits(weights, hf_folder(path)))
        verdict.logits = difference(*found)
    except WeightsError as error:
        verdict.logits_error = f"no logits of {'AB'[len(found)]}: {error}" if len(found) < 2 else str(error)


def _defects(folder: Path) -> list[str]:
    """What is broken, whatever the other folder is like."""
    if hf_folder(folder) != folder:
        return manifest_defects(folder)
    return list(_strays(folder))


def _strays(folder: Path) -> Iterator[str]:
    """Tensors that the index and the files do not agree on: readers go by the one or the other."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    try:
        named: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    except (OSError, ValueError, KeyError):
        return  # the reader will say so
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = SafetensorsFile(path)
        except WeightsFolderError as error:
            yield str(error)
            continue
        held = sorted(file.header.tensors)
        file.close()
        yield from (f"{path} holds {name}, which {INDEX} does not place there" for name in held
                    if named.get(name) != path.name)  # fmt: skip


def _compare_architectures(configs: dict[str, dict[str, Any]], remarks: list[str]) -> tuple[list[str], bool]:
    """Facts that differ, and whether the output layer is tied to the embedding."""
    specs: dict[str, ModelSpec] = {}
    for side, config in configs.items():
        try:
            specs[side] = model_spec(config)
        except UnsupportedModel as error:
            remarks.append(f"{side}: {error}")
    if len(specs) < 2:
        keys = sorted({key for config in configs.values() for key in config} - {"transformers_version"})
        facts = [(key, configs["A"].get(key), configs["B"].get(key)) for key in keys]
        tied = all(config.get("tie_word_embeddings") is True for config in configs.values())
    else:
        one, other = (asdict(specs[side]) for side in ("A", "B"))
        facts = [(key, one[key], other[key]) for key in one]
        tied = all(spec.tied_embeddings for spec in specs.values())
    return [f"{key} is {left} in A and {right} in B" for key, left, right in facts if left != right], tied


def _other_files(a: Path, b: Path) -> list[str]:
    """Tokenizer and the like."""

    def files(folder: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.endswith(_NOT_BESIDE)
        }

    left, right = files(a), files(b)
    words = []
    for what, names in (
        ("only in A", left.keys() - right.keys()),
        ("only in B", right.keys() - left.keys()),
        ("differ", {name for name in left.keys() & right.keys() if left[name] != right[name]}),
    ):
        if names:
            words.append(f"files beside the weights, {what}: {', '.join(sorted(names))}")
    return words or [f"the {len(left)} files beside the weights are the same"]


def _totals(side: Any) -> dict[str, Any]:
    return {"tensors": side.tensors, "bytes": side.nbytes, "dtypes": dict(side.dtypes)}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A line of progress on standard error, where somebody looks at it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("comparing tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
