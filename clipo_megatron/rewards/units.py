r"""Units and magnitudes of answers: "5\text{ cm}" is 5 and a unit, "3 million" is 3 \cdot 10^6."""

from __future__ import annotations

import re

_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(
    rf"\\text\s*\{{\s*({'|'.join(_POWERS)})\b\s*([^{{}}]*)\}}|(?<=[\d}}])\s*({'|'.join(_POWERS)})\b", re.IGNORECASE
)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "USD": "dollar", "EUR": "euro"}
_CURRENCIES |= {"Rs": "rupee", "RMB": "yuan", "US$": "dollar", "₽": "rouble", "₩": "won", "￡": "pound"}
_SIGN = "|".join(map(re.escape, sorted(_CURRENCIES, key=len, reverse=True)))
_BEFORE = re.compile(rf"(-?)\s*(?:\\text\{{\s*)?({_SIGN})\.?\s*\}}?\s*(?=[-\d.\\])")
_AFTER = re.compile(rf"(?<=[\d}}])\s*({_SIGN})$")
_DEGREES = re.compile(
    r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\\text\{)?\s*([CF]?)\s*\}?$|\s*\\text\{\s*degrees?\s*\}$"
)
_IN_TEXT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|\{?\^(-?\d)\}?)?$")
_WORDS = re.compile(
    r"(?<=[\d}).])\s*([A-Za-zµ\\]{2,}\.?(?:\s*(?:\^\s*\{?-?\d\}?))?(?:\s*[/·\s-]\s*[A-Za-z]+\.?(?:\^\s*\{?-?\d\}?)?){0,5})$"
)
_SHORT = re.compile(r"(?<=[\d}).])\s*([A-Za-z]{1,3}(?:/[A-Za-z]{1,3})?(?:\^\s*\{?-?\d\}?)?)$")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
# After a number these words change it, so that they are no unit of it.
_NO_UNIT = re.compile(
    r"\b(?:and|or|but|not|if|when|except|minus|plus|times|by|dozens?|score|half|halves|thirds?|fourths?|quarters?|fifths?"
    r"|tenths?|hundredths?|hundred|thousand|million|billion|trillion|squared|cubed|factorial|pi|sqrt|more|less|than"
    r"|mod|to|approximately|about|is|does|only|least|most|over|choose|base)\b|\\(?!text)",
    re.IGNORECASE,
)
_ALIASES = {
    **dict.fromkeys(("cm", "centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("m", "meter", "metre"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometre"), "km"),
    **dict.fromkeys(("in", "inch", "inche"), "inch"),
    **dict.fromkeys(("ft", "foot", "feet"), "foot"),
    **dict.fromkeys(("yd", "yard"), "yard"),
    **dict.fromkeys(("mi", "mile"), "mile"),
    **dict.fromkeys(("s", "sec", "second"), "second"),
    **dict.fromkeys(("min", "minute"), "minute"),
    **dict.fromkeys(("h", "hr", "hour"), "hour"),
    **dict.fromkeys(("day", "d"), "day"),
    **dict.fromkeys(("week", "wk"), "week"),
    **dict.fromkeys(("month",), "month"),
    **dict.fromkeys(("year", "yr"), "year"),
    **dict.fromkeys(("g", "gram"), "gram"),
    **dict.fromkeys(("kg", "kilogram"), "kilogram"),
    **dict.fromkeys(("mg", "milligram"), "milligram"),
    **dict.fromkeys(("lb", "pound"), "pound"),
    **dict.fromkeys(("oz", "ounce"), "ounce"),
    **dict.fromkeys(("l", "liter", "litre"), "liter"),
    **dict.fromkeys(("ml", "milliliter", "millilitre"), "milliliter"),
    **dict.fromkeys(("dollar", "usd", "buck"), "dollar"),
    **dict.fromkeys(("cent", "penny", "pennie"), "cent"),
    **dict.fromkeys(("euro", "eur"), "euro"),
    **dict.fromkeys(("yen",), "yen"),
    **dict.fromkeys(("rupee", "rs"), "rupee"),
    **dict.fromkeys(("degree", "deg"), "degree"),
    **dict.fromkeys(("radian", "rad"), "radian"),
    **dict.fromkeys(("°c", "celsiu", "degreecelsiu"), "celsius"),
    **dict.fromkeys(("°f", "fahrenheit", "degreefahrenheit"), "fahrenheit"),
    **dict.fromkeys(("mph", "mile/hour", "mileperhour", "mi/h", "mi/hr"), "mph"),
    **dict.fromkeys(("km/h", "kph", "kmph", "kilometer/hour", "kilometerperhour"), "km/h"),
    **dict.fromkeys(("m/s", "meter/second", "meterpersecond", "mps"), "m/s"),
    **dict.fromkeys(("n", "newton"), "newton"),
    **dict.fromkeys(("j", "joule"), "joule"),
    **dict.fromkeys(("kj",), "kilojoule"),
    **dict.fromkeys(("w", "watt"), "watt"),
    **dict.fromkeys(("kw",), "kilowatt"),
    **dict.fromkeys(("v", "volt"), "volt"),
    **dict.fromkeys(("k", "kelvin"), "kelvin"),
    **dict.fromkeys(("mol", "mole"), "mole"),
    **dict.fromkeys(("hz", "hertz"), "hertz"),
    **dict.fromkeys(("pa", "pascal"), "pascal"),
}
_UNITS = set(_ALIASES.values())
_SHORT_UNITS = {"m", "s", "h", "g", "l", "n", "j", "w", "v", "k", "cm", "mm", "km", "in", "ft", "yd", "mi", "kg", "mg"}
_SHORT_UNITS |= {"lb", "oz", "ml", "hr", "min", "sec", "mph", "kph", "rad", "deg", "mol", "hz", "pa", "kj", "kw", "lbs"}


def with_magnitudes(text: str) -> str:
    r"""`text` with "million" as \cdot 10^{6}; a unit behind it stays."""

    def power(found: re.Match[str]) -> str:
        unit = f"\\text{{ {found[2]}}}" if found[2] else ""
        return f" \\cdot 10^{{{_POWERS[(found[1] or found[3]).lower()]}}}{unit}"

    return _MAGNITUDE.sub(power, text) if "illion" in text or "thousand" in text or "hundred" in text else text


def split_unit(text: str, *, short: bool = False) -> tuple[str, str]:
    """A number and its unit; the whole text and "" where there is no unit.

    Args:
        text: the answer.
        short: whether letters without a space, which may be variables, count where they are a known unit: 5m, 3kg.
    """
    if short:
        found = _SHORT.search(text)
        known = found and re.split(r"[/^]", found[1].lower())[0] in _SHORT_UNITS
        return (text[: found.start()].strip(), found[1]) if found and known else (text, "")
    if found := _BEFORE.match(text):
        number, unit = split_unit(text[found.end() :])
        if not unit or units_agree(unit, _CURRENCIES[found[2]]):
            return f"{found[1]}{number}", _CURRENCIES[found[2]]
        return text, ""
    if found := _AFTER.search(text):
        return text[: found.start()], _CURRENCIES[found[1]]
    if (found := _DEGREES.search(text)) and found.start() and not _TRIGONOMETRY.search(text):
        return text[: found.start()], f"°{found[1]}" if found[1] else "degree"
    return _unit_in_words(text)


def _unit_in_words(text: str) -> tuple[str, str]:
    for pattern in (_IN_TEXT, _WORDS):
        found = pattern.search(text)
        if found is None or not text[: found.start()].strip() or _NO_UNIT.search(found[1]):
            continue
        if re.search(r"\d", re.sub(r"\^\s*\{?-?\d\}?", "", found[1])) or not found[1].strip():
            continue
        before = text[: found.start()].strip()
        if not re.search(r"[\d})\]ie]$|\\pi$|[a-z]$", before) or re.search(r"\\text\s*$", before):
            continue
        if pattern is _WORDS and not (re.search(r"[\d})]$", before) and _is_word(found[1])):
            continue
        power = next((group for group in found.groups()[1:] if group), "")
        return before, found[1] + (f"^{power}" if power else "")
    return text, ""


def _is_word(text: str) -> bool:
    """Whether letters after a number are a word or a known unit, and no product of variables such as xy."""
    word = re.match(r"[A-Za-zµ]*", text)[0]
    known = _canonical(word) in _UNITS or word.lower() in _SHORT_UNITS
    return known or len(word) > 3 or (len(word) == 3 and re.search("[eiouEIOU]", word) is not None)


def units_agree(one: str, other: str) -> bool:
    """Whether two units may be the same: unknown words may, known units must be."""
    names = _canonical(one), _canonical(other)
    return names[0] == names[1] or None in (_known(names[0]), _known(names[1]))


def is_known(unit: str) -> bool:
    """Whether a unit is one that others are told from."""
    return _known(_canonical(unit)) is not None


def _known(name: str) -> str | None:
    base = re.sub(r"\^.*$", "", name)
    return name if base in _UNITS else None


def _canonical(unit: str) -> str:
    r"""One name of a unit: "square inches", "in^2" and "sq. in" are inch^2."""
    text = re.sub(r"[\\{}.,]|(?<![A-Za-z])text(?![A-Za-z])", "", unit).strip().lower().replace(" per ", "/")
    power = ""
    if found := re.match(r"(?:square|sq)\s+|(?:cubic|cu)\s+", text):
        power, text = "^2" if found[0][0] == "s" else "^3", text[found.end() :]
    if found := re.search(r"\s*\^\s*(-?\d)$", text):
        power, text = f"^{found[1]}", text[: found.start()]
    text = re.sub(r"\s+", "", text)
    for candidate in (text, text.removesuffix("s"), text.removesuffix("es")):
        if candidate in _ALIASES:
            return _ALIASES[candidate] + power
    return text.removesuffix("s") + power
