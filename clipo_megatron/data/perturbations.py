"""Perturbed problems of reasoning-gym: other numbers, other names, or a clause that has no bearing on the answer.

A policy that has learned to solve a problem also solves its perturbed forms; one that has memorised its text or answer
does not. A perturbation is a function of (seed, problem):

    numbers   the same text, every number drawn again, and the answer with them
    names     the same numbers, every name and thing drawn again; the answer stays
    clause    one more sentence about something that the question does not ask for; the answer stays

GSM-Symbolic (Mirzadeh et al., arXiv 2410.05229) has hand-made templates for this. Its generators in reasoning-gym draw
words and numbers from one random stream, which is recorded here and replayed with one kind of draws replaced. Answers
come from the generator, never from the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from clipo_megatron.config.schema import Perturbation

_ATTEMPTS = 200  # most draws until one differs as it should; templates with few choices need several

# (thing, clause about it); `{n}` becomes a number. A problem that mentions the thing gets another clause. No clause
# mentions a person, to whom a pronoun of the problem could then refer.
_CLAUSES = (
    ("lighthouse", "A lighthouse {n} kilometres away was painted white last spring."),
    ("comet", "A comet could be seen from the town for {n} nights."),
    ("thunderstorm", "The last thunderstorm in the area was {n} days ago."),
    ("bridge", "The oldest bridge in the country has {n} arches."),
    ("giraffe", "A giraffe in the nearest zoo is {n} feet tall."),
    ("submarine", "There is a model of a submarine with {n} tiny windows in the museum."),
)
_EQUATION_CLAUSES = (
    ("blackboard", "The blackboard shows {n} other equations, which have been solved already."),
    ("student", "A student solved {n} other equations before this one."),
)


class PerturbationError(ValueError):
    """A problem has no form of this kind, such as one without names; the message names generator and kind."""


def perturb(dataset: Any, index: int, kind: Perturbation, seed: int) -> dict[str, Any]:
    """The entry of one problem, perturbed.

    Args:
        dataset: a data set of reasoning-gym whose generator is in PERTURBABLE.
        index: index of the problem.
        kind: what to change.
        seed: seed of the perturbation.

    Raises:
        PerturbationError: no draw gave a problem that differs as it should.
    """
    rng = Random(f"{kind.value}/{seed}/{index}")
    return _FORMS[type(dataset).__name__](dataset, index, kind, rng)


def with_clause(question: str, clauses: tuple[tuple[str, str], ...], rng: Random) -> str:
    """The question with a clause before its last question sentence, about a thing that it does not mention."""
    fitting = [text for thing, text in clauses if thing not in question.lower()]
    clause = rng.choice(fitting).format(n=rng.randint(11, 97))
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z$\"'])", question)
    asking = max((place for place, text in enumerate(sentences) if "?" in text), default=0)
    before, after = " ".join(sentences[:asking]), question[len(" ".join(sentences[:asking])) :].lstrip()
    if question.startswith(before) and before:
        return f"{before} {clause} {after}"
    return f"{clause} {question}"


# ---------------------------------------------------------------- word problems


class _Recorder(Random):
    """A Random that records what was drawn, words and numbers separately."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.words: list[Any] = []
        self.numbers: list[Any] = []
        self._inside = False  # whether a draw is in progress, since randint calls randrange

    def _draw(self, draw: Callable[[], Any]) -> Any:
        if self._inside:
            return draw()
        self._inside = True
        try:
            result = draw()
        finally:
            self._inside = False
        (self.words if _is_words(result) else self.numbers).append(result)
        return result

    def choice(self, seq: Any) -> Any:
        return self._draw(lambda: super(_Recorder, self).choice(seq))

    def sample(self, population: Any, k: int, **options: Any) -> Any:
        return self._draw(lambda: super(_Recorder, self).sample(population, k, **options))

    def randint(self, a: int, b: int) -> int:
        return self._draw(lambda: super(_Recorder, self).randint(a, b))

    def randrange(self, *bounds: Any) -> int:
        return self._draw(lambda: super(_Recorder, self).randrange(*bounds))

    def uniform(self, a: float, b: float) -> float:
        return self._draw(lambda: super(_Recorder, self).uniform(a, b))


class _Replayer(_Recorder):
    """Replays the recorded draws of one kind, in order and as long as they last, and draws the other kind again."""

    def __init__(self, seed: int, record: _Recorder, keeps_words: bool):
        super().__init__(seed)
        self._kept = list(record.words if keeps_words else record.numbers)
        self._keeps_words = keeps_words

    def _draw(self, draw: Callable[[], Any]) -> Any:
        if self._inside:
            return draw()
        fresh = super()._draw(draw)
        if _is_words(fresh) is not self._keeps_words or not self._kept:
            return fresh
        drawn = self.words if self._keeps_words else self.numbers
        drawn[-1] = self._kept.pop(0)
        return drawn[-1]


def _is_words(drawn: Any) -> bool:
    return isinstance(drawn, str) or (isinstance(drawn, list) and all(isinstance(each, str) for each in drawn))


def _word_problem(dataset: Any, index: int, kind: Perturbation, rng: Random) -> dict[str, Any]:
    entry = dataset[index]
    if kind is Perturbation.clause:
        return {**entry, "question": with_clause(entry["question"], _CLAUSES, rng)}
    generate = dataset.generators[dataset.task_indices[index]]
    record = _Recorder(dataset.seed + index)
    first = generate(record, dataset.config.difficulty)
    tail = entry["question"].removeprefix(first["question"])
    keeps_words = kind is Perturbation.numbers
    for _ in range(_ATTEMPTS):
        replayer = _Replayer(rng.getrandbits(32), record, keeps_words)
        try:
            found = generate(replayer, dataset.config.difficulty)
        except (ValueError, ZeroDivisionError, IndexError):  # some generators fail on some of their own draws
            continue
        if found["question"] == first["question"]:
            continue
        same_answer = found["answer"] == first["answer"]
        kept = replayer.words == record.words if keeps_words else replayer.numbers == record.numbers and same_answer
        if kept and same_answer is not keeps_words:
            facts = {**entry["metadata"], **found["metadata"]}
            return {**entry, **found, "question": found["question"] + tail, "metadata": facts}
    raise PerturbationError(
        f"problem {index} of gsm_symbolic (template {dataset.task_indices[index]}) has no form with other {kind.value}"
    )


# ---------------------------------------------------------------- equations


def _equation(dataset: Any, index: int, kind: Perturbation, rng: Random) -> dict[str, Any]:
    entry = dataset[index]
    question, facts = entry["question"], entry["metadata"]
    variable, equation = facts["variable"], facts["equation"]
    if not re.search(rf"\b{variable}\b", equation):  # the generator sometimes makes 0 = 0
        raise PerturbationError(f"problem {index} of simple_equations has no unknown: {equation}")
    if kind is Perturbation.clause:
        return {**entry, "question": with_clause(question, _EQUATION_CLAUSES, rng)}
    if kind is Perturbation.names:
        other = rng.choice([letter for letter in "abcdefghjkmnpqrstuvwxyz" if letter != variable])
        renamed = re.sub(rf"\b{variable}\b", other, equation)
        changed = re.sub(rf"\b{variable}\b", other, question.replace(equation, "\0")).replace("\0", renamed)
        return {**entry, "question": changed, "metadata": {**facts, "variable": other, "equation": renamed}}
    for _ in range(_ATTEMPTS):
        fresh, solution = dataset._generate_equation(rng, variable)
        if str(solution) != entry["answer"] and re.search(rf"\b{variable}\b", fresh):
            changed = question.replace(equation, fresh)
            return {**entry, "question": changed, "answer": str(solution), "metadata": {**facts, "equation": fresh}}
    raise PerturbationError(f"problem {index} of simple_equations has no form with other numbers")


PERTURBABLE = ("gsm_symbolic", "simple_equations")  # generators whose problems can be perturbed
_FORMS: Mapping[str, Callable[[Any, int, Perturbation, Random], dict[str, Any]]] = {
    "GSMSymbolicDataset": _word_problem,
    "SimpleEquationsDataset": _equation,
}
