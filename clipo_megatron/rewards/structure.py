r"""Takes an answer apart: lists, sets, tuples and intervals, unions, matrices, equations and inequalities.

1, 2 \text{ and } 3       a list of 1, 2 and 3
(1,2]                     a tuple or interval with these brackets
x < 1 \text{ or } x > 3   a list of two relations
x = 5                     a relation of x and 5
\pm 3                     a list of 3 and -3
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

_SCAN = re.compile(
    r"\\begin\s*\{[A-Za-z*]+\}|\\end\s*\{[A-Za-z*]+\}|\\text\s*\{[^{}]*\}|\\langle|\\rangle|\\[A-Za-z]+|\\.|[A-Za-z]+"
    r"|<=|>=|!=|==|.",
    re.DOTALL,
)
_OPENERS = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"}
_CLOSERS = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"}
_JOINERS = {"and": "and", "or": "or", ",": ",", ";": ",", "&": "and"}
_RELATIONS = {
    **{"=": "=", "==": "=", "\\approx": "~", "\\equiv": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">="},
    **{"<=": "<=", ">=": ">=", "\\ne": "!=", "!=": "!=", "\\sim": "~", ":=": "="},
}
_IN = re.compile(r"^\s*(?:[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+|[a-z]\([a-z]\))\s*\\in(?![A-Za-z])\s*")
_BUILDER = re.compile(r"^\\\{\s*[A-Za-z](?:\s*\\in\s*(?:\\mathbb\{R\}|\{R\}|R))?\s*(?:\\mid|\||:|\\vert)\s*(.*)\\\}$")
_REALS = re.compile(
    r"^(?:\\mathbb\s*\{R\}|\{R\}|(?:\\text\{)?\s*(?:the set of )?all real(?:s| numbers?)(?: \w)?\s*\}?)$", re.IGNORECASE
)
_REALS_WITHOUT = re.compile(
    r"^(?:\\mathbb\s*\{R\}|\{R\}|R)\s*(?:\\setminus|\\backslash|-|\\smallsetminus)\s*\\\{(.*)\\\}$"
    r"|^(?:\\text\{)?\s*all real(?:s| numbers?)(?: \w)?,? (?:except(?: for)?|but|other than)\s*\}?\s*(.*)$"
)
_EMPTY = re.compile(r"^(?:\\text\s*\{)?\s*(?:(?:the )?empty set|no (?:real )?solutions?)\s*\}?$", re.IGNORECASE)
_MATRIX = re.compile(
    r"^\\begin\s*\{([bpBvV]?(?:small)?matrix|array)\}(?:\s*\{[lcr| ]*\})?(.*)\\end\s*\{\1\}$", re.DOTALL
)
_DEEPEST = 12
MOST_PARTS = 100  # of a list; a longer one is compared as text


@dataclass(frozen=True)
class Shape:
    """What an answer is made of.

    Attributes:
        kind: "leaf", "list", "set", "brackets", "union", "matrix" or "relation".
        text: the whole text.
        parts: of a list, set, tuple or union; the rows of a matrix; the sides of a relation.
        signs: the two brackets; what joins a list (",", "and", "or"); the signs between the sides of a relation; "|" of
            a determinant, "" of a matrix.
    """

    kind: str
    text: str
    parts: tuple[Shape, ...] = ()
    signs: tuple[str, ...] = ()


@lru_cache(maxsize=512)
def shape_of(text: str) -> Shape:
    """The shape of an answer in plain spelling."""
    return _shape(text, 0)


def _shape(text: str, depth: int) -> Shape:
    text = text.strip()
    if depth > _DEEPEST:
        return Shape("leaf", text)
    inside = _IN.sub("", text)
    if inside != text and inside:
        return _shape(inside, depth + 1)
    if built := _BUILDER.match(text):
        return _shape(built[1], depth + 1)
    if _REALS.match(text):
        return _interval("(", "-\\infty", "\\infty", ")")
    if (without := _REALS_WITHOUT.match(text)) and (left_out := (without[1] or without[2] or "").split(",")) != [""]:
        return _shape(" , ".join(f"x \\ne {each}" for each in left_out), depth + 1)
    if _EMPTY.match(text):
        return Shape("set", text)
    if matrix := _MATRIX.match(text):
        return _matrix(matrix[2], text, depth, "|" if matrix[1][0] in "vV" else "")
    turned = (_bracketed,) if text.startswith("]") else ()  # ]1,2[, whose comma is in no other bracket
    for split in (*turned, _listed, _united, _related, _bracketed, _both_signs):
        if (found := split(text, depth)) is not None:
            return found
    return Shape("leaf", text)


def _interval(opening: str, start: str, end: str, closing: str) -> Shape:
    parts = Shape("leaf", start), Shape("leaf", end)
    return Shape("brackets", f"{opening}{start},{end}{closing}", parts, (opening, closing))


def _top_level(text: str) -> Iterator[tuple[str, int, int]]:
    """The tokens of `text` outside brackets and environments, with where they start and end."""
    depth = 0
    for token in _SCAN.finditer(text):
        word = token[0]
        if word in _CLOSERS or word.startswith("\\end"):
            depth -= 1
        elif depth <= 0 and not (word in _OPENERS or word.startswith("\\begin")):
            yield word, token.start(), token.end()
        if word in _OPENERS or word.startswith("\\begin"):
            depth += 1


def _split(text: str, signs: dict[str, str]) -> tuple[list[str], list[str]]:
    """The pieces of `text` between the top-level tokens in `signs`, and what `signs` makes of these tokens."""
    pieces, found, start = [], [], 0
    for word, begin, end in _top_level(text):
        key = word
        if word.startswith("\\text"):
            said = word.partition("{")[2].rstrip("}").strip().lower()
            key = said if said in (",", ";") else said.strip(", ") or word
        if key in signs:
            pieces.append(text[start:begin])
            found.append(signs[key])
            start = end
    return [*pieces, text[start:]], found


def _listed(text: str, depth: int) -> Shape | None:
    pieces, joiners = _split(text, _JOINERS)
    if not joiners:
        return None
    kept = [piece for piece in pieces if piece.strip()]
    if len(kept) > MOST_PARTS:
        return Shape("leaf", text)
    if len(kept) < 2:
        return _shape(kept[0], depth + 1) if kept else None
    words = [joiner for joiner in joiners if joiner != ","]
    parts = []
    for piece in kept:
        part = _shape(piece, depth + 1)
        # \pm is two values of the list
        parts += part.parts if part.kind == "list" and part.signs == ("pm",) else [part]
    return Shape("list", text, tuple(parts), (words[0] if words else ",",))


def _united(text: str, depth: int) -> Shape | None:
    pieces, signs = _split(text, {"\\cup": "U", "U": "U", "\\bigcup": "U"})
    if not signs or not all(piece.strip()[-1:] in (")", "]", "}") for piece in pieces):
        return None
    return Shape("union", text, tuple(_shape(piece, depth + 1) for piece in pieces))


def _related(text: str, depth: int) -> Shape | None:
    pieces, signs = _split(text, _RELATIONS)
    if not signs:
        return None
    if not pieces[0].strip():  # "= 5", "\approx 2.37"
        return _shape(text[len(text) - len(_after_sign(text)) :], depth + 1)
    if any(not piece.strip() for piece in pieces):
        return Shape("leaf", text)
    return Shape("relation", text, tuple(_shape(piece, depth + 1) for piece in pieces), tuple(signs))


def _after_sign(text: str) -> str:
    for word, _, end in _top_level(text):
        if word in _RELATIONS:
            return text[end:]
    return text


def _bracketed(text: str, depth: int) -> Shape | None:
    for opening, closing, opens, closes in (
        ("\\{", "\\}", "{", "}"),
        ("\\langle", "\\rangle", "(", ")"),
        *((opening, closing, opening, closing) for opening in "([" for closing in ")]"),
        ("]", "[", "(", ")"),
        ("]", "]", "(", "]"),
        ("[", "[", "[", ")"),
    ):
        if not (text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing)):
            continue
        inside = text[len(opening) : len(text) - len(closing)]
        if _unbalanced(inside):
            continue
        pieces = [piece for piece in _split(inside, {",": ",", ";": ","})[0] if piece.strip()]
        if opens == "{":
            inner = _shape(inside, depth + 1)
            return Shape("set", text, inner.parts if inner.kind == "list" else (inner,))
        if 1 < len(pieces) <= MOST_PARTS:
            parts = tuple(_shape(piece, depth + 1) for piece in pieces)
            return Shape("brackets", text, parts, (opens, closes))
        if opening + closing in ("()", "[]") and pieces:
            return _shape(inside, depth + 1)  # (5)
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return Shape("set", text)
    return None


def _unbalanced(inside: str) -> bool:
    """Whether a bracket closes in `inside` that opened before it: "1)(2" of "(1)(2)"."""
    depth = 0
    for token in _SCAN.finditer(inside):
        depth += (token[0] in _OPENERS) - (token[0] in _CLOSERS)
        if depth < 0:
            return True
    return depth != 0


def _both_signs(text: str, depth: int) -> Shape | None:
    if text.count("\\pm") + text.count("\\mp") not in (1, 2) or not text.count("\\pm"):
        return None
    plus = re.sub(r"^\s*\+", "", re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text)))
    minus = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return Shape("list", text, (_shape(plus, depth + 1), _shape(minus, depth + 1)), ("pm",))


def _matrix(body: str, text: str, depth: int, bars: str) -> Shape:
    rows = []
    for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", body):
        if row.replace("\\hline", "").strip():
            cells = _split(row.replace("\\hline", ""), {"&": "&"})[0]
            rows.append(Shape("brackets", row, tuple(_shape(cell, depth + 1) for cell in cells), ("[", "]")))
    return Shape("matrix", text, tuple(rows), (bars,))
