r"""Rewrites gold answers into equal and unequal answers, to measure how often a grader is wrong.

    for form in forms_of("\\frac{3}{4}"):   # equal: 0.75, 3/4, 75\%, \dfrac34, ...; unequal: -3/4, \frac{4}{3}, ...
        ...

`made_golds` draws golds of every kind that data sets have, where no data set is at hand.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_ROOT = re.compile(r"(-?\d*)\s*\\sqrt\{(\d+)\}")
_OF_PI = re.compile(r"(-?\d*)\s*\\pi")
_PAIR = re.compile(r"(?:\\left)?([(\[])\s*([^,()\[\]]+)\s*,\s*([^,()\[\]]+?)\s*(?:\\right)?([)\]])")
_GROUPED = re.compile(r"\d,(?:\\!)?\d{3}(?!\d)")  # thousands
_LIST = re.compile(r"[^,(){}\[\]=<>]+(?:,\s*[^,(){}\[\]=<>]+)+")
_BASE = re.compile(r"([0-9]+)_\{?(\d+)\}?")
_WORDS = re.compile(r"\\text\{([A-Za-z ]+)\}")
_POLYNOMIAL = re.compile(r"[-+0-9a-z^{} ]*[a-z][-+0-9a-z^{} ]*")
_ASSIGNED = re.compile(r"([a-zA-Z])\s*=\s*([^=,]+)")


@dataclass(frozen=True)
class Form:
    """An answer to the question of a gold answer.

    Attributes:
        response: the whole response.
        gold: the gold answer.
        equal: whether they are equal.
        kind: what was done, for a report.
    """

    response: str
    gold: str
    equal: bool
    kind: str


def forms_of(gold: str, draw: random.Random) -> Iterator[Form]:
    """Equal and unequal answers for one gold answer."""
    for kind, answer in _spellings(gold):
        yield Form(f"So it is ${answer}$.", gold, True, kind)
    for kind, answer in [*_equal(gold, draw), *_generally_equal(gold)]:
        yield Form(f"So it is $\\boxed{{{answer}}}$.", gold, True, kind)
    for kind, answer in [*_unequal(gold, draw), *_generally_unequal(gold, draw)]:
        if "".join(answer.split()) != "".join(gold.split()):
            yield Form(f"So it is $\\boxed{{{answer}}}$.", gold, False, kind)


def made_golds(count: int, draw: random.Random) -> list[str]:
    """Golds of every kind."""
    number = lambda: draw.choice((1, -1)) * draw.randrange(2, draw.choice((10, 100, 5000, 10**7)))  # noqa: E731
    kinds = (
        lambda: str(number()),
        lambda: f"{number()}.{draw.randrange(1, 100):02}",
        lambda: (
            f"{draw.choice(('', '-'))}\\frac{{{draw.randrange(1, 60)}}}{{{draw.choice((3, 4, 7, 8, 9, 11, 16, 25))}}}"
        ),
        lambda: f"{draw.randrange(2, 20)}\\sqrt{{{draw.choice((2, 3, 5, 7, 11))}}}",
        lambda: f"{draw.randrange(2, 40)}\\pi",
        lambda: f"({draw.randrange(-9, 9)},{draw.randrange(10, 20)})",
        lambda: f"[{draw.randrange(-9, 9)},{draw.randrange(10, 20)})",
        lambda: f"(-\\infty,{draw.randrange(1, 9)}]",
        lambda: f"{draw.randrange(-9, 0)},{draw.randrange(1, 9)},{draw.randrange(10, 99)}",
        lambda: f"{draw.randrange(2, 9)}x^2+{draw.randrange(2, 9)}x-{draw.randrange(2, 9)}",
        lambda: f"{draw.choice('xyk')}={draw.randrange(2, 99)}",
        lambda: f"{''.join(draw.choice('12') for _ in range(4))}_{{{draw.choice((3, 5, 7))}}}",
        lambda: f"\\text{{{draw.choice(('Monday', 'even', 'ellipse', 'the red ball', 'June'))}}}",
        lambda: f"{draw.randrange(2, 9)}+{draw.randrange(2, 9)}i",
        lambda: f"{draw.randrange(1, 99)}\\%",
        lambda: f"\\${draw.randrange(10, 99)}.{draw.randrange(10, 99)}",
        lambda: f"{draw.randrange(10, 170)}^\\circ",
        lambda: f"{draw.randrange(2, 99)} \\text{{ cm}}",
        lambda: f"\\begin{{pmatrix}} {draw.randrange(1, 9)} & {draw.randrange(1, 9)} \\\\ 0 & 1 \\end{{pmatrix}}",
        lambda: f"\\frac{{1}}{{2^{{{draw.randrange(30, 99)}}}}}",
        lambda: f"{draw.randrange(1, 9)}.{draw.randrange(10, 99)} \\times 10^{{{draw.choice((-34, -9, 6, 23))}}}",
        lambda: f"e^{{-{draw.randrange(20, 60)}}}",
        lambda: f"\\frac{{{draw.randrange(1, 9)}\\sqrt{{3}}}}{{{draw.choice((2, 4, 5))}}}",
    )
    return [kinds[index % len(kinds)]() for index in range(count)]


def _spellings(gold: str) -> Iterator[tuple[str, str]]:
    """Other ways to put the same text into a box."""
    yield "space before the brace", f"\\boxed {{{gold}}}"
    yield "line break before the brace", f"\\boxed\n{{{gold}}}"
    yield "fbox", f"\\fbox{{{gold}}}"
    yield "later mention", f"\\boxed{{{gold}}}$, in a \\boxed as asked$"
    yield "control token", f"\\boxed{{{gold}<|im_end|>}}"
    yield "thinking before", f"</think>\\boxed{{{gold}}}"


def _generally_equal(gold: str) -> Iterator[tuple[str, str]]:
    yield "itself", gold
    yield "period inside", gold if gold.endswith(".") else f"{gold}."
    yield "spaces around", f"  {gold} "
    yield "dollars inside", f"${gold}$"
    yield "display style", f"\\displaystyle {gold}"
    if "(" in gold and "\\left" not in gold and not re.search(r"\w\(", gold):
        yield "sized brackets", re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", gold))
    if "\\frac" in gold:
        yield "dfrac", gold.replace("\\frac", "\\dfrac")
    if gold.count("\\pi") == 1 and "\\pi{" not in gold:
        yield "the sign for pi", gold.replace("\\pi", "π")
    if "\\infty" in gold:
        yield "the sign for infinity", gold.replace("\\infty", "∞")
    if re.search(r"(?<![\w}])-\d", gold):
        yield "the sign for minus", gold.replace("-", "−")
    if "\\sqrt{" in gold and re.search(r"\\sqrt\{\d+\}", gold):
        yield "the sign for a root", re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold)
        yield "root without braces", re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold)
    if not re.search(r"[,=<>]|\\text|\\cup|\\begin|\\in|\\[lg]eq?", gold):
        yield "approximately", f"\\approx {gold}"
        yield "named", f"x = {gold}" if "x" not in gold else f"y = {gold}"


def _equal(gold: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    if _INTEGER.fullmatch(gold):
        yield from _equal_integers(int(gold), draw)
    elif _DECIMAL.fullmatch(gold):
        value = Fraction(gold)
        yield "decimal as a fraction", f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield "decimal with more zeros", f"{gold}00"
        yield "decimal with currency", f"\\${gold}"
    elif fraction := _FRACTION.fullmatch(gold):
        yield from _equal_fractions(fraction[1], int(fraction[2]), int(fraction[3]))
    elif (root := _ROOT.fullmatch(gold)) and root[1] not in ("", "-"):
        factor, radicand = int(root[1]), int(root[2])
        if factor > 0:
            yield "factor under the root", f"\\sqrt{{{factor * factor * radicand}}}"
        yield "power one half", f"{factor} \\cdot {radicand}^{{1/2}}"
        yield "root rationalised", f"\\frac{{{factor * radicand}}}{{\\sqrt{{{radicand}}}}}"
    elif (circle := _OF_PI.fullmatch(gold)) and circle[1] not in ("", "-"):
        yield "pi first", f"\\pi \\cdot {circle[1]}"
        yield "pi as a fraction", f"\\frac{{{2 * int(circle[1])}\\pi}}{{2}}"
    elif (pair := _PAIR.fullmatch(gold)) and pair[1] + pair[4] != "()":
        yield from _intervals(pair[1], pair[2], pair[3], pair[4])
    elif _PAIR.fullmatch(gold) and "\\infty" not in gold:
        yield "named pair", f"(x,y) = {gold}"
    elif _LIST.fullmatch(gold) and "\\text" not in gold and not _GROUPED.search(gold):
        parts = [part.strip() for part in gold.split(",")]
        yield "list in another order", ", ".join(parts[::-1])
        yield "list in braces", f"\\{{{', '.join(parts)}\\}}"
        yield "list joined by and", ", ".join(parts[:-1]) + f" \\text{{ and }} {parts[-1]}"
        yield "list of equations", " \\text{ or } ".join(f"z = {part}" for part in parts)
    elif base := _BASE.fullmatch(gold):
        yield "base in braces", f"{base[1]}_{{{base[2]}}}"
        yield "digits without the base", base[1]
    elif words := _WORDS.fullmatch(gold):
        yield "words in another case", words[1].upper()
        yield "bold words", f"\\textbf{{{words[1]}}}"
    elif (assigned := _ASSIGNED.fullmatch(gold)) and "\\text" not in gold:
        yield "value without its name", assigned[2].strip()
        yield "equation with spaces", f"{assigned[1]}   =  {assigned[2]}"
    elif _POLYNOMIAL.fullmatch(gold) and re.search(r"[-+]", gold[1:]) and not re.search(r"i|\{[^}]*[-+]", gold):
        terms = re.findall(r"[-+]?[^-+]+", gold.replace(" ", ""))
        yield (
            "terms in another order",
            "".join(term if term[0] in "-+" else f"+{term}" for term in terms[::-1]).removeprefix("+"),
        )
        yield "doubled and halved", f"\\frac{{2({gold})}}{{2}}"


def _equal_integers(value: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    sign, size = ("-", -value) if value < 0 else ("", value)
    yield "integer with a decimal point", f"{value}.0"
    yield "integer as a quotient", f"\\frac{{{value * 6}}}{{6}}"
    yield "integer as a sum", f"{value - 3} + 3"
    yield "integer with a unit", f"{value} \\text{{ {draw.choice(('cm', 'apples', 'square feet', 'dollars', 'ways'))}}}"
    yield "integer with words", f"{value} {draw.choice(('apples', 'meters', 'dollars', 'm/s'))}"
    yield "integer in brackets", f"({value})"
    yield "integer with currency", f"{draw.choice(('€', '£', chr(92) + '$'))}{value}" if value > 0 else f"{value}"
    yield "value of a chain", f"n = {value - 1} + 1 = {value}"
    if size >= 1000:
        grouped = f"{size:,}"
        for name, mark in (
            ("comma", ","),
            ("braced comma", "{,}"),
            ("thin space", "\\,"),
            ("kern", ",\\!"),
            ("space", " "),
        ):
            yield f"thousands by {name}", sign + grouped.replace(",", mark)
        yield "scientific", f"{value / 10 ** (len(str(size)) - 1):.12g} \\times 10^{{{len(str(size)) - 1}}}"
    if 1 < size < 50:
        yield "integer as a root", f"{sign}\\sqrt{{{size * size}}}"
    if size == 0 or size > 10**15:
        return
    yield "full-width digits", "".join(chr(ord(each) + 0xFEE0) if each.isdigit() else each for each in str(value))


def _equal_fractions(sign: str, top: int, bottom: int) -> Iterator[tuple[str, str]]:
    if bottom == 0:
        return
    value = Fraction(top, bottom)
    yield "slash", f"{sign}{top}/{bottom}"
    yield "expanded fraction", f"{sign}\\frac{{{top * 3}}}{{{bottom * 3}}}"
    yield "minus in the numerator" if sign else "numerator in brackets", f"\\frac{{{sign}{top}}}{{{bottom}}}"
    yield "fraction as a power", f"{sign}{top} \\cdot {bottom}^{{-1}}"
    if value > 1 and value.denominator > 1:
        whole, rest = divmod(value.numerator, value.denominator)
        yield "mixed number", f"{sign}{whole}\\frac{{{rest}}}{{{value.denominator}}}"
        yield "plain mixed number", f"{sign}{whole} {rest}/{value.denominator}"
    places = next((n for n in range(1, 12) if (value * 10**n).denominator == 1), None)
    if places is not None:
        yield (
            "terminating decimal",
            f"{sign}{value.numerator * 10**places // value.denominator / 10**places:.{places}f}",
        )
        if value < 10:
            yield "percent of a fraction", f"{sign}{float(value * 100):.10g}\\%"
    else:
        yield "long decimal", f"{sign}{float(value):.10f}" if value > Fraction(1, 100) else f"{sign}{top}/{bottom}"
    if value.denominator in (3, 9) and value < 1:
        yield "repeating decimal", f"{sign}0.\\overline{{{value.numerator * 9 // value.denominator}}}"


def _intervals(opening: str, low: str, high: str, closing: str) -> Iterator[tuple[str, str]]:
    below, above = ("<" if opening == "(" else "\\le"), ("<" if closing == ")" else "\\le")
    if low.strip() == "-\\infty":
        yield "half-line", f"x {above} {high}"
    elif high.strip() == "\\infty":
        yield "half-line", f"x {'>' if opening == '(' else chr(92) + 'ge'} {low}"
    else:
        yield "double inequality", f"{low} {below} x {above} {high}"
    yield "membership", f"x \\in {opening}{low},{high}{closing}"


def _unequal(gold: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    if _INTEGER.fullmatch(gold):
        value = int(gold)
        yield "next integer", str(value + 1)
        yield "near integer", f"{value}.0000001"
        yield "near integer below", f"{value - 1}.9999999"
        yield "ten times", f"{value}0" if value else "10"
        if value:
            yield "other sign", str(-value)
            yield "reciprocal", f"\\frac{{1}}{{{value}}}" if abs(value) != 1 else "7"
        if abs(value) >= 1000:
            yield "split by a comma and a space", f"{abs(value) // 1000}, {abs(value) % 1000:03}"
        yield "two values", f"{value} \\text{{ or }} {value + 1}"
        yield "false equation", f"{value + 1} = {value}"
        if value:
            yield "with a variable", f"{value}x"
        yield "dozens", f"{value} \\text{{ dozen}}"
    elif fraction := _FRACTION.fullmatch(gold):
        sign, top, bottom = fraction[1], int(fraction[2]), int(fraction[3])
        yield "next numerator", f"{sign}\\frac{{{top + 1}}}{{{bottom}}}"
        if top != bottom:
            yield "upside down", f"{sign}\\frac{{{bottom}}}{{{top}}}"
        yield (
            "two digits",
            f"{sign}{top / bottom:.2f}" if bottom and (100 * Fraction(top, bottom)).denominator > 1 else "77",
        )
    elif (pair := _PAIR.fullmatch(gold)) and pair[2].strip() != pair[3].strip():
        other = {"(": "[", "[": "(", ")": "]", "]": ")"}
        yield "other bracket", f"{pair[1]}{pair[2]},{pair[3]}{other[pair[4]]}"
        yield "swapped", f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}"
        yield "half of a pair", pair[2]
    elif _LIST.fullmatch(gold) and "\\text" not in gold and not _GROUPED.search(gold):
        parts = [part.strip() for part in gold.split(",")]
        yield "half of a list", ", ".join(parts[:-1])
        yield "one more", f"{gold}, 777"
    elif assigned := _ASSIGNED.fullmatch(gold):
        other = "q" if assigned[1] != "q" else "r"
        yield "other name", f"{other} = {assigned[2]}"
    elif (words := _WORDS.fullmatch(gold)) and words[1] != words[1][::-1]:
        yield "letters in another order", words[1][::-1]


def _generally_unequal(gold: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    if "=" in gold and "%" in gold:
        return  # several spellings of one value
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if digits and "\\text" not in gold:
        place = draw.choice(digits)
        changed = gold[:place] + str((int(gold[place]) + 1) % 10) + gold[place + 1 :]
        if not re.search(r"\{0\}|/0|\^\{?0", changed):
            yield "changed digit", changed
    if not re.search(r"[,=<>]|\\text|\\pm|\\begin|_|\\cup", gold) and re.search(r"\d", gold) and gold.strip("0."):
        yield "negated", f"-({gold})" if "\\%" not in gold and "\\$" not in gold and "circ" not in gold else f"-{gold}"
        yield "plus one", f"{gold}+1" if "\\%" not in gold and "\\$" not in gold and "circ" not in gold else "777"
