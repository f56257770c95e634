"""Problems of reasoning-gym again, changed: other numbers, other names, or a clause that has no bearing on the answer.

A policy that has learned to solve a problem solves its changed forms; one that has learned its words or its answer does
not. Whoever evaluates on both learns which it is. Changes follow from (seed, problem) alone:

    numbers   the same words, every number drawn anew, and the answer with them
    names     the same numbers, every name and thing drawn anew; the answer stays
    clause    one sentence more, about something that the problem does not ask for; the answer stays

GSM-Symbolic (Mirzadeh et al., arXiv 2410.05229) does this by hand-made templates; its generators in reasoning-gym draw
words and numbers in one stream, which is recorded here and played back with one kind of draws replaced. Answers come
from the generator itself, never from the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from clipo_megatron.config.schema import Perturbation

_ATTEMPTS = 200  # draws until one differs as it should; templates with little choice need some

# What a clause is about, and the clause; `{n}` is a number of no consequence. A problem that mentions the thing gets
# another one. None has a person in it, to whom a pronoun of the problem could then refer.
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
    """A problem has no such changed form, as one without names; the message names the generator and the kind."""


def perturb(dataset: Any, index: int, kind: Perturbation, seed: int) -> dict[str, Any]:
    """The entry of one problem, changed.

    Args:
        dataset: of reasoning-gym, of a generator in `config.checks.PERTURBABLE`.
        index: of the problem.
        kind: what to change.
        seed: of the change.

    Raises:
        PerturbationError: no draw gave a problem that differs as it should.
    """
    rng = Random(f"{kind.value}/{seed}/{index}")
    return _FORMS[type(dataset).__name__](dataset, index, kind, rng)


def with_clause(question: str, clauses: tuple[tuple[str, str], ...], rng: Random) -> str:
    """One sentence more, before the sentence that asks; about a thing that the question does not mention."""
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
    """Draws as Random does, and keeps what was drawn, words and numbers apart."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.words: list[Any] = []
        self.numbers: list[Any] = []
        self._inside = False  # of another draw: randint calls randrange

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


class _Player(_Recorder):
    """Draws one kind anew and gives the other as it was recorded, one after another, as long as it lasts."""

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
        place = self.words if self._keeps_words else self.numbers
        place[-1] = self._kept.pop(0)
        return place[-1]


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
        player = _Player(rng.getrandbits(32), record, keeps_words)
        try:
            found = generate(player, dataset.config.difficulty)
        except (ValueError, ZeroDivisionError, IndexError):  # a generator that its own draws do not always suit
            continue
        if found["question"] == first["question"]:
            continue
        same_answer = found["answer"] == first["answer"]
        kept = player.words == record.words if keeps_words else player.numbers == record.numbers and same_answer
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
    if not re.search(rf"\b{variable}\b", equation):  # the generator makes 0 = 0 now and then
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


_FORMS: Mapping[str, Callable[[Any, int, Perturbation, Random], dict[str, Any]]] = {
    "GSMSymbolicDataset": _word_problem,
    "SimpleEquationsDataset": _equation,
}
