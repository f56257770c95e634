r"""Reads a LaTeX or plain formula: \frac{x}{2}, 2\sqrt3, x(x+1), 1\frac{1}{2}, \sin^2 2x, 5!, |x-1|, sqrt(2)/2.

What is read is a tree, which `evaluation.py` gives values. Sums, integrals and other notation are left to math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

_LONGEST = 3_000  # characters
_DEEPEST = 60  # groups within groups

Node = tuple  # ("+", node, node), ("number", Fraction), ("symbol", name), ("call", name, node) ...


class Unreadable(ValueError):
    """The text is not a formula that this module reads."""


_TOKEN = re.compile(
    r"\\[A-Za-z]+|\\[^A-Za-z]|[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\*\*|[A-Za-z]|[-+*/^_!%(){}\[\]|',]|\s+|.", re.DOTALL
)
_NAMES = "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh asin acos atan ln log lg exp sqrt cbrt abs"
_FUNCTIONS = _NAMES.split()
_WORD = re.compile(rf"(?<![A-Za-z\\])({'|'.join(sorted(_FUNCTIONS, key=len, reverse=True))}|pi|infty)(?![A-Za-z])")
_LOWER = "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau"
_OTHERS = "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar triangle"
_GREEK = [*_LOWER.split(), *_OTHERS.split()]
_TIMES = {"*", "\\cdot", "\\times", "\\ast"}
_OVER = {"/", "\\div"}
_OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_IGNORED = {"\\,", "\\;", "\\:", "\\!", "\\ ", "\\left", "\\right", "\\quad", "\\qquad", "\\displaystyle", "\\limits"}
_PROSE = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|(?=[A-Za-z]{3}(?![A-Za-z]))[A-Za-z]*[eiouEIOU][A-Za-z]*)")
_STARTS = {"(", "[", "{", "|", "\\frac", "\\sqrt", "\\pi", "\\binom", "\\lfloor", "\\lceil", "\\infty"}


@lru_cache(maxsize=512)  # the gold answer is read once a group
def read(text: str) -> Node:
    """The formula that `text` writes.

    Raises:
        Unreadable: it is no formula, or longer or deeper than any answer.
    """
    if len(text) > _LONGEST:
        raise Unreadable("it is too long")
    if not text.isascii():  # digits of other alphabets are digits to Python too
        raise Unreadable("it has characters of no formula")
    text = _WORD.sub(lambda word: f"\\{word[1]} ", text)
    if prose := _PROSE.search(text):  # as a product of letters, "listen" would be "silent"
        raise Unreadable(f"{prose[0]!r} is a word")
    tokens = [token for token in _TOKEN.findall(text) if not token.isspace() and token not in _IGNORED]
    reader = _FormulaReader(tokens)
    node = reader.sum()
    if reader.peek() is not None:
        raise Unreadable(f"{reader.peek()!r} is not expected there")
    return node


def is_readable(text: str) -> bool:
    """Whether `read` reads `text`."""
    try:
        read(text)
    except Unreadable:
        return False
    return True


class _FormulaReader:
    """Reads tokens from left to right, by recursive descent."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.next = 0
        self.depth = 0
        self.bars = 0  # open |

    def peek(self) -> str | None:
        return self.tokens[self.next] if self.next < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise Unreadable("it ends too early")
        self.next += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.next += 1
        return True

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("groups nest too deep")
        node = self.product()
        while self.peek() in ("+", "-"):
            node = (self.take(), node, self.product())
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        mixed = node[0] == "number" and node[1].denominator == 1  # 1\frac{1}{2}: a mixed number
        while True:
            token = self.peek()
            if token in _TIMES:
                self.take()
                node, mixed = ("*", node, self.signed()), False
            elif token in _OVER:
                self.take()
                node, mixed = ("/", node, self.signed()), False
            elif self.starts_factor(token):
                if (token[0].isdigit() or token[0] == ".") and self.tokens[self.next - 1] != "!":  # 3!7! is a product
                    raise Unreadable("two numbers stand side by side")
                factor = self.power()
                plain = factor[0] == "/" and factor[1][0] == factor[2][0] == "number" and token == "\\frac"
                node = ("+" if mixed and plain else "*", node, factor)
                mixed = False
            else:
                return node

    def signed(self) -> Node:
        minus = False
        while self.peek() in ("+", "-"):
            minus ^= self.take() == "-"
        if not minus:
            return self.power()
        factor = self.power()
        if factor[0] == "number" and self.peek() == "\\frac":  # -1\frac{1}{2} is -(1 + 1/2)
            fraction = self.power()
            both_plain = fraction[0] == "/" and fraction[1][0] == fraction[2][0] == "number"
            factor = ("+" if both_plain and factor[1].denominator == 1 else "*", factor, fraction)
        return ("-", ("number", Fraction(0)), factor)

    def starts_factor(self, token: str | None) -> bool:
        if token is None or (token == "|" and self.bars):
            return False
        return token[0].isalnum() or (token[0] == "." and len(token) > 1) or token in _STARTS or self.is_name(token)

    def is_name(self, token: str) -> bool:
        return token[0] == "\\" and (token[1:] in _FUNCTIONS or token[1:] in _GREEK or token == "\\text")

    def power(self) -> Node:
        node = self.primary()
        while True:
            token = self.peek()
            if token == "!":
                self.take()
                node = ("call", "factorial", node)
            elif token in ("^", "**"):
                self.take()
                if self.peek() in ("\\circ", "{") and self.degree():
                    node = ("*", node, ("call", "degree", ("number", Fraction(1))))
                else:
                    node = ("^", node, self.exponent())
            else:
                return node

    def degree(self) -> bool:
        for sign in (["\\circ"], ["{", "\\circ", "}"]):
            if self.tokens[self.next : self.next + len(sign)] == sign:
                self.next += len(sign)
                return True
        return False

    def exponent(self) -> Node:
        if self.peek() in ("+", "-"):
            minus = self.take() == "-"
            node = self.power()
            return ("-", ("number", Fraction(0)), node) if minus else node
        token = self.peek()
        if token is not None and token[0].isdigit() and len(token) > 1 and token.isdigit():
            return ("number", Fraction(self.take()))  # 2^10, as it is meant
        return self.primary() if token not in ("(",) else self.power()

    def argument(self) -> Node:
        """The next argument of a macro: a group, a macro, or one digit."""
        token = self.peek()
        if token is not None and token.isdigit() and len(token) > 1:
            self.tokens[self.next : self.next + 1] = list(token)  # \frac12
        return self.primary()

    def group(self, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        if not self.accept(closing):
            raise Unreadable(f"{closing} is missing")
        return node

    def primary(self) -> Node:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return ("number", Fraction(token if token[-1] != "." else token[:-1]))
        if token == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            if not self.accept("|"):
                raise Unreadable("| is missing")
            return ("call", "abs", node)
        if token in _OPENING:
            node = self.group(_OPENING[token])
            return ("call", {"\\lfloor": "floor", "\\lceil": "ceil"}[token], node) if token[:2] == "\\l" else node
        if token == "\\frac":
            return ("/", self.argument(), self.argument())
        if token == "\\binom":
            return ("call2", "binom", self.argument(), self.argument())
        if token in ("\\sqrt", "\\cbrt"):
            return self.root(token)
        if token == "\\pi":
            return ("constant", "pi")
        if token[0] == "\\" and token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        if token.isalpha() or (token[0] == "\\" and token[1:] in _GREEK):
            return self.symbol(token.lstrip("\\"))
        raise Unreadable(f"{token!r} has no meaning here")

    def root(self, token: str) -> Node:
        index: Node = ("number", Fraction(3 if token == "\\cbrt" else 2))
        if self.accept("["):
            index = self.group("]")
        return ("root", self.argument(), index)

    def symbol(self, name: str) -> Node:
        if self.accept("_"):
            if self.accept("{"):
                start = self.next
                while self.take() != "}":
                    pass
                name += "_" + "".join(self.tokens[start : self.next - 1])
            else:
                name += "_" + self.take()
        primes = 0
        while self.accept("'"):
            primes += 1
        name += "'" * primes
        if name in ("e", "i"):
            return ("constant", name)
        if name[0] in "fgh" and len(name.split("_")[0].rstrip("'")) == 1 and self.peek() == "(":
            self.take()
            return ("call", f"unknown {name}", self.group(")"))
        return ("symbol", name)

    def function(self, name: str) -> Node:
        power, base = None, None
        for _ in range(2):
            if self.accept("_"):
                base = self.argument()
            elif self.accept("^"):
                power = self.exponent()
        node = self.function_argument()
        if power == ("-", ("number", Fraction(0)), ("number", Fraction(1))):
            name, power = f"arc{name}", None  # \sin^{-1}
        node = ("/", ("call", "ln", node), ("call", "ln", base)) if base is not None else ("call", name, node)
        return node if power is None else ("^", node, power)

    def function_argument(self) -> Node:
        if self.peek() in ("(", "{", "["):
            return self.power()
        minus = self.accept("-")
        node = self.power()
        while self.starts_factor(self.peek()) and not (self.peek()[0] == "\\" and self.peek()[1:] in _FUNCTIONS):
            if self.peek() in ("(", "[", "|"):
                break
            node = ("*", node, self.power())
        while self.peek() in _OVER:  # \sin \pi/3
            self.take()
            node = ("/", node, self.power())
        return ("-", ("number", Fraction(0)), node) if minus else node


def symbols(node: Node) -> frozenset[str]:
    """The names of the variables in a formula; those of unknown functions too."""
    if node[0] == "symbol":
        return frozenset([node[1]])
    found = frozenset([node[1]]) if node[0] == "call" and node[1].startswith("unknown") else frozenset()
    return found.union(*(symbols(part) for part in node[1:] if isinstance(part, tuple)))


def uses(node: Node, name: str) -> bool:
    """Whether the formula calls the function `name`."""
    if node[0] == "call" and node[1] == name:
        return True
    return any(uses(part, name) for part in node[1:] if isinstance(part, tuple))
