"""`clipo` whose local engine takes for ever over one step: CLIPO_SLOW_STEP, of which the file CLIPO_SLOW_MARK tells.

python tests/slow_rank.py train CONFIG...     as a rank of a launcher, or of a job by --python
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipo_megatron.cli.main import main
from clipo_megatron.rollout.local.engine import LocalEngine

STEP, MARK, TOKEN_S = int(os.environ["CLIPO_SLOW_STEP"]), Path(os.environ["CLIPO_SLOW_MARK"]), 60.0


def _decode(self: LocalEngine, wave: Any, params: Any, check: Callable) -> Iterator:
    def wait() -> None:
        check()
        if params.step == STEP and not MARK.with_suffix(".over").exists():
            MARK.touch()
            for _ in range(int(TOKEN_S / 0.05)):  # as a forward of a large model would come back to its caller
                time.sleep(0.05)
                check()

    return decode(self, wave, params, wait)


decode = LocalEngine._decode
LocalEngine._decode = _decode

if __name__ == "__main__":
    sys.exit(main())
