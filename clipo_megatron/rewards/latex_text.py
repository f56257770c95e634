r"""Converts LaTeX to plain text as the reference grader does: `\frac{\pi}{2}` -> "π/2", `\sqrt2` -> "√(2)".

The reference converts both answers before it compares them, so the conversion must keep and drop exactly the same.
Unknown macros vanish and their arguments stay as text; `\mbox{}` vanishes with its argument; a root loses its index; a
matrix becomes "[ 1 2; 3 4 ]".
"""

from __future__ import annotations

import re
import unicodedata
from string import ascii_lowercase, ascii_uppercase

_TOKEN = re.compile(r"\\[A-Za-z]+\s*|\\.|[{}&~]|[^\\{}&~]+|\\", re.DOTALL)

# macros that print their own name
_NAMED = "cos sin tan arccos arcsin arctan cosh sinh tanh arccosh arcsinh arctanh ln log exp max min sup inf lim"
_GREEK = "alpha beta gamma delta zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon chi psi omega"
_SYMBOLS = {
    **{name: name for name in _NAMED.split()},
    **{name: unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}") for name in _GREEK.split()},
    **{
        name.capitalize(): unicodedata.lookup(f"GREEK CAPITAL LETTER {name.replace('lambda', 'lamda')}")
        for name in _GREEK.split()
    },
    **{"phi": "ϕ", "varphi": "φ", "Phi": "Φ", "epsilon": "ϵ", "varepsilon": "ε", "vartheta": "ϑ"},
    **{"ell": "ℓ", "hbar": "ħ", "partial": "∂", "nabla": "∇", "infty": "∞", "circ": "∘", "prime": "'"},
    **{"cdot": "·", "times": "×", "div": "÷", "pm": "±", "mp": "∓", "ast": "∗", "star": "⋆", "bullet": "∙"},
    **{"oplus": "⊕", "otimes": "⊗", "le": "≤", "leq": "≤", "leqslant": "⩽", "ge": "≥", "geq": "≥", "geqslant": "⩾"},
    **{"ne": "≠", "neq": "≠", "equiv": "≡", "approx": "≈", "sim": "∼", "simeq": "≃", "propto": "∝", "ll": "≪"},
    **{"gg": "≫", "in": "∈", "notin": "∉", "cup": "∪", "cap": "∩", "subset": "⊂", "subseteq": "⊆", "setminus": "∖"},
    **{"emptyset": "∅", "varnothing": "∅", "forall": "∀", "exists": "∃", "wedge": "∧", "vee": "∨", "to": "→"},
    **{"rightarrow": "→", "leftarrow": "←", "Rightarrow": "⇒", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|"},
    **{"parallel": "∥", "perp": "⊥", "angle": "∠", "langle": "⟨", "rangle": "⟩", "lfloor": "⌊", "rfloor": "⌋"},
    **{"lceil": "⌈", "rceil": "⌉", "lbrace": "{", "rbrace": "}", "sum": "∑", "prod": "∏", "int": "∫"},
    **{"ldots": "…", "dots": "…", "cdots": "⋯", "quad": "  ", "qquad": "    ", "backslash": "\\"},
    **{",": " ", ";": " ", ":": " ", " ": " ", "!": "", "\\": "\n", "\n": " "},
    **{character: character for character in "{}$%&#_"},
}
_BOLD = {ord(c): chr(0x1D400 + i) for i, c in enumerate(ascii_uppercase + ascii_lowercase)}
_DROPPED_WITH_ARGUMENT = {"mbox", "hspace", "vspace", "label"}
_NEED_BRACES = {"\\frac", "\\sqrt"}  # when they are an argument: \\frac\\sqrt33 is not LaTeX
_KEPT_SECOND_ARGUMENT = {"textcolor"}
_MATRICES = {"array", "pmatrix", "bmatrix", "smallmatrix", "psmallmatrix", "bsmallmatrix"}


class LatexError(ValueError):
    """The text is not LaTeX that this module can read: an argument is missing."""


def latex_to_text(latex: str) -> str:
    """Plain text of `latex`. Unbalanced braces are tolerated.

    Raises:
        LatexError: a fraction or a root lacks its argument or is a bare argument itself, or groups nest some hundreds
            deep.
    """
    try:
        return _Reader(latex).read_all()
    except RecursionError:
        raise LatexError("groups nest too deep") from None


class _Reader:
    """Reads a token list once, from left to right."""

    def __init__(self, latex: str):
        self.tokens: list[str] = _TOKEN.findall(latex)
        self.next = 0

    def read_all(self) -> str:
        text = []
        while self.next < len(self.tokens):
            text.append(self.read_until(closing="}"))  # a stray closing brace is skipped
        return "".join(text)

    def read_until(self, closing: str) -> str:
        """Text up to the token `closing`, which is consumed, or up to the end."""
        text = []
        while self.next < len(self.tokens):
            token = self.tokens[self.next]
            self.next += 1
            if token.rstrip() == closing or (closing == "\\end" and token == "}"):
                break
            text.append(self.render(token))
        return "".join(text)

    def render(self, token: str) -> str:
        if token == "{":
            return self.read_until(closing="}")
        if token == "&":
            return "   "
        if token == "~":
            return " "
        if not token.startswith("\\"):
            return token
        return self.render_macro(token[1:].rstrip() or token[1:])

    def render_macro(self, name: str) -> str:
        if name == "frac":
            return f"{self.argument()}/{self.argument()}"
        if name == "sqrt":
            self.skip_index()
            return f"√({self.argument()})"
        if name == "begin":
            return self.render_environment(self.argument())
        if name == "end":
            self.argument()
            return ""
        if name in _DROPPED_WITH_ARGUMENT:
            self.argument()
            return ""
        if name == "mathbf":
            return self.argument().translate(_BOLD)
        if name in _KEPT_SECOND_ARGUMENT:
            self.argument()
            return self.argument()
        return _SYMBOLS.get(name, "")

    def render_environment(self, name: str) -> str:
        if name == "array":
            self.argument()  # the column specification
        body = self.read_until(closing="\\end")
        if self.next < len(self.tokens):
            self.argument()
        if name not in _MATRICES:
            return body
        rows = (" ".join(cell.strip() for cell in row.split("   ")) for row in body.split("\n"))
        return f"[ {'; '.join(rows)} ]"

    def argument(self) -> str:
        """The next argument: a group, a macro, or one character."""
        while self.next < len(self.tokens):
            token = self.tokens[self.next]
            self.next += 1
            if token == "}":
                break
            if token.rstrip() in _NEED_BRACES:
                raise LatexError(f"{token} cannot be an argument without braces")
            if token[0] in "\\{&~":
                return self.render(token)
            stripped = token.lstrip()
            if stripped:
                if len(stripped) > 1:
                    self.next -= 1
                    self.tokens[self.next] = stripped[1:]
                return stripped[0]
        raise LatexError("an argument is missing at the end of a group")

    def skip_index(self) -> None:
        """Skip the `[3]` of a cube root, when there is one within the next token."""
        if self.next < len(self.tokens):
            index = re.match(r"\s*\[[^\]]*\]", self.tokens[self.next])
            if index:
                self.tokens[self.next] = self.tokens[self.next][index.end() :]
                if not self.tokens[self.next]:
                    self.next += 1
