r"""What a prompt asks for: the form of the answer, the options to choose from, and whether it opens the thinking.

    "... put your final answer within \boxed{}."                        boxed
    "... output the final answer after \"####\"."                       hashes
    "The last line ... of the form Answer: $Answer (without quotes)"    line
    "... say: The final answer is X."                                   sentence
    "... within <answer> </answer> tags."                               <answer>

Graders read an answer in the forms that its prompt asks for, and `--check` refuses prompts that ask for none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

# How thinking opens and closes: <think>, [THINK], ◁think▷, <seed:think>, <|begin_of_thought|>, <|START_THINKING|>,
# <longcat_think>, <|think_start|> and the like, in any case. What closes has a slash or says that it ends. Where a text
# has channels, every one but the final one is thinking.
THINKING = re.compile(
    r"[<\[◁]\s*(?=[|/\w:]{3,40}\s*[>\]▷])\|?(?P<closing>/|end_?(?:of_?)?)?\|?(?:(?:start|begin)_?(?:of_?)?|\w{1,20}[:_])?"
    r"(?P<family>think|thought|reason|reflection|scratchpad|analysis|cot|rationale)(?:ing|s)?"
    r"(?:_(?:start|begin|(?P<ending>end)))?\|?\s*[>\]▷]"
    r"|<\|channel\|?>\s*(?:(?P<final>final)|analysis|commentary|thought)\b(?:<\|message\|>)?",
    re.IGNORECASE,
)
ANSWER_TAGS = ("answer", "final_answer", "finalanswer", "ans", "solution", "result", "final")

_BOX = re.compile(r"(?<=\\)f?boxed?\b|\b(?:boxed|fbox)\b", re.IGNORECASE)
_HASHES = re.compile(
    r"[\"'`“”‘’(]\s*#{4}|#{4}(?=\s*(?:[-+$\\]?\d|[\[<{($]|[\"'`”’.,;:]|(?:answer|ans|final|n|x|result)\b|$))"
    r"|(?:after|with|by|following|using|format)\s*:?\s*#{4}",
    re.IGNORECASE | re.MULTILINE,
)
_LINE = re.compile(r"(?:\banswer|答案)[\"'*`”’]*\s*[:：]\s*(?=\S|$)", re.IGNORECASE)
_BEFORE_SENTENCE = re.compile(r"\b(?:the|your)\s+(?:(?:final|correct|best|right)\s+)*$", re.IGNORECASE)
_SENTENCE = re.compile(
    r"answer\s+(?:is|would be)\s*:?\s*"
    r"(?=[\[<{($\"'`*\\X]|_|\d+\b|[A-J]\b|(?:N|answer|letter|number|insert|your)\b|\.\.)",
    re.IGNORECASE,
)
_LONGEST_TAG = 50
_NEAR = 80  # characters before the word "answer" in which a sentence that asks for it begins
_TAG = re.compile(rf"<({'|'.join(ANSWER_TAGS)})\s*>", re.IGNORECASE)
# the prompt's end, which the response follows
_COMPLETION = re.compile(r"(?:\banswer|答案)\s*[:：]\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for.

    Attributes:
        forms: "boxed", "hashes", "line", "sentence" and tags such as "<answer>"; empty where the prompt names none, or
            is not known.
        options: label and text of the options of a multiple-choice question.
        thinking: whether the prompt ends with thinking that it opened, so that the response begins inside it.
    """

    forms: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    thinking: bool = False

    @classmethod
    def by_prompt(cls, text: str) -> Asked:
        """What the text of a prompt asks for, as the model reads it or as the user wrote it."""
        return cls(asked_forms(text), options_of(text), opens_thinking(text))

    @classmethod
    def by_turns(
        cls, messages: Iterable[Mapping[str, Any]], *, forms: tuple[str, ...] | None = None, thinking: bool = False
    ) -> Asked:
        """What chat turns ask for.

        Args:
            messages: the turns; the options are the last one's.
            forms: what the rendered prompt asks for; None: read them from the turns.
            thinking: whether the rendered prompt opens the thinking.
        """
        texts = [str(turn.get("content", "")) for turn in messages]
        found = asked_forms("\n".join(texts)) if forms is None else forms
        return cls(found, options_of(texts[-1]) if texts else {}, thinking)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Asked:
        """What `as_json` wrote."""
        return cls(tuple(found["forms"]), found["options"], found["thinking"])

    def as_json(self) -> dict[str, Any]:
        """A mapping of values that JSON carries."""
        return {"forms": list(self.forms), "options": dict(self.options), "thinking": self.thinking}


NOTHING = Asked()


@lru_cache(maxsize=1024)
def asked_forms(text: str) -> tuple[str, ...]:
    """The forms in which the text of a prompt asks for the answer."""
    found = []
    # Patterns are tried where their word is: to search whole texts for them takes longer than to tokenize these.
    if any(_BOX.match(text, place) or _BOX.match(text, max(0, place - 1)) for place in _places("box", text)):
        found.append("boxed")
    if "####" in text and _HASHES.search(text):
        found.append("hashes")
    places = _places("answer", text) + _places("答案", text)
    if any(_LINE.match(text, place) and not _COMPLETION.match(text, place) for place in places):
        found.append("line")
    if any(
        _SENTENCE.match(text, place) and _BEFORE_SENTENCE.search(text[max(0, place - _NEAR) : place])
        for place in places
    ):
        found.append("sentence")
    if "<" in text:
        found += dict.fromkeys(f"<{tag[1].lower()}>" for tag in _TAG.finditer(text))
    return tuple(found)


def _places(word: str, text: str) -> list[int]:
    """Where a word begins in a text, in letters of either case."""
    lower = text.lower()
    if len(lower) != len(text):  # a letter such as İ has two letters in lower case, and moves the rest
        return [found.start() for found in re.finditer(word, text, re.IGNORECASE)]
    places, place = [], lower.find(word)
    while place >= 0:
        places.append(place)
        place = lower.find(word, place + 1)
    return places


def opens_thinking(text: str) -> bool:
    """Whether a rendered prompt ends with thinking that it opened."""
    tags = list(THINKING.finditer(text, max(0, len(text.rstrip()) - _LONGEST_TAG)))
    return bool(tags) and not closes_thinking(tags[-1]) and not text[tags[-1].end() :].strip()


def closes_thinking(tag: re.Match[str]) -> bool:
    """Whether a tag of thinking closes it."""
    return any(tag[sign] is not None for sign in ("closing", "ending", "final"))


# ---------------------------------------------------------------- options

_LABEL = re.compile(
    r"(?:(?<=^)|(?<=[\s,;|])|(?<=quad))(?:[-*•]\s+)?(?:\*\*|\$|\\textbf\s*\{|\\text\s*\{|\\mathrm\s*\{|\\quad|\\qquad|[~\s])*"
    r"(?:option\s+|choice\s+)?[(\[（]?\s*([A-Z]|[a-j]|[1-9])\s*"
    r"(?:[)\]）]|[.:：、．)](?=\s|\*|\S)|\s-\s)(?:\s*[:.])?(?:\*\*|\}|\$|\\)*\s*",
    re.MULTILINE,
)
_LONGEST_QUESTION = 20_000


@lru_cache(maxsize=1024)
def options_of(text: str) -> Mapping[str, str]:
    """Label and text of the options that a question lists: A, B, C ..., on lines or in one; {} where there are none."""
    text = text[-_LONGEST_QUESTION:]
    labels = list(_LABEL.finditer(text))
    best: list[re.Match[str]] = []
    for first in ("A", "a", "1"):
        for start in (index for index, label in enumerate(labels) if label[1] == first):
            run = _run(labels, start)
            if len(run) >= max(2, len(best)) and (first != "1" or len(run) >= 3):
                best = run
        if best:
            break
    if len(best) < 2:
        return {}
    ends = [after.start() for _, after in pairwise(best)]
    end = text.find("\n", best[-1].end())
    ends.append(len(text) if end < 0 else end)
    return {label[1].upper(): _tidy(text[label.end() : end]) for label, end in zip(best, ends, strict=True)}


def _run(labels: list[re.Match[str]], start: int) -> list[re.Match[str]]:
    """The label at `start` and those that continue it: B after A, C after B."""
    run = [labels[start]]
    for label in labels[start + 1 :]:
        if label[1] == chr(ord(run[-1][1]) + 1):
            run.append(label)
        elif label[1] == run[0][1]:
            break
    return run


def _tidy(option: str) -> str:
    return re.sub(r"(?:\\qquad|\\quad|[\s,;$|])+$", "", option.strip()).strip()
