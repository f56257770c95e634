"""`clipo` with a local engine that needs a minute per token in step CLIPO_SLOW_STEP, and creates CLIPO_SLOW_MARK there.

python tests/support/slow_rank.py train CONFIG...     as a rank of a launcher, or of a job by --python
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipo_megatron.cli.main import main
from clipo_megatron.rollout.local.workload import Workload

STEP, MARK, TOKEN_S = int(os.environ["CLIPO_SLOW_STEP"]), Path(os.environ["CLIPO_SLOW_MARK"]), 60.0


def _decode(self: Workload, under_way: Any) -> Iterator:
    check = self.check

    def wait() -> None:
        check()
        if under_way.wave.params.step == STEP and not MARK.with_suffix(".over").exists():
            MARK.touch()
            for _ in range(int(TOKEN_S / 0.05)):  # between two checks, as the forwards of a large model
                time.sleep(0.05)
                check()

    self.check = wait
    yield from decode(self, under_way)
    self.check = check


decode = Workload._decode
Workload._decode = _decode

if __name__ == "__main__":
    sys.exit(main())
