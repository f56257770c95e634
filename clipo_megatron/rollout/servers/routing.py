"""Chooses the server for a request, as a pure function of the prompt's id and of the servers' load."""

from __future__ import annotations

from collections.abc import Mapping, Set
from hashlib import blake2b


def choose(prompt_id: str, busy: Mapping[str, int], *, slack: int, excluded: Set[str] = frozenset()) -> str:
    """Return the URL of the server that a request should go to.

    Rendezvous hashing of prompt id and URL gives each prompt a preferred server. A prompt that is sent again finds its
    prefix in that server's cache, and most prompts keep their server when others come and go. The preferred server is
    chosen unless it has more than `slack` requests more than the idlest; then the idlest is, with ties broken by the
    prompt's preference.

    Args:
        prompt_id: id of the request's prompt.
        busy: URL of each usable server -> its requests in flight; at least one server.
        slack: how many more requests than the idlest the preferred server may have.
        excluded: servers that are chosen only if there is no other.
    """
    candidates = [url for url in busy if url not in excluded] or list(busy)
    preference = {url: _hash(prompt_id, url) for url in candidates}
    preferred = max(candidates, key=preference.__getitem__)
    idlest = min(candidates, key=lambda url: (busy[url], -preference[url]))
    return preferred if busy[preferred] <= busy[idlest] + slack else idlest


def _hash(prompt_id: str, url: str) -> int:
    key = f"{len(prompt_id)}:{prompt_id}{url}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest())
