"""`clipo convert`: its three commands. Imports torch only when something is converted or compared."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron.cli.numbers import positive, whole

if TYPE_CHECKING:
    import torch

    from clipo_megatron.conversion.conversion import Conversion

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

DESCRIPTION = """\
Move weights between Hugging Face folders and Megatron checkpoints, exactly, in any layout, and prove it.

  to-megatron  Hugging Face folder -> checkpoint that training starts from (model.path) in any layout
  to-hf        checkpoint, of conversion or of training -> Hugging Face folder for transformers, SGLang, vLLM
  verify       whether two folders hold the same weights, tensor by tensor

Conversions run on a CPU, in one process, and need memory for a few tensors, not for the model. OUT appears when it is
complete; a conversion that was stopped or killed starts again from the beginning. Nothing is ever overwritten.
"""
EXAMPLES = """\
examples:
  clipo convert to-megatron Qwen3-8B checkpoints/qwen3-8b --tp 4 --pp 2
  clipo convert to-hf runs/demo/checkpoints/step_000200 release
  clipo convert verify Qwen3-8B checkpoints/qwen3-8b
"""
_TO_MEGATRON = """\
Write the checkpoint OUT from HF_DIR, a Hugging Face folder with safetensors.

OUT holds policy/ (Megatron's torch_dist, with keys for each layer), hf/ (config, tokenizer and the other sidecar files
of HF_DIR, which is not needed again) and manifest.json (size and CRC-32 of every file).

Any layout can load the result. --tp, --pp, --vpp, --ep, --etp, --first-layers and --last-layers say how training will
probably divide the model: each of its ranks then finds its part in few files.
"""
_TO_MEGATRON_EXAMPLES = """\
examples:
  clipo convert to-megatron Llama-3.1-70B checkpoints/llama-70b --tp 8 --pp 8
  clipo convert to-megatron Qwen3-30B-A3B checkpoints/qwen3-moe --ep 8 --pp 2 --dtype bf16
  clipo convert to-megatron Llama-3.1-70B checkpoints/llama-70b --tp 8 --dry-run

Then: clipo train run.yaml model.path=checkpoints/llama-70b
"""
_TO_HF = """\
Write the Hugging Face folder OUT from CHECKPOINT: a checkpoint of `convert to-megatron`, or of training
(train.output/checkpoints/step_N). The folder of a run stands for its newest checkpoint, which is named. The files of
the checkpoint are first compared with its manifest.

The weights are divided over files as in the checkpoint's own source, and unchanged files are the same byte for byte,
unless you give --max-shard-gb.
"""
_TO_HF_EXAMPLES = """\
examples:
  clipo convert to-hf runs/demo release                                        its newest checkpoint
  clipo convert to-hf runs/demo/checkpoints/step_000200 release --dtype bf16 --max-shard-gb 5
  clipo convert to-hf runs/demo/checkpoints/step_000200 masters --master       the optimizer's fp32 weights
  clipo convert to-hf old/step_000100 release --hf Qwen2.5-7B-Instruct         checkpoints without hf/
"""
_VERIFY = """\
Tell whether A and B hold the same weights: names, shapes, dtypes and a SHA-256 of every tensor, and the facts of their
config.json. Each is a Hugging Face folder, a checkpoint, or the folder of a run, which stands for its newest
checkpoint. The exit code is 1 if they differ.
"""
_VERIFY_EXAMPLES = """\
examples:
  clipo convert verify Qwen3-8B checkpoints/qwen3-8b
  clipo convert verify Qwen3-8B release --dtype bf16       after a conversion that cast
  clipo convert verify Qwen3-8B release --logits           also through transformers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title=argparse.SUPPRESS, metavar="COMMAND", required=True)

    def command(
        name: str, text: str, examples: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, description=text, epilog=examples, formatter_class=plain)
        parser.set_defaults(convert=run)
        return parser

    parser = command("to-megatron", _TO_MEGATRON, _TO_MEGATRON_EXAMPLES, _to_megatron)
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to make")
    for name, words in (
        ("tp", "tensor-parallel ranks"),
        ("pp", "pipeline ranks"),
        ("vpp", "model chunks of each pipeline rank"),
        ("ep", "expert-parallel ranks"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=whole(), default=1, help=words)
    parser.add_argument("--etp", metavar="N", type=whole(), help="tensor-parallel ranks of each expert; default --tp")
    parser.add_argument("--first-layers", metavar="N", type=whole(), help="layers of the first pipeline rank")
    parser.add_argument("--last-layers", metavar="N", type=whole(), help="layers of the last pipeline rank")
    _add_common(parser)

    parser = command("to-hf", _TO_HF, _TO_HF_EXAMPLES, _to_hf)
    parser.add_argument(
        "source", metavar="CHECKPOINT", type=Path, help="folder with policy/ and manifest.json, or of a run"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--max-shard-gb", metavar="GB", type=positive, help="largest file of weights")
    parser.add_argument("--master", action="store_true", help="the optimizer's fp32 weights in place of the parameters")
    parser.add_argument("--hf", metavar="DIR", type=Path, help="config and tokenizer, if the checkpoint has none")
    _add_common(parser)

    parser = command("verify", _VERIFY, _VERIFY_EXAMPLES, _verify)
    parser.add_argument("a", metavar="A", type=Path, help="one folder")
    parser.add_argument("b", metavar="B", type=Path, help="the folder that it is compared with")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to cast to before comparing")
    parser.add_argument("--logits", action="store_true", help="also compare logits, through transformers")
    parser.add_argument(
        "--tolerance", metavar="X", type=positive, help="largest difference of logits over the largest; default 1e-5"
    )
    parser.add_argument("--show", metavar="N", type=whole(0), default=20, help="differences to list; default 20")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    if (rank := os.environ.get("RANK", "0")) != "0":  # set by torchrun
        print(f"rank {rank} has nothing to do: rank 0 alone does all of `clipo convert`", file=sys.stderr)
        return 0
    return options.convert(options)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="cast to it on the way; default: as it is")
    parser.add_argument("--threads", metavar="N", type=whole(), help="threads that read and write; default up to 4")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def _to_megatron(options: argparse.Namespace) -> int:
    from clipo_megatron.conversion.to_megatron import ToMegatron
    from clipo_megatron.weights.parallel_division import ParallelDivision

    sizes = ("tp", "pp", "vpp", "ep", "etp", "first_layers", "last_layers")
    division = ParallelDivision(**{name: getattr(options, name) for name in sizes})
    kind: type[ToMegatron] = ToMegatron
    if options.dry_run:
        from clipo_megatron.config.model_folder import is_checkpoint
        from clipo_megatron.conversion.dry_run import ConfigOnlyConversion, has_weights

        # A checkpoint is no source: ToMegatron says so.
        kind = ToMegatron if has_weights(options.source) or is_checkpoint(options.source) else ConfigOnlyConversion
    return _convert(options, kind(options.source, _target(options), division=division, dtype=_dtype(options.dtype)))


def _to_hf(options: argparse.Namespace) -> int:
    from clipo_megatron.conversion.newest_step import newest_step
    from clipo_megatron.conversion.to_hf import ToHF

    conversion = ToHF(
        newest_step(options.source),
        _target(options),
        dtype=_dtype(options.dtype),
        shard_bytes=options.max_shard_gb and int(options.max_shard_gb * 1e9),
        master=options.master,
        hf=options.hf,
    )
    if conversion.dropped:
        print(f"left out, computed from config.json: {', '.join(conversion.dropped)}")
    return _convert(options, conversion)


def _convert(options: argparse.Namespace, conversion: Conversion) -> int:
    if options.dry_run:
        from clipo_megatron.conversion import dry_run

        return dry_run.run(conversion)
    from clipo_megatron.conversion.running import convert

    seconds = convert(conversion, threads=options.threads)
    rate = conversion.nbytes / 1e6 / max(seconds, 1e-9)
    print(f"{conversion.target}: {conversion.nbytes / 1e9:.2f} GB in {seconds:.1f} s, {rate:.0f} MB/s")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from clipo_megatron.conversion import verify
    from clipo_megatron.conversion.newest_step import newest_step

    def say(line: str) -> None:
        print(line, file=sys.stderr)  # standard output may be JSON

    tolerance = verify.TOLERANCE if options.tolerance is None else options.tolerance
    return verify.run(
        newest_step(options.a, say),
        newest_step(options.b, say),
        dtype=_dtype(options.dtype),
        with_logits=options.logits,
        tolerance=tolerance,
        shown=options.show,
        as_json=options.json,
    )


def _target(options: argparse.Namespace) -> Path:
    """Return OUT as an absolute path: `.` and `..` have no name that the hidden folder could be called after."""
    return Path(os.path.abspath(options.target))


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, DTYPES[name])
