"""Weight sync that no server takes part in fails with an error that says what happened."""

from __future__ import annotations

import pytest
from ranks import RankError, RankPool
from sync_steps import update_without_servers


def test_no_server_is_an_error_that_says_what_happened(ranks: RankPool):
    with pytest.raises(RankError) as raised:
        ranks.run(update_without_servers, 2)
    assert str(raised.value).count("SyncError: no server took the weights of version 0 within 3 s") == 2
