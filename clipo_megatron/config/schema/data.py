"""The sections `data` and `reward`: which problems are asked, and how answers are graded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from clipo_megatron.config.ranges import within


class Perturbation(str, Enum):
    numbers = "numbers"  # drawn anew, and the answer with them
    names = "names"  # drawn anew; the answer stays
    clause = "clause"  # a sentence is added that has no bearing on the answer


class GraderMode(str, Enum):
    auto = "auto"  # chosen by the row's data_source
    math = "math"  # the final answer in the form that the prompt asks for, by its value
    reference = "reference"  # the last \boxed{}, by the rules of the paper's released grader
    choice = "choice"  # the option that the final answer names
    number = "number"  # the last number, in the last \boxed{} or else in the text, compared exactly
    reasoning_gym = (
        "reasoning_gym"  # the last <answer>, else the last \boxed{}, else the text, by the data set's own scorer
    )


class GraderSandbox(str, Enum):
    auto = "auto"  # every layer that this machine has; a warning names what it lacks
    required = "required"  # the run is refused where Landlock or seccomp is missing
    none = "none"  # graders may use files, programs and the network, and so may an answer that a grader runs as code


@dataclass
class SourceConfig:
    """One source of problems: a file with rows in verl's schema, or a reasoning-gym generator."""

    path: Optional[str] = None  # *.parquet or *.jsonl file
    generator: Optional[str] = None  # name of a reasoning-gym data set
    options: dict[str, Any] = field(default_factory=dict)  # the generator's own options
    size: Optional[int] = within(None, 1)  # rows to take from the file (null: all), or problems to generate
    seed: int = 0  # seed of the generator
    perturb: Optional[Perturbation] = None  # change each problem; for the generators gsm_symbolic and simple_equations
    name: Optional[str] = None  # name of the source in reports; null: the file's stem, or the generator's name
    suffix: str = ""  # text appended to the user's question

    @property
    def label(self) -> str:
        """What reports call the source: its name, its file's stem, or its generator with the perturbation."""
        changed = f"_{self.perturb.value}" if self.perturb else ""
        return self.name or (Path(self.path).stem if self.path else f"{self.generator or ''}{changed}")


@dataclass
class DataConfig:
    train: list[SourceConfig] = field(default_factory=list)  # sources of training prompts
    eval: list[SourceConfig] = field(default_factory=list)  # sources of held-out problems, each reported by itself
    prompts_per_step: int = within(16, 1)  # prompts of a step, over all ranks
    shuffle: bool = True  # a new order of the training prompts in every epoch; false: as they are listed
    max_prompt_tokens: int = within(512, 1)  # longer prompts are left out, and counted
    hold_out: bool = True  # leave every problem out of training that is also in data.eval


@dataclass
class RewardConfig:
    mode: GraderMode = GraderMode.auto  # how answers are graded
    by_source: dict[str, GraderMode] = field(default_factory=dict)  # data_source: mode, which wins over reward.mode
    sandbox: GraderSandbox = GraderSandbox.auto  # what holds grader processes back, should an answer run as code
    workers: int = within(1, 1, 1024)  # grader processes of each rank
    deadline_s: float = within(10.0, above=0)  # seconds for one answer; without a verdict by then it is ungraded
    correct_reward: float = 1.0  # reward of a correct answer
    wrong_reward: float = 0.0  # reward of a wrong one
