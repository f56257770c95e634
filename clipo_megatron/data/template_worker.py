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

    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    while select.select([sys.stdin], [], [], _IDLE_S)[0] and (line := sys.stdin.readline()):
        request = json.loads(line)
        most = own + _MEMORY + 2 * _MULTIPLE * len(line)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(time.process_time()) + 1 + request["cpu_s"], resource.RLIM_INFINITY)
        )
        said = json.dumps(answer(request, len(line)))
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(said, flush=True)


if __name__ == "__main__":
    main()
