r"""Finds the final answer of a response, and the gold answer of a ground truth, in whatever form they are stated.

    "<think>\boxed{5}</think> So \boxed{6}."      6: thinking holds no answer
    "<think>Perhaps \boxed{5}?"                   nothing: it was cut while it thought
    "$x = \boxed{1}$ and $y = \boxed{2}$"         x = 1, y = 2: all boxes of the last statement
    "It is \boxed{5}; I put it in a \boxed."      5: a box without content is a mention
    "... #### 42", "Answer: 42"                   42, where the prompt asks for that form

Mode `reference` has rules of its own (`answer.py`).
"""

from __future__ import annotations

import re
from functools import lru_cache

from clipo_megatron.data.asked import ANSWER_TAGS, NOTHING, THINKING, Asked, closes_thinking
from clipo_megatron.rewards.answer import last_boxed
from clipo_megatron.rewards.equality import answers_agree
from clipo_megatron.rewards.spelling import without_control_tokens

_BOX = re.compile(r"\\+(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_MINUS = re.compile(r"(?:[=$(\[{]|\\[(\[])\s*-$")  # -\boxed{5} is -5; 7-\boxed{5} and an item of a list are 5
_BARE = re.compile(r"([-+]?\d[\d,.]*|(?:(?<=\s)[A-Za-z]|\\(?!\\)[A-Za-z]+)(?![A-Za-z]))\s*(?=[$.,;!)\]\\]|$|\n)")
_BRACES = re.compile(r"\\[\\{}]|[{}]")
_ALL_BRACES = re.compile(r"[{}]")
_BETWEEN = re.compile(  # what joins the boxes of one statement
    r"(?P<joiner>[,;]?\s*(?:\\text\s*\{\s*)?(?:and|or|as well as|&)?(?:\s*\})?|[,;]|\\(?:qquad|quad))\s*"
    r"(?P<name>(?:\\?[A-Za-z]\w*(?:_\{?\w+\}?)?'?(?:\([a-z]\))?\s*(?:=|\\in))?)"
)
_ITEM = re.compile(r"\n\s*(?:[-*•]|\d{1,2}[.)]|\([a-z\d]\))\s+")
_MATH_MARKS = re.compile(r"\\[\[\]()]|\$|~|\\[,;:!> ]|\\(?:qquad|quad)(?![A-Za-z])|\*\*")
_NAME_BEFORE = re.compile(r"(\\?[A-Za-z]\w*(?:_\{?\w+\}?)?'?(?:\([a-z]\))?)\s*=\s*$")
_HASHES = re.compile(r"#{4,}[ \t]*([^\n#]*\S)")
_LINE = re.compile(
    r"(?:\banswer|答案)[\"'*`”’]*\s*[:：][*_ \t]*(?:\n\s*)?(?:(?:\\\[|\$\$)\s*\n\s*)?([^\n]*\S)", re.IGNORECASE
)
_SENTENCE = re.compile(r"\banswer\s+(?:is|would be)[*_\s]*[:：]?\s*([^\n]*\S)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s+(?=[A-Z])|(?<=\S)\s*I hope it is correct.*$|\.\s*$")
_TAGS = {name: [re.compile(rf"<{slash}{name}\s*>", re.IGNORECASE) for slash in ("", "/")] for name in ANSWER_TAGS}
_PATTERNS = {"hashes": _HASHES, "line": _LINE, "sentence": _SENTENCE}
_MOST_BOXES = 20
_LONG = 60  # characters; a gold answer of more is a text that may end with its answer


def outside_thinking(response: str, *, opened: bool = False) -> str:
    """What a response says once it has thought; "" where its thinking is not closed.

    Args:
        response: the model's text.
        opened: whether the prompt opened the thinking.
    """
    if not any(sign in response for sign in "<[◁"):
        return "" if opened else response
    end, still_open = 0, {"of the prompt"} if opened else set()
    for tag in THINKING.finditer(response):
        family = (tag["family"] or "channel").lower()
        if not closes_thinking(tag):
            still_open.add(family)
            continue
        end = tag.end()
        if family in still_open:
            still_open.remove(family)
        else:
            still_open.clear()
    return "" if still_open else response[end:]


def stated_answers(response: str, asked: Asked = NOTHING) -> list[str]:
    """The readings of a response's final answer, of which one has to be right; [] where it states none.

    Only forms that the prompt asks for count. Where that is not known, a box counts, or else another form that cannot
    be mistaken.
    """
    text = without_control_tokens(outside_thinking(response, opened=asked.thinking))
    if asked.forms:
        found = [place for form in asked.forms if (place := _find(text, form)) is not None]
        return max(found, key=lambda place: place[0])[1] if found else []
    for form in ("boxed", "hashes", "<answer>", "line"):
        if (place := _find(text, form)) is not None:
            return place[1]
    return []


def box_or_text(response: str, *, thinking: bool = False) -> tuple[str | None, str]:
    """The last box outside thinking, None without one, and all the text there; an empty box at the end is a box."""
    text = without_control_tokens(outside_thinking(response, opened=thinking))
    boxes = last_boxes(text)
    return (last_boxed(text) if boxes is None else "".join(boxes[-1:])), text


@lru_cache(maxsize=1024)
def gold_answer(ground_truth: str) -> str:
    r"""The gold answer: the boxes at the end of a worked solution, what follows its last `####`, or the whole text."""
    boxed = last_boxes(ground_truth)
    if boxed is not None:
        return boxed[-1] if boxed else ""  # a box that never closes holds no answer
    if hashes := _HASHES.findall(ground_truth):
        return hashes[-1].strip()
    if len(ground_truth) > _LONG or "\n" in ground_truth:
        for pattern in (_LINE, _SENTENCE):
            if said := pattern.findall(ground_truth):
                return _SENTENCE_END.split(said[-1])[0].strip()
    return ground_truth.strip()


def last_boxes(text: str) -> list[str] | None:
    r"""The readings of the boxes of the last statement; None without a box, [] where the last one never closes.

    Several boxes joined by "and", "or" or a comma are one list. Boxes with only space between them may be a list or
    several attempts: both are readings.
    """
    found = _boxed_statement(text)
    return None if found is None else found[1]


def _find(text: str, form: str) -> tuple[int, list[str]] | None:
    """Where the last statement of this form begins, and its readings; None without one."""
    if form == "boxed":
        return _boxed_statement(text)
    if form.startswith("<"):
        start, said = last_tagged(text, form.strip("<>")) or (0, "")
    else:
        pattern, start, said = _PATTERNS[form], 0, ""
        for found in pattern.finditer(text):
            start, said = found.start(), found[1]
        while later := pattern.search(said):  # on the same line
            said = later[1]
    said = said.strip()
    if form == "sentence":
        said = _SENTENCE_END.split(said)[0]
    if not said:
        return None
    boxes = last_boxes(said)
    return start, [said] if boxes is None else boxes


def last_tagged(text: str, name: str) -> tuple[int, str] | None:
    """Where the last <name> that is closed begins, and what it holds; None without one. Takes time in proportion."""
    opening, closing = _TAGS[name]
    ends = list(closing.finditer(text))
    for number in range(len(ends) - 1, -1, -1):
        before = ends[number - 1].end() if number else 0
        if begun := opening.search(text, before, ends[number].start()):
            return begun.start(), text[begun.end() : ends[number].start()]
    return None


def _boxed_statement(text: str) -> tuple[int, list[str]] | None:
    boxes = _all_boxes(text)
    if not boxes:
        return None
    *before, (first, _, last) = boxes
    if last is None:
        return first, []
    parts, names, joined, start = [last], [_name_before(text, first)], True, first
    for begin, end, content in reversed(before[-_MOST_BOXES:]):
        between = " ".join(_MATH_MARKS.sub(" ", _ITEM.sub(" ", text[end:start][:200])).split())
        match = _BETWEEN.fullmatch(between)
        if not match or content is None:
            break
        joined &= bool(match["joiner"])
        if not any(answers_agree(content, part) for part in parts):
            parts.insert(0, content)
            names.insert(0, _name_before(text, begin))
        start = begin
    if len(parts) == 1:
        return first, [last]
    named = [f"{name} = {part}" for name, part in zip(names, parts, strict=True)] if all(names) else parts
    several = " , ".join(named)
    return first, [several] if joined else [last, several]


def _name_before(text: str, start: int) -> str:
    """The name of `x = \\boxed{...}` in front of a box at `start`."""
    found = _NAME_BEFORE.search(_MATH_MARKS.sub(" ", text[max(0, start - 40) : start]))
    return found[1] if found else ""


def _all_boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Start, end and content of the boxes that have content; None as the content of one that never closes."""
    if "box" not in text or (first := _BOX.search(text)) is None:
        return []
    pairs = _brace_pairs(text, first.start())
    boxes: list[tuple[int, int, str | None]] = []
    end = 0
    for box in _BOX.finditer(text, first.start()):
        if box.start() < end:
            continue  # inside another box
        if text.startswith("{", box.end()):
            closing = pairs.get(box.end())
            if closing is None:
                boxes.append((box.start(), box.end(), None))
                continue
            end, content = closing + 1, text[box.end() + 1 : closing]
        elif bare := _BARE.match(text, box.end()):
            end, content = bare.end(1), bare[1].rstrip(".,")
        else:
            continue
        if content.strip():
            if _MINUS.search(text, max(0, box.start() - 10), box.start()):
                content = f"-({content})" if re.search(r"[-+]", content) else f"-{content}"
            boxes.append((box.start(), end, content))
    return boxes


def _brace_pairs(text: str, start: int) -> dict[int, int]:
    r"""Where each brace after `start` closes. Where \{ and \} leave one open, they count as braces: \boxed{5\}."""
    pairs: dict[int, int] = {}
    for pattern in (_BRACES, _ALL_BRACES):
        opened: list[int] = []
        for brace in pattern.finditer(text, start):
            if brace[0] == "{":
                opened.append(brace.start())
            elif brace[0] == "}" and opened:
                pairs.setdefault(opened.pop(), brace.start())
        if not opened:
            break
    return pairs
