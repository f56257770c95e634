"""Which server answers a request. Pure: a function of the prompt's id and of how busy the servers are."""

from __future__ import annotations

from collections.abc import Mapping, Set
from hashlib import blake2b


def choose(prompt_id: str, busy: Mapping[str, int], *, slack: int, excluded: Set[str] = frozenset()) -> str:
    """The server for a request.

    Each prompt has a server of its own, drawn by the hash of both names, so that a prompt that comes again finds its
    prefix in that server's cache, and most prompts keep theirs when servers come and go. It is taken unless it is
    busier than the idlest by more than `slack`; then the idlest is, among equals the one that the prompt prefers.

    Args:
        prompt_id: of the request.
        busy: servers that may be asked, each with the requests it has in flight; at least one.
        slack: requests that the prompt's own server may have more than the idlest.
        excluded: servers that are asked only when there is no other.
    """
    candidates = [url for url in busy if url not in excluded] or list(busy)
    preference = {url: _rank(prompt_id, url) for url in candidates}
    own = max(candidates, key=preference.__getitem__)
    idlest = min(candidates, key=lambda url: (busy[url], -preference[url]))
    return own if busy[own] <= busy[idlest] + slack else idlest


def _rank(prompt_id: str, url: str) -> int:
    key = f"{len(prompt_id)}:{prompt_id}{url}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest())
