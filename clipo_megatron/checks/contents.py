"""Everything that a run reads before its first step, read beforehand by the functions with which the run reads it.

`run.py` judges settings; this reads what they name: the headers of the weights, the tokenizer and its chat template,
every row as a prompt, the classes of the method, and the folder that the run writes to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from clipo_megatron.checks.grading import grading_problems
from clipo_megatron.checks.method import build_method
from clipo_megatron.checks.stopping import check_stopping
from clipo_megatron.checks.weights import check_weights
from clipo_megatron.config.errors import ConfigError, is_for_users
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import EngineKind, RunConfig, SourceConfig
from clipo_megatron.data.prompt_table import PromptTable
from clipo_megatron.data.sources import rows_of_all, unread_fields
from clipo_megatron.data.splits import ProblemSets
from clipo_megatron.data.tokenizer import load_tokenizer, without_torch
from clipo_megatron.rewards.row_checks import check_answers
from clipo_megatron.rollout.local.supported import unusable
from clipo_megatron.runtime.run_dir import refuse_unwritable

TRIED = 8  # problems that are made of a generator where prompts are only tried


@dataclass
class Contents:
    """What was found of a run's problems; None where they could not be read on this machine."""

    train: PromptTable | None = None
    held_out: PromptTable | None = None
    remarks: tuple[str, ...] = ()  # what is left out, a sentence each


def check_contents(
    config: RunConfig,
    *,
    trains: bool = True,
    absent: Collection[str] = (),
    folder: Path | None = None,
    light: bool = False,
) -> Contents:
    """Read what a configuration names, which `check` has judged by itself.

    Args:
        config: the configuration.
        trains: whether it is to train; an evaluation reads no training problems and no critic.
        absent: settings that name what is not on this machine, which is passed over.
        folder: where the run keeps its prompts: all of them are made there. None: they are tried, and not kept.
        light: whether this process neither trains nor evaluates, so that torch need not be imported.

    Raises:
        ConfigError, DataError and others for users: what is wrong; all of it at once, where it can be told at once.
    """
    found, contents, remarks = _Findings(), Contents(), []
    tried = config if folder is not None else _of_few_problems(config)
    with found.noted():
        refuse_unwritable(Path(config.train.output))
    if found.errors:
        folder = None  # its place takes no files
    for key, path in (("model.path", config.model.path), ("critic.path", config.critic.path if trains else None)):
        if path is not None and key not in absent:
            with found.noted():
                check_weights(key, path)
    if "model.path" in absent:
        with found.noted():
            _read_rows(tried, trains, absent)
    else:
        tokenizer, stop_ids = None, ()
        with without_torch() if light else nullcontext(), found.noted():
            _refuse_engine(config)
            tokenizer = load_tokenizer(hf_folder(config.model.path))
            with found.noted():
                stop_ids = check_stopping(config, tokenizer)
            sets = ProblemSets(tried, tokenizer, remarks.append, folder)
            if not _any_absent("eval", absent):
                contents.held_out = sets.held_out()
            if trains and not _any_absent("train", absent):
                contents.train = sets.training(contents.held_out)
        if contents.train is not None:
            with found.noted():
                build_method(config, tokenizer, contents.train, stop_ids)
    if contents.train is not None or (contents.held_out is not None and not trains):
        with found.noted():
            _refuse_grading(config, contents, trains)
    found.refuse()
    contents.remarks = tuple(remarks)
    return contents


def unread_files(config: RunConfig) -> Iterator[tuple[str, list[str]]]:
    """The files of problems that have fields which nothing reads, and these fields."""
    for source in (*config.data.train, *config.data.eval):
        if source.path is not None and (unread := unread_fields(source.path)):
            yield source.path, unread


class _Findings:
    """Errors for users, which are collected and raised together."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A context whose error for users is noted, and ends it."""
        try:
            yield
        except Exception as error:
            if not is_for_users(error):
                raise
            if str(error) not in map(str, self.errors):  # several parts of a run may use the same broken file
                self.errors.append(error)

    def refuse(self) -> None:
        """Raise the only error, or one that says what all of them say; nothing where there is none."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = [f"  {number}. {error}" for number, error in enumerate(self.errors, start=1)]
            raise ConfigError("\n".join([f"{len(lines)} problems:", *lines]))


def _refuse_engine(config: RunConfig) -> None:
    local = config.rollout.engine is EngineKind.local
    if local and (reason := unusable(hf_folder(config.model.path))):
        raise ConfigError(reason)


def _refuse_grading(config: RunConfig, contents: Contents, trains: bool) -> None:
    sources: Counter[str] = Counter()
    for table in (contents.train, contents.held_out):
        sources.update(table.data_sources if table is not None else {})
    problems = list(grading_problems(config.reward, sources))
    if not trains:  # the rows of training are not known
        problems = [each for each in problems if not each.key.startswith("reward.by_source")]
    if problems:
        raise ConfigError(problems)
    for table in (contents.train, contents.held_out):
        if table is not None:
            check_answers(config, table.rows())


def _read_rows(config: RunConfig, trains: bool, absent: Collection[str]) -> None:
    """Read the rows of files and generators where there is no tokenizer to make prompts of them."""
    for part in ("train", "eval") if trains else ("eval",):
        if not _any_absent(part, absent):
            for _ in rows_of_all(getattr(config.data, part)):
                pass


def _any_absent(part: str, absent: Collection[str]) -> bool:
    return any(key.startswith(f"data.{part}[") for key in absent)


def _of_few_problems(config: RunConfig) -> RunConfig:
    """The configuration with a few problems of each generator, which takes long to make many.

    A few problems to train on may all be held out where many are not, so none are left out for that.
    """

    def few(source: SourceConfig) -> SourceConfig:
        return replace(source, size=min(source.size or 0, TRIED)) if source.generator else source

    data = config.data
    hold_out = data.hold_out and not any(source.generator for source in data.train)
    tried = replace(data, train=list(map(few, data.train)), eval=list(map(few, data.eval)), hold_out=hold_out)
    return replace(config, data=tried)
