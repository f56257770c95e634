"""Three questions to a running server, from the lightest to the heaviest. Plain blocking HTTP; no client is needed.

`answers` is about the process that speaks HTTP: it answers from memory even while the engine loads weights, is paused
or works on long prompts. `engine_answers` goes through the engine's own loop, which such work may hold up for
as long as it takes. `generates` is only true when a token came out.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from clipo_megatron.config.schema import EngineKind

# The first path that a release knows (404: it does not) is asked.
_LIGHT = {EngineKind.sglang: ("/model_info",), EngineKind.vllm: ("/version",)}
_ENGINE = {EngineKind.sglang: ("/server_info", "/get_server_info"), EngineKind.vllm: ("/is_sleeping",)}
_GENERATES = {EngineKind.sglang: ("/health_generate",), EngineKind.vllm: ("/health",)}


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks one server."""

    url: str
    engine: EngineKind
    key: str | None = field(default=None, repr=False)

    def answers(self, timeout_s: float) -> bool:
        """Whether its HTTP process says anything at all."""
        return self._status(_LIGHT[self.engine][0], timeout_s) is not None

    def engine_answers(self, timeout_s: float) -> bool:
        """Whether its engine says anything."""
        return self._good(_ENGINE[self.engine], timeout_s)

    def generates(self, timeout_s: float) -> bool:
        """Whether it is ready. SGLang generates a token for this; vLLM listens only when it can."""
        return self._good(_GENERATES[self.engine], timeout_s)

    def _good(self, paths: tuple[str, ...], timeout_s: float) -> bool:
        for path in paths:
            status = self._status(path, timeout_s)
            if status != 404:
                break
        return status is not None and status < 300

    def _status(self, path: str, timeout_s: float) -> int | None:
        """None: no answer, or none in time."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with _OPENER.open(request, timeout=timeout_s) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except (OSError, http.client.HTTPException, ValueError):
            return None


# Servers are asked directly, whatever proxy the environment names for other traffic.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
