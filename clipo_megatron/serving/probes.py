"""Three health checks of a running server, over blocking HTTP.

`answers` checks the HTTP process, which answers even while the engine loads weights, is paused or prefills long
prompts. `engine_answers` checks the engine's own loop, which such work may block. `generates` checks that the server
can generate. The supervisor does not use the pool's client, which would load torch into `clipo serve`.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from clipo_megatron.config.schema import EngineKind

# Of several paths, a release that does not know the first (404) is asked the next.
_HTTP = {EngineKind.sglang: ("/model_info",), EngineKind.vllm: ("/version",)}
_ENGINE = {EngineKind.sglang: ("/server_info", "/get_server_info"), EngineKind.vllm: ("/is_sleeping",)}
_GENERATES = {EngineKind.sglang: ("/health_generate",), EngineKind.vllm: ("/health",)}


@dataclass(frozen=True, slots=True)
class Probe:
    """The health checks of one server."""

    url: str
    engine: EngineKind
    key: str | None = field(default=None, repr=False)

    def answers(self, timeout_s: float) -> bool:
        """Whether its HTTP process answers at all, if only with an error."""
        return self._status(_HTTP[self.engine][0], timeout_s) is not None

    def engine_answers(self, timeout_s: float) -> bool:
        """Whether its engine answers."""
        return self._good(_ENGINE[self.engine], timeout_s)

    def generates(self, timeout_s: float) -> bool:
        """Whether it can generate: SGLang generates a token; vLLM listens only once it can."""
        return self._good(_GENERATES[self.engine], timeout_s)

    def _good(self, paths: tuple[str, ...], timeout_s: float) -> bool:
        for path in paths:
            status = self._status(path, timeout_s)
            if status != 404:
                break
        return status is not None and status < 300

    def _status(self, path: str, timeout_s: float) -> int | None:
        """The HTTP status, None if there is no answer in time."""
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would send the key to another host."""

    def redirect_request(self, *_arguments: object) -> None:
        return None


# Without the proxies that the environment may name for other traffic.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
