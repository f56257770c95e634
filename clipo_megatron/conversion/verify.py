"""`clipo convert verify A B`: whether two folders hold the same model.

A folder is a Hugging Face folder or a checkpoint, of a conversion or of training. Compared are the tensors under their
Hugging Face names (`compare`), the architecture that each config.json describes, and on demand the logits (`logits`).
A checkpoint's files are compared with its manifest as well. Tokenizers and other sidecar files are compared too, and
mentioned, but do not count.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clipo_megatron.config.model_folder import HF_FILES, hf_folder, is_checkpoint, read_object
from clipo_megatron.conversion.compare import Weights, compare
from clipo_megatron.conversion.logits import difference, logits
from clipo_megatron.conversion.verification_report import TOLERANCE, VerificationReport, show
from clipo_megatron.runtime.manifest import ManifestError, manifest_defects
from clipo_megatron.weights.errors import UnsupportedModel, WeightsError, WeightsFolderError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.reader import INDEX, SINGLE
from clipo_megatron.weights.formats.safetensors import SafetensorsFile
from clipo_megatron.weights.formats.source import SOURCE_HEADERS, Reader, open_weights
from clipo_megatron.weights.formats.torch_dist_reader import TorchDistReader
from clipo_megatron.weights.spec import ModelSpec, read_config

_NO_SIDECAR = (".safetensors", INDEX, SOURCE_HEADERS)  # ends of the names of weights, and of what describes them


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
        a: one folder.
        b: the other folder.
        dtype: compare the values after a cast to it, so that a conversion that cast can be verified.
        with_logits: also compare logits, through transformers.
        tolerance: largest difference of the logits, relative to the largest logit.
        shown: how many differences are listed; JSON has them all.
        as_json: print JSON instead of tables.

    Raises:
        WeightsFolderError: a path is no folder of weights at all.
    """
    with _bar() as progress:
        report = verify(
            Path(a), Path(b), cast=dtype, with_logits=with_logits, tolerance=tolerance, details=shown, progress=progress
        )
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        show(report, shown)
    return 0 if report.equal else 1


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
    report = VerificationReport(a, b, tolerance=tolerance)
    report.defects = {side: _defects(path) for side, path in (("A", a), ("B", b))}
    report.architecture, tied = _compare_architectures(configs, report.remarks)
    report.remarks += _other_files(hf_folder(a), hf_folder(b))
    for side, path in (("A", a), ("B", b)):
        report.remarks += _beside_the_index(side, path)
    side = "A"
    try:
        with open_weights(a) as left:
            side = "B"
            with open_weights(b) as right:
                report.defects["A"] += _unknown(left)
                report.defects["B"] += _unknown(right)
                report.comparison = compare(left, right, tied=tied, cast=cast, details=details, progress=progress)
                if with_logits:
                    _compare_logits(report, left, right)
    except (WeightsError, ManifestError) as error:
        report.defects[side].append(str(error))
    report.seconds = time.monotonic() - start
    return report


def _config(path: Path) -> dict[str, Any]:
    if is_checkpoint(path) and not (hf_folder(path) / "config.json").is_file():
        raise WeightsFolderError(
            f"{path} holds no {HF_FILES}/ with config.json (it is older than that, or not ours): convert it with "
            f"`clipo convert to-hf {path} OUT --hf MODEL`, and verify OUT"
        )
    return read_config(hf_folder(path))


def _unknown(weights: Reader) -> list[str]:
    """List parameters of a checkpoint that its architecture has no place for."""
    keys = weights.unknown if isinstance(weights, TorchDistReader) else []
    return [f"{weights.folder} holds {key}, which the model of its config.json does not have" for key in keys]


def _compare_logits(report: VerificationReport, left: Weights, right: Weights) -> None:
    found = []
    try:
        for path, weights in ((report.a, left), (report.b, right)):
            found.append(logits(weights, hf_folder(path)))
        report.logits = difference(*found)
    except WeightsError as error:
        report.logits_error = f"no logits of {'AB'[len(found)]}: {error}" if len(found) < 2 else str(error)


def _defects(folder: Path) -> list[str]:
    """List what is broken in a folder, whatever the other one is like."""
    if hf_folder(folder) != folder:
        return manifest_defects(folder)
    return list(_misplaced_tensors(folder))


def _misplaced_tensors(folder: Path) -> Iterator[str]:
    """List damaged files, and tensors that the index places in a file that does not hold them."""
    for path, named, held in _indexed_files(folder):
        if isinstance(held, str):
            yield held
            continue
        yield from (
            f"{path} does not hold {name}, though {INDEX} places it there" for name in sorted(named) if name not in held
        )


def _beside_the_index(side: str, folder: Path) -> Iterator[str]:
    """Remark on what an index leaves out: tensors of its files, which count all the same, and whole files, unread.

    That is what transformers, SGLang and vLLM make of such a folder.
    """
    files = {path.name: (named, held) for path, named, held in _indexed_files(folder)}
    placed = {name for named, _ in files.values() for name in named}
    for file, (_, held) in files.items():
        if not isinstance(held, str) and (more := sorted(set(held) - placed)):
            yield f"{side}: {file} holds {', '.join(more)}, which {INDEX} does not name; compared all the same"
    if files and (unread := sorted(path.name for path in folder.glob("*.safetensors") if path.name not in files)):
        yield f"{side}: {', '.join(unread)}: not named by {INDEX}, and not read"


def _indexed_files(folder: Path) -> Iterator[tuple[Path, list[str], Sequence[str] | str]]:
    """Yield (file, tensors that the index places in it, tensors that it holds, or what is wrong with it)."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    named: dict[str, list[str]] = {}
    try:
        for name, file in read_object(folder / INDEX)["weight_map"].items():
            named.setdefault(Path(file).name, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the reader will say so
    for path in sorted(folder / file for file in named):
        try:
            file = SafetensorsFile(path)
        except WeightsFolderError as error:
            yield path, named[path.name], str(error)
        except (OSError, ValueError):
            continue  # the reader will say so
        else:
            held = list(file.header.tensors)
            file.close()
            yield path, named.get(path.name, []), held


def _compare_architectures(configs: dict[str, dict[str, Any]], remarks: list[str]) -> tuple[list[str], bool]:
    """List facts that differ, and tell whether the output layer is tied to the embedding."""
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
    """Compare the sidecar files: tokenizer and the like."""

    def files(folder: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.endswith(_NO_SIDECAR)
        }

    left, right = files(a), files(b)
    words = []
    for what, names in (
        ("only in A", left.keys() - right.keys()),
        ("only in B", right.keys() - left.keys()),
        ("differ", {name for name in left.keys() & right.keys() if left[name] != right[name]}),
    ):
        if names:
            words.append(f"sidecar files, {what}: {', '.join(sorted(names))}")
    return words or [f"the {len(left)} sidecar files are the same"]


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show a line of progress on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("comparing tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
