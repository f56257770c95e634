"""Messages between the pool and its workers: 4 bytes of length, big-endian, then one JSON object in ASCII.

JSON escapes carry every Python string, null bytes and lone surrogates included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

HEADER_BYTES = 4


def encode(message: dict[str, Any]) -> bytes:
    """The frame of `message`. Values JSON does not know (dates, fractions) become their text."""
    body = json.dumps(message, default=str).encode("ascii")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def read(read_exactly: Callable[[int], bytes]) -> dict[str, Any]:
    """The next message; `read_exactly(n)` returns n bytes or raises."""
    size = int.from_bytes(read_exactly(HEADER_BYTES), "big")
    return json.loads(read_exactly(size))
