"""What `model.template_options` may hold: values that the chat template reads, beside the turns themselves."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from clipo_megatron.data.sources import DataError
from clipo_megatron.data.templates import TemplateRefusal, render_template

_KEY = "model.template_options"
_WRITTEN_BY_US = {"messages", "add_generation_prompt"}  # what every rendering gives the template
_HANDED_ON = {"tools", "documents"}  # arguments of `apply_chat_template` that it gives to the template as they are
# What else a template is given without being asked, so that naming it would change nothing or break the rendering.
_GIVEN = {"raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"}
_TURNS = [{"role": "user", "content": "first"}]


def check_template_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that the tokenizer's chat template does not read, or that it reads as something else.

    Raises:
        DataError: names the option and its value, the reason and the remedy.
    """
    if not options:
        return
    known = _read_by(tokenizer)
    for name, value in options.items():
        if name not in known:
            raise DataError(f"{_KEY}.{name} = {value!r}: {_why_unknown(name, known, tokenizer)}")
        _refuse_text_for_truth(tokenizer, str(name), value)


def _read_by(tokenizer: Any) -> set[str]:
    """The names that the chat template reads and that nobody else gives it.

    Raises:
        DataError: the template cannot be parsed.
    """
    from jinja2 import TemplateError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template("").environment
        parsed = environment.parse(_template_of(tokenizer))
    except (TemplateError, RecursionError) as error:
        raise DataError(f"the chat template cannot be parsed: {error}. Correct chat_template.jinja.") from error
    names = {each.name for each in parsed.find_all(nodes.Name) if each.ctx == "load"}
    assigned = {each.name for each in parsed.find_all(nodes.Name) if each.ctx in ("store", "param")}
    # A template may give an option its default: {% set enable_thinking = enable_thinking or false %}
    optional = {name for name in assigned & names if _is_tested(parsed, name)}
    return (names - assigned | optional) - _WRITTEN_BY_US - _GIVEN - _arguments(tokenizer)


def _is_tested(parsed: Any, name: str) -> bool:
    """Whether a template asks if `name` is defined, as one does of what its caller may leave out."""
    from jinja2 import nodes

    tests = (each for each in parsed.find_all(nodes.Test) if each.name in ("defined", "undefined", "none"))
    filters = (each for each in parsed.find_all(nodes.Filter) if each.name in ("default", "d"))
    return any(isinstance(each.node, nodes.Name) and each.node.name == name for each in (*tests, *filters))


def _template_of(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template.get("default", "") if isinstance(template, dict) else template


def _arguments(tokenizer: Any) -> set[str]:
    """The names that `apply_chat_template` takes itself, before the template sees them, and special tokens."""
    arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters) - _HANDED_ON
    return arguments | set(tokenizer.special_tokens_map)


def _why_unknown(name: str, known: set[str], tokenizer: Any) -> str:
    if name in _WRITTEN_BY_US | _arguments(tokenizer):
        return "this is given to the template by every rendering. Remove it."
    if close := difflib.get_close_matches(str(name), known, n=1, cutoff=0.6):
        return f"the chat template does not read it. Did you mean {close[0]}?"
    listed = f"it reads {', '.join(sorted(known))}" if known else "it reads no options"
    return f"the chat template does not read it; {listed}. Remove it, or correct its name."


def _refuse_text_for_truth(tokenizer: Any, name: str, value: Any) -> None:
    """Refuse text or a number for an option that the template only asks for true or false.

    "flase" would be as good as true. Such an option renders differently for true and for false, and like one of them
    for any other value.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return
    yes, no, given = (_rendered(tokenizer, {name: each}) for each in (True, False, value))
    if None not in (yes, no) and yes != no and given in (yes, no):
        raise DataError(
            f"{_KEY}.{name} = {value!r}: the chat template asks for true or false here. Write true or false, without "
            "quotes."
        )


def _rendered(tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    try:
        return render_template(tokenizer, [_TURNS], options, open_turn=True)[0]
    except TemplateRefusal:  # the prompts' own rendering reports it in words
        return None
