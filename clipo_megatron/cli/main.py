"""The `clipo` command. Each command imports what it needs, so that help and refusals come at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipo_megatron import __version__
from clipo_megatron.cli import evaluate as evaluation
from clipo_megatron.cli import report as page
from clipo_megatron.cli import scale as scaling
from clipo_megatron.cli import submit as submission
from clipo_megatron.cli.convert import add_arguments
from clipo_megatron.runtime.warning_filters import quiet_libraries

if TYPE_CHECKING:
    from clipo_megatron.config.schema import RunConfig
    from clipo_megatron.runtime.launch import Launch

USER_ERROR = 2

_OVERVIEW = """\
Contrastive policy optimisation (CLIPO) for reinforcement learning with verifiable rewards, on Megatron.

commands:
  train      train a model as a configuration file says
  submit     the same as a Slurm job that survives its walltime, preemption and lost ranks
  scale      that job on several numbers of nodes, and what each GPU delivers there
  eval       how many held-out problems a checkpoint solves: pass@1, pass@k, maj@k, set by set
  compare    two such results, problem by problem: which is better, and could that be luck
  report     runs as one HTML page: curves, accuracies, representation, texts, time
  serve      run the servers that generate for it, SGLang or vLLM
  convert    move weights between Hugging Face and Megatron, in any layout, and verify them
  plan       what a configuration needs and takes on given GPUs, and which layouts fit
  settings   every setting of a configuration: its type, default and meaning
  methods    every baseline and plug-in: what it changes, its paper, its options
  doctor     what this machine has, and what a run would use of it
"""
_EXAMPLES = """\
examples:
  clipo train run.yaml                          one machine; starts its own ranks when the layout needs several
  clipo train run.yaml layout.tp=2 train.steps=50
  clipo train run.yaml --check                  only check the configuration, the model folder and the data
  torchrun --nproc-per-node 8 -m clipo_megatron.cli train run.yaml
  srun --ntasks-per-node 8 clipo train run.yaml
  clipo serve run.yaml                          the servers of a run with rollout.engine=sglang; keeps them running
  clipo submit run.yaml --nodes 4 --gpus-per-node 8    a job of Slurm that comes back by itself
  clipo scale run.yaml --nodes 1,2,4,8 --gpus-per-node 8    weak and strong scaling, measured
  clipo eval runs/mine/checkpoints/step_000100 eval.samples=16 eval.temperature=0.6
  clipo report runs/grpo runs/clipo             both as one HTML page
  clipo settings clipo                          the settings of one section

`clipo COMMAND --help` says more. CLIPO_TRACEBACK=1 shows where an error comes from.
"""
_TRAIN = """\
Train a model as CONFIG, a YAML file, says. `key=value` overrides settings; values are YAML.

Without a launcher, a layout of several ranks is started on this machine, and Ctrl-C ends the run after its step.
Under torchrun or srun this process is one of the ranks.
"""
_TRAIN_EXAMPLES = """\
examples:
  clipo train run.yaml
  clipo train run.yaml layout.pp=2 clipo.weight=0.1 name=weak-bonus
  clipo train run.yaml 'data.train=[{path: train.parquet, suffix: " Think."}]' data.train[0].size=1000
  clipo train run.yaml model.system_prompt= reward.by_source='{my/set: math}' --check

`clipo settings` lists every key.
"""
_SERVE = """\
Run the servers that generate for the training that CONFIG describes, until Ctrl-C.

They are started as `model`, `rollout` and `serve` say, with any further options of the sections `sglang` and `vllm`,
registered in train.output/servers, where `clipo train` finds them, and started again when they die or hang. Their logs
are in train.output/logs. On a machine without a GPU the engine gets an environment of its own, once.
"""
_SERVE_EXAMPLES = """\
examples:
  clipo serve run.yaml rollout.engine=sglang serve.servers=2
  clipo serve run.yaml --check                  show the command lines, and start nothing
  clipo serve run.yaml serve.tp=4 sglang.mem_fraction_static=0.8 serve.python=envs/sglang/bin/python
  CLIPO_API_KEY=... clipo serve run.yaml serve.host=0.0.0.0

Train with the same file and overrides: clipo train run.yaml rollout.engine=sglang
"""
_PLAN = """\
Memory on each GPU, part by part, and the time of a step, phase by phase, before anything is queued.

Needs the model's config.json, no weights and no GPU. Parameters are counted as the ranks will build them. Times follow
from the GPUs' data sheets and assumed shares of their rates: good for comparing layouts, no promise.

With --gpus, the layouts of so many GPUs that fit, cheapest step first; else the configured one. --dry-run builds every
rank of that with Megatron, without memory, and compares its parameters with the plan. The exit code is 1 if none fits,
or a rank is not as planned.
"""
_PLAN_EXAMPLES = """\
examples:
  clipo plan run.yaml                                   the layout as it is configured
  clipo plan run.yaml layout.tp=8 layout.pp=4 layout.dp=2 serve.servers=8 serve.tp=4
  clipo plan run.yaml --gpus 64,128 --hardware h200     layouts to choose from
  clipo plan run.yaml --gpus 64 rollout.colocated=true --json
  clipo plan run.yaml --assume train_flops=0.3 --assume mean_response=0.8
  clipo plan run.yaml --dry-run --rank 0,63             build two ranks, as a check of the plan
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error that the user can correct, 128 + a signal."""
    options = _parse(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `clipo settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_for_users(error) or os.environ.get("CLIPO_TRACEBACK") == "1":
            raise
        if _speaks(options):
            print(f"clipo: {_rank_prefix()}{error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", USER_ERROR)


def is_for_users(error: BaseException) -> bool:
    """Whether the message alone tells the user what to do: true of every exception class that this package defines."""
    return type(error).__module__.partition(".")[0] == "clipo_megatron"


def _speaks(options: argparse.Namespace) -> bool:
    """Errors found before training are the same on every rank, so rank 0 tells them; later ones are each rank's own."""
    return getattr(options, "training", False) or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if rank != "0" else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more overrides after an option: `clipo train run.yaml --check layout.tp=2`
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides, rest = [*options.overrides, *rest], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    usage = "clipo [-h] [--version] COMMAND ..."
    parser = argparse.ArgumentParser(
        "clipo", usage=usage, description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=plain
    )
    parser.add_argument("--version", action="version", version=f"clipo {__version__}")
    commands = parser.add_subparsers(prog="clipo", help=argparse.SUPPRESS, metavar="COMMAND", required=True)

    train = commands.add_parser("train", description=_TRAIN, epilog=_TRAIN_EXAMPLES, formatter_class=plain)
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
    train.add_argument("--check", action="store_true", help="check everything that can be checked, and train nothing")
    train.set_defaults(run=_train)

    submission.add_arguments(commands.add_parser("submit"))
    scaling.add_arguments(commands.add_parser("scale"))

    evaluation.add_eval_arguments(evaluate := commands.add_parser("eval"))
    evaluate.set_defaults(run=_evaluate)
    evaluation.add_compare_arguments(commands.add_parser("compare"))

    serve = commands.add_parser("serve", description=_SERVE, epilog=_SERVE_EXAMPLES, formatter_class=plain)
    serve.add_argument("config", metavar="CONFIG", help="YAML file, the one that training gets")
    serve.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
    serve.add_argument("--check", action="store_true", help="print what would be started, and start nothing")
    serve.set_defaults(run=_serve)

    plan = commands.add_parser("plan", description=_PLAN, epilog=_PLAN_EXAMPLES, formatter_class=plain)
    plan.add_argument("config", metavar="CONFIG", help="YAML file, the one that training gets")
    plan.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
    plan.add_argument("--gpus", metavar="N,N", help="find layouts for these numbers of GPUs")
    plan.add_argument("--hardware", default="h100", help="a100 (80 GB), h100, h200, b200 or mi300x; default h100")
    plan.add_argument("--assume", action="append", default=[], metavar="name=number", help="change an assumption")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--dry-run", action="store_true", help="build the layout's ranks without memory, and compare")
    plan.add_argument("--rank", metavar="N,N", help="with --dry-run: build these ranks alone")
    plan.set_defaults(run=_plan)

    add_arguments(commands.add_parser("convert"))
    page.add_arguments(commands.add_parser("report"))

    settings = commands.add_parser("settings", description="Every setting, with its type, default and meaning.")
    settings.add_argument("section", metavar="SECTION", nargs="?", help="such as rollout, or algorithm.kl")
    settings.set_defaults(run=_settings)

    methods = commands.add_parser("methods", description="Every baseline and plug-in, with its paper and options.")
    methods.add_argument("names", metavar="METHOD", nargs="*", help="only these, such as dapo hapo")
    methods.set_defaults(run=_methods)

    doctor = commands.add_parser("doctor", description="What this machine has, and what a run would use of it.")
    doctor.set_defaults(run=_doctor)
    return parser


# ---------------------------------------------------------------- train


def _train(options: argparse.Namespace) -> int:
    from clipo_megatron.checks.run import check
    from clipo_megatron.config.load import load
    from clipo_megatron.runtime import launch

    place = launch.from_environment()
    config = load(options.config, options.overrides)
    check(config, ranks=place.world if place else None)
    if options.check:
        return _report_check(config, place)

    def work() -> None:
        from clipo_megatron.training.trainer import run

        run(config)

    words = ["train", options.config, *options.overrides]
    return _on_ranks(options, config, place, work, words, restarts=config.faults.restarts)


def _on_ranks(
    options: argparse.Namespace,
    config: RunConfig,
    place: Launch | None,
    work: Callable[[], None],
    words: Sequence[str],
    *,
    restarts: int,
) -> int:
    """Do the work as one of the ranks, or start ranks on this machine with `words`, the command line of each."""
    from clipo_megatron.checks.run import requested_ranks
    from clipo_megatron.runtime import launch

    if place is None and (ranks := requested_ranks(config.layout)) > 1:
        return _start_here(words, config, ranks, restarts=restarts)
    launch.adopt(place or launch.Launch(rank=0, world=1, local_rank=0))
    options.training = True
    quiet_libraries()
    work()
    return 0


def _start_here(words: Sequence[str], config: RunConfig, ranks: int, *, restarts: int) -> int:
    from clipo_megatron.runtime import launch
    from clipo_megatron.runtime.run_dir import newest_checkpoint, was_set_aside

    output = Path(config.train.output)
    arguments = [sys.executable, "-m", "clipo_megatron.cli", *words]
    earlier = was_set_aside(output)
    # A step may take as long as its rollouts and one collective do.
    patience = config.rollout.deadline_s + config.layout.distributed_timeout_s

    def start(attempt: int) -> int:
        # What was started over in an earlier attempt is gone on with in this one.
        resume = ["checkpoint.resume=true"] if attempt and earlier != was_set_aside(output) else []
        commands = launch.local_commands([*arguments, *resume], ranks, logs=output / "logs")
        return launch.supervise(commands, stop_deadline_s=patience)

    return launch.supervise_again(start, restarts=restarts, progress=lambda: newest_checkpoint(output))


def _report_check(config: RunConfig, place: Launch | None) -> int:
    from clipo_megatron.checks.run import data_parallel, requested_ranks
    from clipo_megatron.data.sources import DataError, overlap, read_all, without

    found, held_out = read_all(config.data.train), read_all(config.data.eval)
    train = without(found, held_out) if config.data.hold_out else found
    if not train:
        raise DataError(
            f"all {len(found)} training problems are also held out, and data.hold_out leaves those out of training. "
            "Give other problems, or set data.hold_out=false."
        )
    if place is not None and place.rank != 0:
        return 0
    layout, ranks = config.layout, place.world if place else requested_ranks(config.layout)
    replicas = data_parallel(layout, ranks)
    print(f"{config.name}: the configuration is sound.")
    print(f"  ranks     {ranks} = tp {layout.tp} x pp {layout.pp} x dp {replicas}")
    prompts, samples = config.data.prompts_per_step, config.rollout.samples_per_prompt
    print(f"  a step    {prompts} prompts x {samples} samples = {prompts * samples} rollouts")
    epochs = config.train.steps * prompts / len(train)
    print(f"  training  {len(train)} problems, {config.train.steps} steps = {epochs:.3g} epochs")
    shared = f", {overlap(train, held_out)} of them also trained on" if held_out else ""
    left_out = len(found) - len(train)
    shared += f"; {left_out} training problems are among them and left out" if left_out else ""
    print(f"  held out  {len(held_out)} problems{shared}")
    print(f"  output    {config.train.output}")
    return 0


# ---------------------------------------------------------------- eval


def _evaluate(options: argparse.Namespace) -> int:
    from clipo_megatron.checks.run import check
    from clipo_megatron.runtime import launch

    place = launch.from_environment()
    target = evaluation.find_target(options)
    check(target.config, ranks=place.world if place else None, trains=False)

    def work() -> None:
        from clipo_megatron.training.eval_run import evaluate_run

        file = Path(options.output) if options.output else None
        evaluate_run(target.config, checkpoint=target.checkpoint, file=file)

    return _on_ranks(options, target.config, place, work, ["eval", *evaluation.words_of(options)], restarts=0)


# ---------------------------------------------------------------- serve


def _serve(options: argparse.Namespace) -> int:
    from clipo_megatron.cli import serve as command
    from clipo_megatron.config.load import load

    config = load(options.config, options.overrides)
    return command.report_check(config) if options.check else command.serve(config)


# ---------------------------------------------------------------- plan


def _plan(options: argparse.Namespace) -> int:
    from clipo_megatron.cli.plan import Options, numbers, plan
    from clipo_megatron.config.load import load

    config = load(options.config, options.overrides)
    chosen = Options(
        numbers("--gpus", options.gpus or ""),
        options.hardware,
        tuple(options.assume),
        options.json,
        options.dry_run or options.rank is not None,
        numbers("--rank", options.rank or "", least=0),
    )
    quiet_libraries()
    return plan(config, options.config, chosen)


# ---------------------------------------------------------------- settings, methods, doctor


def _settings(options: argparse.Namespace) -> int:
    from clipo_megatron.config.errors import ConfigError, spell
    from clipo_megatron.config.load import nearest_keys
    from clipo_megatron.config.reference import MANDATORY, settings

    wanted = options.section
    chosen = [
        setting
        for setting in settings()
        if not wanted or setting.key == wanted or setting.key.startswith((f"{wanted}.", f"{wanted}[]"))
    ]
    if not chosen:
        near = nearest_keys(wanted)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`clipo settings` lists them all."
        raise ConfigError(f"there are no settings {wanted!r}. {hint}")
    width = max(len(setting.key) for setting in chosen)
    section = None
    for setting in chosen:
        if setting.section != section and section is not None:
            print()
        section = setting.section
        default = "must be given" if setting.default == MANDATORY else f"default {spell(setting.default)}"
        print(f"{setting.key:<{width}}  {setting.type}; {default}")
        if setting.comment:
            print(f"{'':<{width}}  # {setting.comment}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from clipo_megatron.cli.settings import listing

    print("\n".join(listing(options.names)))
    return 0


def _doctor(_options: argparse.Namespace) -> int:
    from clipo_megatron.cli.doctor import examine

    examine()
    return 0


if __name__ == "__main__":
    sys.exit(main())
