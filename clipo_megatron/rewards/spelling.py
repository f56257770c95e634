r"""Brings an answer into one spelling before it is compared: `2{,}107.` -> `2107`, `½` -> `\frac{1}{2}`, `\$5` -> `5`.

Nothing here changes a value. What a spelling may leave out (units, the name before "=", brackets) is decided where
answers are compared.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from clipo_megatron.data.response_text import CONTROL_TOKENS

_FRACTIONS = {
    **{"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5)},
    **{"⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8)},
    **{"⅑": (1, 9), "⅒": (1, 10)},
}
_CHARACTERS = {
    **{character: f"\\frac{{{top}}}{{{bottom}}}" for character, (top, bottom) in _FRACTIONS.items()},
    **{"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-", "×": "\\times ", "·": "\\cdot "},
    **{"⋅": "\\cdot ", "∙": "\\cdot ", "÷": "\\div ", "⁄": "/", "∕": "/", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge "},
    **{"⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≅": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "π": "\\pi "},
    **{"∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "°": "^\\circ ", "º": "^\\circ ", "％": "%"},
    **{"∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}"},
    **{"′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "⟨": "\\langle ", "⟩": "\\rangle ", "（": "(", "）": ")"},
    **{"，": ",", "；": ";", "：": ":", "。": ".", "、": ",", "…": "\\ldots ", "∠": "\\angle ", "△": "\\triangle "},
    **{"\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "", "\u2060": "", "【": "[", "】": "]"},
    **{"α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "θ": "\\theta ", "λ": "\\lambda "},
    **{"μ": "\\mu ", "ρ": "\\rho ", "σ": "\\sigma ", "φ": "\\phi ", "ω": "\\omega ", "ε": "\\epsilon "},
}
_TRANSLATION = str.maketrans(_CHARACTERS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT_SIGN = re.compile(r"([√∛∜])\s*(?:(\d+(?:\.\d+)?|[A-Za-z]|\\pi)|(?=[({]))")
_ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
_ROOT_OF_GROUP = re.compile(r"(\\sqrt(?:\[[^\]]*\])?|(?<![\\A-Za-z])(?:sqrt|cbrt))\s*\(([^()]*)\)")

_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|mleft|mright)(?![A-Za-z])\s*\.?(?<!\.)")
_STYLES = re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|tt|boldmath|protect)(?![A-Za-z])\s*")
_FONTS = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|bold|mathit|mathsf|mathcal|mathop|operatorname\*?|mathord|mathrm|overline|bar|vec|hat"
    r"|overrightarrow|underline|emph|ensuremath)\s*\{([^{}]*)\}"
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|textnormal|mathrm)\s*\{")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_THIN = r"\\[,;:!> ]|~|\\(?:thinspace|quad|qquad|enspace|negthinspace)(?![A-Za-z])|\\hspace\*?\s*\{[^{}]*\}"
_SPACES = re.compile(rf"(\\\\)|{_THIN}")  # \\\\ ends a row of a matrix
_GROUPING = re.compile(  # 32,\!107 is a number; 32,\ 107 is a list
    r"(?<![\d.])(\d{1,3})((?:(?:\{,\}(?:\\!)?|,?\\!|\\[,;: ]|,\{\}|~|\\thinspace\s?|')\s?\d{3}(?!\d))+)"
)
_GROUPED_BY_SPACE = re.compile(r"(?<![\d.,/}^_]\s)(?<![\d.,^_])(\d{1,3})((?: \d{3})+)(?![\d/]|\s*\\[dt]?frac|\s+\d)")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_REPEATING = re.compile(
    r"(\d*\.\d*)\s*(?:\\(?:overline|bar|widebar)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\)(?!\s*[\d(])"
    r"|\\dot\s*\{?(\d)\}?(\d*)\s*(?:\\dot\s*\{?(\d)\}?)?)"
)
_AND_SO_ON = re.compile(r"(\d*\.\d*?)(\d{1,3})\2{2,}\d{0,2}\s*(?:\\l?dots|\\cdots|\.\.\.)")
_EXPONENT = re.compile(r"(?<![A-Za-z\\])(\d+\.?\d*)[eE]([-+]?\d{1,4})(?![\d.A-Za-z])")
_MIXED = re.compile(r"(?<![\d./^_])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d./])")
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_DELIMITERS = re.compile(r"\\[()]|(?<!\\)\$|\\\[|\\\](?!\d)")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:aligned|align\*?|gathered|equation\*?|split|math|displaymath)\}")
_COLORS = re.compile(r"\\color\s*\{[^{}]*\}|\\textcolor\s*\{[^{}]*\}(?=\s*\{)")
_UPRIGHT = re.compile(r"\\mathrm\s*\{\s*(e|i|ln|log|lg|exp|sin|cos|tan|cot|sec|csc)\s*\}")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_LEAD = re.compile(  # words before an answer that say no more than that it is one
    r"^(?:(?:(?:thus|so|hence|therefore)[ ,]+)?(?:the\s+)?(?:(?:final|correct)\s+)*answer(?:\s+is|\s*[:=])\s*:?"
    r"|(?:about|approximately|approx\.?|roughly)(?=[\s$]*[-+\d.\\]))\s*(?=\S)",
    re.IGNORECASE,
)
_LEAD_IN_TEXT = re.compile(r"^\\text\s*\{([^{}]*)\}\s*(?=[^\s^_])")
_MARKS = re.compile(r"^(?:\*\*|__|`|\"|')+|(?:\*\*|__|`|\"|'(?<![A-Za-z]'))+$")
_RENAMED = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\leqslant": "\\le",
    "\\leq": "\\le",
    "\\geqslant": "\\ge",
    "\\geq": "\\ge",
    "\\neq": "\\ne",
    "\\lt": "<",
    "\\gt": ">",
    "\\lbrace": "\\{",
    "\\rbrace": "\\}",
    "\\lbrack": "[",
    "\\rbrack": "]",
    "\\lvert": "|",
    "\\rvert": "|",
    "\\vert": "|",
    "\\colon": ":",
    "\\simeq": "\\approx",
    "\\doteq": "\\approx",
    "\\degree": "^\\circ",
    "\\varnothing": "\\emptyset",
    "\\euro": "€",
    "\\pounds": "£",
    "\\dots": "\\ldots",
    "\\dbinom": "\\binom",
    "\\tbinom": "\\binom",
    "\\union": "\\cup",
    "\\R": "\\mathbb{R}",
    "\\land": "\\text{ and }",
    "\\wedge": "\\text{ and }",
    "\\lor": "\\text{ or }",
    "\\vee": "\\text{ or }",
    "\\imath": "i",
}
_ESCAPED = {"\\not=": "\\ne ", "\\$": "$ ", "\\%": "%", "\\#": "#", "\\&": "&", "\\_": "_"}
_WHOLE = re.compile(r"(?:\\text\s*)?\{")  # around the whole answer
_MACROS = re.compile(r"\\[A-Za-z]+")


def without_control_tokens(text: str) -> str:
    """`text` without control tokens of chat templates."""
    return CONTROL_TOKENS.sub("", text) if "<" in text or "[" in text else text


@lru_cache(maxsize=512)
def plain_spelling(answer: str) -> str:
    """`answer` in the one spelling that answers are compared in."""
    text = _unicode(without_control_tokens(answer))
    text = _grouped(text)
    if has_macros := "\\" in text:
        text = _without_style(text)
    text = _TIMES_TEN.sub(r"\\times ", _EXPONENT.sub(r"\1\\times 10^{\2}", _repeating(text)))
    if has_macros:
        for _ in range(3):
            text = _FONTS.sub(r"{\1}", text)
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", _OVER.sub(r"\\frac{\1}{\2}", text))
    text = _SPACES.sub(lambda space: space[1] or " ", text)
    text = _ROOT_OF_GROUP.sub(lambda root: f"{'' if root[1][0] == chr(92) else chr(92)}{root[1]}{{{root[2]}}}", text)
    text = _DELIMITERS.sub(lambda sign: "$" if _is_price(sign) else "", text)
    text = _GROUPED_BY_SPACE.sub(lambda number: number[1] + number[2].replace(" ", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return _trimmed(" ".join(text.split()))


def _without_style(text: str) -> str:
    """`text` with one name for each macro and character, and without boxes, sizes, styles and colours."""
    text = _MACROS.sub(lambda macro: _RENAMED.get(macro[0], macro[0]), text)
    if "color" in text or "\\mathrm" in text:
        text = _COLORS.sub("", _UPRIGHT.sub(_upright, text))
    for macro, character in _ESCAPED.items():
        text = text.replace(macro, character)
    text = _STYLES.sub("", _ENVIRONMENT.sub("", _SIZES.sub("", text)))
    for _ in range(4 if "box" in text else 0):
        text = _BOX.sub(r"\1", text)
    return _TEXT.sub(r"\\text{", text)


def _upright(found: re.Match[str]) -> str:
    return found[1] if len(found[1]) == 1 else f"\\{found[1]} "


def _is_price(sign: re.Match[str]) -> bool:
    """Whether a dollar sign stands before a number and has no partner, so that it is a currency."""
    alone = sign.string.count("$") % 2 == 1
    return sign[0] == "$" and alone and re.match(r"\s*-?[\d.]", sign.string[sign.end() :]) is not None


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _RAISED.sub(lambda power: f"^{{{power[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda index: f"_{{{index[0].translate(_SUBSCRIPTS)}}}", text)
    text = _ROOT_SIGN.sub(lambda root: _ROOTS[root[1]] + (f"{{{root[2]}}}" if root[2] else ""), text)
    return unicodedata.normalize("NFKC", text.translate(_TRANSLATION))


def _grouped(text: str) -> str:
    r"""2{,}107, 2\,107, 2,\!107 and 2'107 as 2107; 3{,}14 as 3.14."""
    text = _GROUPING.sub(lambda number: number[1] + re.sub(r"\\thinspace|[^0-9]", "", number[2]), text)
    return _DECIMAL_COMMA.sub(".", text)


def _repeating(text: str) -> str:
    r"""0.\overline{3}, 0.(3), 0.\dot{3} and 0.333\ldots as fractions."""
    if "." not in text:
        return text

    def spelled(start: str, period: str) -> str:
        places = len(start.partition(".")[2])
        if not period or places + len(period) > 60:
            return start + period
        before = int(start.replace(".", "") or "0")
        top, bottom = int(f"{before}{period}") - before, 10**places * (10 ** len(period) - 1)
        return f"\\frac{{{top}}}{{{bottom}}}"

    def by_mark(found: re.Match[str]) -> str:
        if found[5] is not None:
            return spelled(found[1], found[5] + (found[6] + found[7] if found[7] else ""))
        return spelled(found[1], found[2] or found[3] or found[4])

    text = _REPEATING.sub(by_mark, text)
    return _AND_SO_ON.sub(lambda found: spelled(found[1], found[2]), text)


def _trimmed(text: str) -> str:
    """`text` without marks around it and without the period of a sentence."""
    if text[:1].isalpha() or text.startswith("\\text"):
        text = _LEAD.sub("", _LEAD_IN_TEXT.sub(_without_lead, text))
    while True:
        before = text
        text = _MARKS.sub("", text.strip()).strip()
        text = re.sub(r"(?:(?<!\.)\.|,|;|\\\\?|:)$", "", text).strip()
        opening = _WHOLE.match(text)
        if opening and text.endswith("}") and _closes_at_end(text[opening.end() - 1 :]):
            text = text[opening.end() : -1]
        if text == before:
            return text


def _without_lead(found: re.Match[str]) -> str:
    r"""\text{Answer: } before an answer as nothing, other words as they are."""
    words, rest = found[1].strip(), found.string[found.end() :]
    lead = _LEAD.match(f"{words} {rest}")
    return "" if lead and lead.end() >= len(words) else found[0]


def _closes_at_end(text: str) -> bool:
    """Whether the brace that opens `text` is closed by its last character."""
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0 and found[0] == "}":
            return found.end() == len(text)
    return False
