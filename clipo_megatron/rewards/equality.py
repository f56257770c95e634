r"""Whether two answers are equal as mathematics, part by part.

An answer is taken apart (`structure.py`), and its smallest parts are compared by value (`leaf.py`). A list or set is
compared in any order; tuples, intervals and matrices position by position, with the same brackets. An
inequality equals the interval of its solutions. "x = 5" equals 5; an equation that says something else ("7 = 11a + c",
"4 = 5") equals only an equation that says the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from clipo_megatron.rewards import closeness
from clipo_megatron.rewards.leaf import leaves_agree
from clipo_megatron.rewards.spelling import plain_spelling
from clipo_megatron.rewards.structure import Shape, shape_of

_NAME = re.compile(
    r"(?:m?\\angle\s*)?(?:\\triangle\s*)?(?:\\?[A-Za-z]+|\{[A-Za-z]+\}|\\text\{[^{}]*\}|\|[A-Z]{2}\|)(?:_\{?\w+\}?)?'*"
    r"(?:\^\{-1\})?(?:\([A-Za-z0-9, ]*\))?|\([a-z](?:,[a-z])+\)|\[[A-Z]+\]|\\frac\{d\^?\w*\}\{d\w+\}|\\frac\{dy\}\{dx\}"
)
_POINT_NAME = re.compile(r"^[A-Z]'?\s*(?==?\s*\()")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_INDIAN = re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])")
_UNIT_OF_COLLECTION = re.compile(r"(?<=[)\]}])\s*\\text\s*\{\s*(?!,?\s*(?:and|or|but|not|if|when)\b)[^{}]*\}$")
_INFINITE = re.compile(r"([-+]?)\s*(?:\\infty|\\text\{inf(?:inity)?\}|infinity|inf|oo)", re.IGNORECASE)

# What a relation's sign becomes when its sides change places.
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~"}
_MOST_APPROXIMATIONS = 3  # of one value: 22/7 \approx 3.142857 \approx 3.14
_Part = TypeVar("_Part")

Interval = tuple[str, str, str, str]  # bracket, start, end, bracket


def answers_agree(answer: str, gold: str) -> bool:
    """Whether two answers, as they were written, are equal.

    An answer that nests deeper than Python calls is wrong, not ungraded: else it would pay to give such answers.
    """
    try:
        return _agree(answer, gold)
    except RecursionError:
        return False


def _agree(answer: str, gold: str) -> bool:
    answer, gold = plain_spelling(answer), plain_spelling(gold)
    if not answer or not gold:
        return False
    answer = _UNIT_OF_COLLECTION.sub("", answer) if "\\text" not in gold else answer
    mine, theirs = _readings(answer), _readings(gold)
    if shapes_agree(shape_of(mine[0]), shape_of(theirs[0])):
        return True
    # 100,200 may be a number or a list: as the gold answer has it.
    lists = shape_of(theirs[-1]).kind, shape_of(mine[-1]).kind
    return len(mine) > 1 and len(theirs) == 1 and lists[0] == "list" and shapes_agree(shape_of(mine[1]), shape_of(gold))


def _readings(text: str) -> list[str]:
    """`text` with 1,234 read as a number, and as it is; once where that is the same. Inside brackets it is a list."""
    merged = _GROUPED.sub(lambda number: number[0].replace(",", ""), _INDIAN.sub(lambda n: n[0].replace(",", ""), text))
    if merged == text or re.match(r"^(?:\\\{|[(\[]).*(?:\\\}|[)\]])$", text):
        return [text]
    return [merged, text]


def shapes_agree(answer: Shape, gold: Shape) -> bool:
    """Whether two answers that have been taken apart are equal."""
    if any(_may_be_region(shape) for shape in (answer, gold)):
        if _contradicts_itself(answer) and not _contradicts_itself(gold):
            return False
        regions = _region(answer), _region(gold)
        if regions[0] is not None and regions[1] is not None:
            return _pair_up(*regions, _same_interval)
    if answer.kind == gold.kind == "relation":
        return _relations_agree(answer, gold)
    if answer.kind == "relation" and gold.kind not in ("list", "set"):
        return _value_of_relation_agrees(answer, gold)
    if gold.kind == "relation" and answer.kind not in ("list", "set"):
        return _gold_relation_agrees(answer, gold)
    return _collections_agree(answer, gold)


def _collections_agree(answer: Shape, gold: Shape) -> bool:
    plain = ("list", "set")
    if gold.kind in plain or answer.kind in plain:
        if _in_order_of_names(gold, answer):
            return _in_order(answer.parts, gold.parts)
        ordered = _as_tuple(answer, gold), _as_tuple(gold, answer)
        if ordered[0] is not None or ordered[1] is not None:
            return _in_order((ordered[0] or answer).parts, (ordered[1] or gold).parts)
        if not all(each.kind in (*plain, "leaf", "brackets", "relation", "matrix") for each in (answer, gold)):
            return False
        return _any_order(answer, gold)
    if answer.kind != gold.kind:
        named = _POINT_NAME.sub("", answer.text), _POINT_NAME.sub("", gold.text)
        if named != (answer.text, gold.text) and "leaf" in (answer.kind, gold.kind):  # A(1,2)
            return shapes_agree(shape_of(named[0]), shape_of(named[1]))
        return _nested_list_is_matrix(answer, gold)
    if gold.kind == "leaf":
        return leaves_agree(answer.text, gold.text)
    if gold.kind == "union":
        return _any_order(answer, gold)
    if gold.kind in ("brackets", "matrix") and answer.signs != gold.signs:
        return False
    return _in_order(answer.parts, gold.parts)


def _in_order(answers: Sequence[Shape], golds: Sequence[Shape]) -> bool:
    return len(answers) == len(golds) and all(shapes_agree(a, g) for a, g in zip(answers, golds, strict=True))


def _any_order(answer: Shape, gold: Shape) -> bool:
    """Whether each part of one is a part of the other. A set holds a value once; a list may repeat it."""
    answers, golds = _elements(answer), _elements(gold)
    if "set" in (answer.kind, gold.kind):
        answers, golds = _distinct(answers), _distinct(golds)
    if len(answers) != len(golds):
        return False
    answers, golds = _without_common_name(answers), _without_common_name(golds)
    return _pair_up(answers, golds, shapes_agree)


def _pair_up(answers: Sequence[_Part], golds: Sequence[_Part], same: Callable[[_Part, _Part], bool]) -> bool:
    """Whether each part of the gold answer has one of the answer for itself, and none is left."""
    left = list(answers)
    for gold in golds:
        found = next((each for each in left if same(each, gold)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _elements(shape: Shape) -> list[Shape]:
    if shape.kind == "relation" and len(shape.parts) == 2 and shape.signs == ("=",) and _is_name(shape.parts[0]):
        inside = shape.parts[1]
        return _elements(inside) if inside.kind in ("list", "set") else [shape]
    return list(shape.parts) if shape.kind in ("list", "set", "union") else [shape]


def _without_common_name(parts: list[Shape]) -> list[Shape]:
    """x = 1, x = 2 and x = 1, 2 as 1, 2."""
    names = {_squeezed(part.parts[0].text) for part in parts if part.kind == "relation" and _is_assignment(part)}
    if len(names) != 1:
        return parts
    return [part.parts[-1] if part.kind == "relation" and _is_assignment(part) else part for part in parts]


def _distinct(parts: list[Shape]) -> list[Shape]:
    kept: list[Shape] = []
    for part in parts:
        if not any(shapes_agree(part, other) for other in kept):
            kept.append(part)
    return kept


def _in_order_of_names(gold: Shape, answer: Shape) -> bool:
    """Whether the gold answer gives different names their values, "h = 12, k = 18", and `answer` lists values alone."""
    if gold.kind != "list" or not all(part.kind == "relation" and _is_assignment(part) for part in gold.parts):
        return False
    names = {_squeezed(part.parts[0].text) for part in gold.parts}
    listed = answer.kind == "list" or (answer.kind == "brackets" and answer.signs == ("(", ")"))
    return len(names) == len(gold.parts) and listed and all(part.kind != "relation" for part in answer.parts)


def _as_tuple(shape: Shape, other: Shape) -> Shape | None:
    """The values of "x = 1, y = 2" in the order of their names, where `other` is a pair (1,2)."""
    if shape.kind != "list" or other.kind != "brackets" or other.signs != ("(", ")"):
        return None
    if not all(part.kind == "relation" and _is_assignment(part) for part in shape.parts):
        return None
    names = [_squeezed(part.parts[0].text) for part in shape.parts]
    if len(set(names)) != len(names) or names != sorted(names):
        return None
    return Shape("brackets", shape.text, tuple(part.parts[-1] for part in shape.parts), ("(", ")"))


def _nested_list_is_matrix(answer: Shape, gold: Shape) -> bool:
    """[[1,2],[3,4]] is a matrix too."""
    if {answer.kind, gold.kind} != {"matrix", "brackets"}:
        return False
    listed = answer if answer.kind == "brackets" else gold
    if listed.signs != ("[", "]") or any(part.kind != "brackets" or part.signs != ("[", "]") for part in listed.parts):
        return False
    return _in_order(answer.parts, gold.parts)


# ---------------------------------------------------------------- equations


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_name(shape: Shape) -> bool:
    return _NAME.fullmatch(_squeezed(shape.text)) is not None and not closeness.is_constant(shape.text)


def _is_assignment(shape: Shape) -> bool:
    return _is_name(shape.parts[0]) and set(shape.signs) <= {"=", "~"}


def _value_of_relation_agrees(answer: Shape, gold: Shape) -> bool:
    r"""Whether "x = 5", "S = 2 + 3 = 5", "\sqrt2 \approx 1.41" or "6/2 = 3" has the value `gold`."""
    if not set(answer.signs) <= {"=", "~"}:
        return False
    first, *_, last = answer.parts
    constants = [part for part in answer.parts if part.kind == "leaf" and closeness.is_constant(part.text)]
    if "~" in answer.signs:
        agreeing = any(shapes_agree(part, gold) for part in answer.parts if not _is_name(part))
        return agreeing and _near(constants)
    if shapes_agree(last, gold):
        return all(shapes_agree(part, last) for part in constants[:-1])
    return len(answer.parts) == 2 and _is_name(last) and shapes_agree(first, gold)


def _gold_relation_agrees(answer: Shape, gold: Shape) -> bool:
    """Whether `answer` is the value that the gold answer gives a name, or one spelling of it: 0.56 = 56%."""
    if not set(gold.signs) <= {"=", "~"}:
        return False
    if all(part.kind == "leaf" and (closeness.is_constant(part.text.rstrip("% "))) for part in gold.parts):
        return any(shapes_agree(answer, part) for part in gold.parts)
    if _is_name(gold.parts[0]):
        return shapes_agree(answer, gold.parts[-1]) or ("~" in gold.signs and shapes_agree(answer, gold.parts[1]))
    return len(gold.parts) == 2 and _is_name(gold.parts[1]) and shapes_agree(answer, gold.parts[0])


def _near(parts: Sequence[Shape]) -> bool:
    """Whether the numbers in a chain of approximations are within 5% of each other, and not a list of candidates."""
    values = [value for part in parts if (value := closeness.approximate(part.text)) is not None]
    whole = {value for value in values if value == round(value.real)}
    if len(values) > _MOST_APPROXIMATIONS or len(whole) > 1:
        return False
    return all(abs(one - other) <= 0.05 * max(abs(one), abs(other)) for one, other in pairwise(values))


def _relations_agree(answer: Shape, gold: Shape) -> bool:
    names = [_squeezed(each.parts[0].text) if _is_assignment(each) else None for each in (answer, gold)]
    if None not in names:
        if names[0] == names[1] or {name == "y" or "(" in (name or "") for name in names} == {True}:
            return shapes_agree(answer.parts[-1], gold.parts[-1])
    elif names != [None, None] and len(answer.parts) != len(gold.parts):
        chain, plain = (answer, gold) if len(answer.parts) > len(gold.parts) else (gold, answer)
        return _relations_agree(*_shortened(chain, plain, answer is chain))
    if len(answer.parts) != 2 or len(gold.parts) != 2:
        return (
            len(answer.parts) == len(gold.parts) and answer.signs == gold.signs and _in_order(answer.parts, gold.parts)
        )
    return _say_the_same(answer, gold)


def _shortened(chain: Shape, plain: Shape, chain_is_answer: bool) -> tuple[Shape, Shape]:
    """A = b = c as A = c, to be compared with an equation of two sides."""
    short = Shape("relation", chain.text, (chain.parts[0], chain.parts[-1]), (chain.signs[-1],))
    return (short, plain) if chain_is_answer else (plain, short)


def _say_the_same(answer: Shape, gold: Shape) -> bool:
    left, right = [part.text for part in answer.parts], [part.text for part in gold.parts]
    if _squeezed("".join(left)) == _squeezed("".join(right)) and answer.signs == gold.signs:
        return True
    if all(closeness.is_constant(part.text) for part in answer.parts):
        return False
    ratio = closeness.proportional((left[0], left[1]), (right[0], right[1]))
    if ratio is None:
        if answer.signs == gold.signs and _in_order(answer.parts, gold.parts):
            return True
        return _TURNED[answer.signs[0]] == gold.signs[0] and _in_order(answer.parts[::-1], gold.parts)
    wanted = answer.signs[0] if ratio > 0 else _TURNED[answer.signs[0]]
    return wanted == gold.signs[0]


# ---------------------------------------------------------------- intervals


def _may_be_region(shape: Shape) -> bool:
    of_relations = shape.kind == "list" and all(part.kind == "relation" for part in shape.parts)
    return shape.kind in ("relation", "union") or of_relations


def _region(shape: Shape) -> list[Interval] | None:
    """The intervals that a shape describes, in any order; None where it describes no such set of numbers."""
    if shape.kind == "brackets" and len(shape.parts) == 2:
        return [(shape.signs[0], shape.parts[0].text, shape.parts[1].text, shape.signs[1])]
    if shape.kind == "union" or (shape.kind == "list" and all(part.kind == "relation" for part in shape.parts)):
        regions = [_region(part) for part in shape.parts]
        if any(region is None for region in regions):
            return None
        pieces = [interval for region in regions if region for interval in region]
        joined = _intersection(pieces) if shape.kind == "list" and shape.signs[0] in ("and", ",") else None
        return joined or pieces
    return _solutions(shape) if shape.kind == "relation" else None


def _solutions(shape: Shape) -> list[Interval] | None:
    parts, signs = shape.parts, shape.signs
    if len(parts) == 3 and _is_name(parts[1]) and not _is_name(parts[0]) and not _is_name(parts[2]):
        if set(signs) <= {"<", "<="}:
            return [("(" if signs[0] == "<" else "[", parts[0].text, parts[2].text, ")" if signs[1] == "<" else "]")]
        if set(signs) <= {">", ">="}:
            return [("(" if signs[1] == ">" else "[", parts[2].text, parts[0].text, ")" if signs[0] == ">" else "]")]
        return None
    if len(parts) != 2 or signs[0] not in ("<", "<=", ">", ">=", "!="):
        return None
    sign, bound = signs[0], parts[1].text
    if not _is_name(parts[0]) or not closeness.is_constant(bound):
        if not _is_name(parts[1]) or not closeness.is_constant(parts[0].text):
            return None
        sign, bound = _TURNED[sign], parts[0].text
    if sign == "!=":
        return [("(", "-\\infty", bound, ")"), ("(", bound, "\\infty", ")")]
    if sign[0] == "<":
        return [("(", "-\\infty", bound, ")" if sign == "<" else "]")]
    return [("(" if sign == ">" else "[", bound, "\\infty", ")")]


def _intersection(pieces: list[Interval]) -> list[Interval] | None:
    """(1,3) of x > 1 and x < 3; None where two half-lines do not meet like that."""
    if len(pieces) != 2:
        return None
    lower = next((piece for piece in pieces if _bound(piece[2]) == "\\infty"), None)
    upper = next((piece for piece in pieces if _bound(piece[1]) == "-\\infty"), None)
    if lower is None or upper is None or lower is upper:
        return None
    ends = closeness.approximate(lower[1]), closeness.approximate(upper[2])
    if ends[0] is None or ends[1] is None or ends[0].real >= ends[1].real:
        return None
    return [(lower[0], lower[1], upper[2], upper[3])]


def _contradicts_itself(shape: Shape) -> bool:
    """Whether a shape says x < 1 and x > 3, which no number is."""
    if shape.kind != "list" or shape.signs[0] != "and" or len(shape.parts) != 2:
        return False
    pieces = [region[0] for part in shape.parts if (region := _region(part)) and len(region) == 1]
    ends = [[_bound(piece[end]) for piece in pieces] for end in (1, 2)]
    return len(pieces) == 2 and "-\\infty" in ends[0] and "\\infty" in ends[1] and _intersection(pieces) is None


def _bound(text: str) -> str:
    infinite = _INFINITE.fullmatch(text.strip())
    return f"{infinite[1].replace('+', '')}\\infty" if infinite else text


def _same_interval(answer: Interval, gold: Interval) -> bool:
    if (answer[0], answer[3]) != (gold[0], gold[3]):
        return False
    return all(shapes_agree(shape_of(_bound(answer[end])), shape_of(_bound(gold[end]))) for end in (1, 2))
