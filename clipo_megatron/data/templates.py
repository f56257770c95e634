"""Renders chat templates in a process that is ended when one takes too long or too much memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipo_megatron.data.sources import DataError

CPU_S = 5  # processor time of each request; an ordinary one takes some hundredths
_REMEDY = "Correct the model's chat_template.jinja or tokenizer_config.json."
# What the process needs of the environment: to find its libraries, and the time zone for templates that tell the date.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")


class TemplateLimitError(DataError):
    """The chat template takes more time or memory than any template needs."""


class TemplateRefusal(DataError):
    """The chat template does not parse, or cannot render the turns."""


def render_template(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    options: Mapping[str, Any] | None = None,
    *,
    open_turn: bool = False,
) -> list[str]:
    """The text of each conversation, as the tokenizer's `apply_chat_template` gives it.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        conversations: turns with role and content.
        options: what the template reads beside the turns (model.template_options).
        open_turn: whether the template opens the turn of the assistant at the end.

    Raises:
        TemplateRefusal: the template does not parse, or cannot render one of the conversations.
        TemplateLimitError: it does not end, or needs too much memory.
    """
    options = dict(options or {})
    request = {
        "template": tokenizer.get_chat_template(None, options.get("tools")),
        "conversations": [[dict(turn) for turn in turns] for turns in conversations],
        "names": {**tokenizer.special_tokens_map, **options},
        "open_turn": open_turn,
        "cpu_s": CPU_S,
    }
    if request["template"] in _REFUSED:
        raise TemplateLimitError(_REFUSED[request["template"]])
    try:
        answer = _PROCESS.ask(json.dumps(request, default=str))
        if "texts" in answer:
            return answer["texts"]
        kind, text = answer["kind"], answer["text"]
        if kind == "size":
            raise TemplateLimitError(f"the chat template is refused: {text}. {_REMEDY}")
    except TemplateLimitError as error:
        _REFUSED[request["template"]] = str(error)
        raise
    if kind == "syntax":
        raise TemplateRefusal(f"the chat template does not parse: line {answer['line']}: {text}. {_REMEDY}")
    if kind == "refusal":
        raise TemplateRefusal(f"the chat template refuses the turns: {text}. Change the row or the template.")
    given = ", ".join(f"{name}: {value!r}" for name, value in options.items())
    where = f" with model.template_options = {{{given}}}" if given else ""
    raise TemplateRefusal(
        f"the chat template cannot render the turns{where}: {text}. Correct the options or the template."
    )


class _TemplateProcess:
    """The process, which is started when it is needed and ends by itself soon after."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request; a TemplateLimitError if the process was ended over it."""
        with self._lock:
            for _ in range(2):  # it may have ended for lack of requests just now
                process = self._running()
                try:
                    process.stdin.write(f"{request}\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                except BrokenPipeError:
                    line = ""
                if line:
                    return json.loads(line)
                process.stdout.close()
                self._process, code = None, process.wait()
                if code == -signal.SIGXCPU:
                    raise TemplateLimitError(
                        f"the chat template does not end: it was stopped after {CPU_S} s of processor time. {_REMEDY}"
                    )
            raise TemplateLimitError(f"the process that renders the chat template ended with code {code}. {_REMEDY}")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
        return self._process

    def _started(self) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is for the run, which ends it by closing the pipe
            )
        except OSError as error:
            raise DataError(
                f"the process that renders the chat template cannot be started: {error.strerror}. Raise the limits of "
                "open files and processes (`ulimit -n 4096`), or close what takes them."
            ) from error


_PROCESS = _TemplateProcess()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.__init__)  # a fork starts its own: the pipes are the parent's
_REFUSED: dict[str, str] = {}  # templates that were over the limits, which are not tried again, and why
