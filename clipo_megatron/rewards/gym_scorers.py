"""Scorers of reasoning-gym that evaluate text as code, written anew, and what those that are fooled leave out.

Each gives the verdict of the data set's own scorer on the full score, which alone counts here: some of these data sets
evaluate an answer only in order to give a part of it. The answers and the rows that are read here run nothing.

Some scorers give the full score to answers that are wrong, even to one and the same answer for every problem: "nan",
"0", anything at all. Since a policy would learn it, an answer also has to pass `is_possible`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from clipo_megatron.data.generators import PACKAGE
from clipo_megatron.rewards.algebra import read_formula
from clipo_megatron.rewards.expression import FRACTIONS, INTEGERS, read

Scorer = Callable[[str, Mapping[str, Any]], float]
_EVALUATORS = {
    *("eval", "exec", "parse_expr", "sympify", "literal_eval", "lambdify", "parse_latex", "nsimplify"),
    *("__import__", "import_module", "system", "popen", "Popen", "check_output", "Unpickler", "unpickle"),
}
_INTEGER = re.compile(r"\b\d+\b")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf|infinity)(?![a-z])|nan[ij]", re.IGNORECASE)


def _equal(answer: str, entry: Mapping[str, Any]) -> float:
    return float(answer == entry["answer"])


def _equal_but_for_space(answer: str, entry: Mapping[str, Any]) -> float:
    return float(answer.strip() == entry["answer"].strip())


def _n_queens(answer: str, entry: Mapping[str, Any]) -> float:
    return float(answer in entry["metadata"]["valid_answers"])


def _number_sorting(answer: str, entry: Mapping[str, Any]) -> float:
    expected = [float(number) for number in json.loads(entry["answer"].replace("'", '"'))]
    try:
        given = json.loads(answer.replace("'", '"'))
        numbers = [float(number) for number in given] if isinstance(given, list) else []
    except (ValueError, TypeError, OverflowError, RecursionError):
        return 0.0
    is_sorted = numbers == sorted(numbers, reverse=entry["metadata"]["direction"] != "ascending")
    is_close = len(numbers) == len(expected) and not any(abs(a - b) > 1 for a, b in zip(numbers, expected, strict=True))
    return float(isinstance(given, list) and is_sorted and is_close)


def _bitwise_arithmetic(answer: str, entry: Mapping[str, Any]) -> float:
    value = read(entry["metadata"]["problem"], INTEGERS)
    try:
        return float(int(answer, 0) == value)
    except ValueError:
        return 0.0


def _puzzle24(answer: str, entry: Mapping[str, Any]) -> float:
    value, numbers = _value(answer), [int(number) for number in _INTEGER.findall(answer)]
    in_range = all(1 <= number <= 10 for number in numbers)  # as the scorer has it, whatever range was generated
    are_given = sorted(numbers) == sorted(entry["metadata"].get("numbers", numbers))  # which it leaves out
    return float(value is not None and int(value) == 24 and len(numbers) == 4 and in_range and are_given)


def _countdown(answer: str, entry: Mapping[str, Any]) -> float:
    target, value = entry["metadata"]["target"], _value(answer)
    if value is None or abs(value - target) > 1e-6 + 1e-5 * abs(target):  # as numpy.isclose has it
        return 0.0
    numbers = [int(number) for number in _INTEGER.findall(answer)]
    return float(sorted(numbers) == sorted(entry["metadata"]["numbers"]))


def _value(answer: str) -> Any:
    """The value of an answer that is arithmetic; None where it is not, or has no real value."""
    try:
        value = read(answer, FRACTIONS)
    except (ValueError, ArithmeticError):
        return None
    return None if isinstance(value, complex) else value


def _integration(answer: str, entry: Mapping[str, Any]) -> float:
    import sympy

    integrand = read_formula(entry["metadata"]["integrand"])
    try:
        derivative = sympy.diff(read_formula(answer), sympy.Symbol(entry["metadata"]["variable"]))
        return float(sympy.simplify(derivative - integrand) == 0)
    except MemoryError:
        raise
    except Exception:  # SymPy raises anything on what is no formula of one variable
        return 0.0


def _polynomial_multiplication(answer: str, entry: Mapping[str, Any]) -> float:
    product = read_formula(entry["answer"])
    try:
        return float(read_formula(answer) == product)
    except (ValueError, ArithmeticError, TypeError, AttributeError):
        return 0.0


SCORERS: dict[str, Scorer] = {
    "binary_matrix": _equal,
    "bitwise_arithmetic": _bitwise_arithmetic,
    "countdown": _countdown,
    "intermediate_integration": _integration,
    "n_queens": _n_queens,
    "number_sorting": _number_sorting,
    "polynomial_multiplication": _polynomial_multiplication,
    "puzzle24": _puzzle24,
    "simple_integration": _integration,
    "spiral_matrix": _equal_but_for_space,
    "string_insertion": _equal,
}


def is_possible(name: str, answer: str, gold: str) -> bool:
    """Whether an answer to a problem of a data set can be right, where its scorer leaves something out."""
    if _NO_NUMBER.search(answer) and not _NO_NUMBER.search(gold):  # no comparison with it is false
        return False
    return name not in _NEEDED or _NEEDED[name](answer, gold)


def _is_same_word(answer: str, gold: str) -> bool:
    return answer.strip().casefold() == gold.strip().casefold()


def _is_as_long(answer: str, gold: str) -> bool:
    return len(answer.strip()) == len(gold.strip())


def _is_near(answer: str, gold: str) -> bool:
    """Whether a probability is right to a part of itself; the scorer takes 0 for a small one, and 0.6 for 0.65625."""
    try:
        given, wanted = (Fraction(each.replace(",", "")) for each in (answer, gold))
    except (ValueError, ZeroDivisionError):
        return False
    return abs(given - wanted) <= abs(wanted) / 1000


def _has_sign(answer: str, gold: str) -> bool:
    found = _NUMBER.search(answer)
    return found is not None and found[0].startswith("-") == gold.strip().startswith("-")


_NEEDED: dict[str, Callable[[str, str], bool]] = {
    "coin_flip": _is_near,
    "game_of_life_halting": _is_same_word,
    "gsm_symbolic": _has_sign,
    "letter_jumble": _is_as_long,
    "spell_backward": _is_as_long,
}


def evaluator_in(scorer: MethodType) -> str | None:
    """What a data set's scorer evaluates text with, such as "eval", itself or by other code of its package; or None."""
    seen: set[CodeType] = set()
    waiting: list[FunctionType] = [scorer.__func__]
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for name in _names(function.__code__):
            meant = [each for each in _meanings(name, function, type(scorer.__self__)) if _is_of_package(each)]
            if meant:
                waiting += (each for meaning in meant for each in _functions(meaning))
            elif name in _EVALUATORS:
                return name
    return None


def _meanings(name: str, function: FunctionType, owner: type) -> list[Any]:
    """What a name in a method's code may stand for: of its class, its module, or a module that this one imports."""
    modules = [each for each in function.__globals__.values() if isinstance(each, ModuleType)]
    places = (owner, *(module for module in modules if module.__name__.startswith(PACKAGE)))
    return [function.__globals__.get(name), *(getattr(place, name, None) for place in places)]


def _is_of_package(meant: Any) -> bool:
    return isinstance(meant, (type, FunctionType)) and str(meant.__module__).startswith(PACKAGE)


def _names(code: CodeType) -> Iterator[str]:
    """The names that some code and the code within it look up, of variables and of attributes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _functions(meant: Any) -> list[FunctionType]:
    """A function, or all functions of a class."""
    found = vars(meant).values() if isinstance(meant, type) else [meant]
    plain = (each.__func__ if isinstance(each, (staticmethod, classmethod)) else each for each in found)
    return [each for each in plain if isinstance(each, FunctionType)]
