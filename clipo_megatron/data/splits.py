"""The training problems and the held-out problems of a run, which are disjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipo_megatron.config.model_folder import vocab_size
from clipo_megatron.config.schema import RunConfig, SourceConfig
from clipo_megatron.data.preparing import PromptSettings, prompt_file, prompts_of, rereader
from clipo_megatron.data.prompt_table import PromptTable
from clipo_megatron.data.sources import DataError, source_of

Say = Callable[[str], None]
Once = Callable[[Callable[[], Path]], Path]  # calls a function on one rank, and gives all ranks what it returned


class ProblemSets:
    """The training problems and the held-out problems of a configuration.

    Args:
        config: the run's configuration.
        tokenizer: the policy's.
        say: is told what is left out.
        folder: where the files of prompts are kept; None for files that are gone when nobody uses them any more.
        once: by which ranks that share `folder` have the files made by one of them.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        say: Say,
        folder: Path | None = None,
        once: Once = lambda make: make(),
    ):
        self.config, self.tokenizer, self.say = config, tokenizer, say
        self._folder, self._once = folder, once

    def held_out(self) -> PromptTable | None:
        """Evaluation prompts, none of a source twice; None without data.eval.

        Raises:
            DataError: a source cannot be read or rendered, or its prompts have tokens that the model has not.
        """
        if not self.config.data.eval:
            return None
        found = self._load(self.config.data.eval, "evaluation")
        first = found.distinct()
        if len(first) < len(found):
            for source, repeated in _counts(found).items():
                if (left_out := repeated - _counts(first)[source]) > 0:
                    self.say(
                        f"{left_out} of {repeated} evaluation problems of {source} repeat others and are left out: a "
                        "paired test counts each problem once"
                    )
        return first

    def training(self, held_out: PromptTable | None) -> PromptTable:
        """Training prompts, without those of `held_out` unless data.hold_out is false.

        Raises:
            DataError: as for `held_out`, or nothing is left to train on.
        """
        found = self._load(self.config.data.train, "training")
        train = found.without(held_out) if self.config.data.hold_out and held_out is not None else found
        if not len(train):
            raise DataError(
                f"all {len(found)} training problems are also evaluation problems, and data.hold_out leaves those out. "
                "Give other problems to data.train or data.eval, or set data.hold_out=false"
            )
        if len(train) < len(found):
            self.say(
                f"{len(found) - len(train)} of {len(found)} training problems are also evaluation problems and are "
                "left out (data.hold_out)"
            )
        return train

    def _load(self, sources: Sequence[SourceConfig], purpose: str) -> PromptTable:
        config, limit = self.config, self.config.data.max_prompt_tokens
        options = config.model.template_options
        settings = PromptSettings(config.model.system_prompt, limit, options)
        if self._folder is None:
            found = prompts_of(sources, self.tokenizer, settings)
        else:
            folder = self._folder
            file = self._once(lambda: prompt_file(sources, self.tokenizer, settings, folder))
            found = PromptTable(file, reread=rereader(sources))
        if found.too_long:
            self.say(
                f"{found.too_long} of {found.too_long + len(found)} {purpose} prompts are longer than "
                f"data.max_prompt_tokens = {limit} and are left out"
            )
        if found.unanswered:
            names = ", ".join(found.unanswered[:5])
            count = len(found.unanswered)
            self.say(f"{count} {purpose} problems have an empty \\boxed{{}} as answer and are left out: {names}")
        size = vocab_size(config.model.path)
        if size is not None and found.largest_token >= size:
            raise DataError(
                f"prompt {found.largest_in} has the token {found.largest_token}, and the vocabulary of model.path = "
                f"{config.model.path} has {size} (vocab_size of its config.json). Give the model the tokenizer that it "
                "was trained with."
            )
        return found


def _counts(table: PromptTable) -> dict[str, int]:
    found: dict[str, int] = {}
    for index in range(len(table)):
        source = source_of(table.id_of(index))
        found[source] = found.get(source, 0) + 1
    return found
