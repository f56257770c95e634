"""The program that renders chat templates, in a process of its own: requests and answers are lines of JSON.

Templates are programs by whoever made the model. They cannot reach anything, since transformers renders them in jinja's
sandbox, but they can loop for ever or fill the memory: the kernel ends this process when it takes more than its share.
"""

from __future__ import annotations

import json
import resource
import select
import sys
import time
from typing import Any

_MEMORY = 1 << 30  # bytes beyond what the process has when it starts, and a multiple of what it is given
_CHARACTERS = 2_000_000  # that each conversation may become, beyond a multiple of its own
_MULTIPLE = 10
_IDLE_S = 10.0  # after which it ends by itself


def answer(request: dict[str, Any], size: int) -> dict[str, Any]:
    """The texts of the conversations of a request, or what went wrong: kind of the error, its text, the line.

    `size` is that of the request in characters.
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts = render_jinja_template(
            conversations=request["conversations"],
            chat_template=request["template"],
            add_generation_prompt=request["open_turn"],
            **request["names"],
        )[0]
        if sum(map(len, texts)) > _MULTIPLE * size + _CHARACTERS * len(texts):
            return {"kind": "size", "text": f"it writes {sum(map(len, texts)):,} characters"}
        return {"texts": texts}
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "text": str(error.message), "line": error.lineno}
    except TemplateError as error:
        return {"kind": "refusal", "text": str(error)}
    except MemoryError:
        return {"kind": "size", "text": "it needs more than a gigabyte of memory"}
    except Exception as error:  # a template runs what it likes
        return {"kind": "error", "text": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer requests until there are no more, or none has come for some seconds."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # saves seconds: templates need none
    import transformers.utils.chat_template_utils  # noqa: F401

    own = _address_space()
    while select.select([sys.stdin], [], [], _IDLE_S)[0] and (line := sys.stdin.readline()):
        request = json.loads(line)
        most = (own or 0) + _MEMORY + 2 * _MULTIPLE * len(line)
        if own is not None:
            _limit(resource.RLIMIT_AS, most)
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + request["cpu_s"])
        said = json.dumps(answer(request, len(line)))
        _limit(resource.RLIMIT_CPU, None)
        print(said, flush=True)


def _address_space() -> int | None:
    """The bytes of address space that this process has; None on macOS, which does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _limit(kind: int, most: int | None) -> None:
    """Set a limit of this process, or lift it, as far as the user's own limit allows."""
    _, hard = resource.getrlimit(kind)
    wanted = hard if most is None else most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (wanted, hard))


if __name__ == "__main__":
    main()
