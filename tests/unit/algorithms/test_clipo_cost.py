"""What the grouped loss costs: counted in operations, and measured once at the largest size."""

import json
import subprocess
import sys

import pytest
import torch
from paths import TOOLS
from torch.utils.flop_counter import FlopCounterMode

from clipo_megatron.algorithms.clipo import contrastive_loss

BENCH = TOOLS / "bench_contrastive.py"


def operations(rollouts, group_size=16, dim=32, rows=None, level="group"):
    """Floating-point operations of the matrix products, forward and backward."""
    z = torch.randn(rollouts, dim, requires_grad=True)
    correct, group = torch.arange(rollouts) % 2 == 0, torch.arange(rollouts) // group_size
    with FlopCounterMode(display=False) as counter:
        loss, _ = contrastive_loss(z, correct, group, loss="supcon_out", level=level, anchor_rows=rows)
        loss.sum().backward()
    return counter.get_total_flops()


def test_group_level_grows_with_rollouts_times_group_size():
    base = operations(1024)
    assert base == 3 * 2 * 1024 * 16 * 32  # one product forward, two backward
    assert operations(4096) == 4 * base
    assert operations(1024, group_size=32) == 2 * base


@pytest.mark.parametrize("level", ["group", "batch", "cross"])
def test_a_rank_pays_for_its_own_anchors(level):
    assert operations(1024, rows=torch.arange(256), level=level) == operations(1024, level=level) // 4


def test_the_batch_level_holds_no_array_of_all_pairs():
    rollouts = 4096
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    z = torch.randn(rollouts, 8, requires_grad=True)
    with Watch():
        loss, _ = contrastive_loss(z, torch.arange(rollouts) % 2 == 0, torch.arange(rollouts) // 16, level="batch")
        loss.sum().backward()
    assert 2**20 < max(seen) < rollouts * rollouts / 4


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_the_batch_level_keeps_nothing_of_that_size_for_backward(similarity):
    rollouts, kept = 4096, []
    z = torch.randn(rollouts, 16, requires_grad=True)
    correct, group = torch.arange(rollouts) % 2 == 0, torch.arange(rollouts) // 16
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        contrastive_loss(z, correct, group, level="batch", similarity=similarity)
    assert z.numel() <= sum(kept) < rollouts * rollouts / 4


@pytest.mark.parametrize("form", [pytest.param("grouped", marks=pytest.mark.full), "infonce"])
def test_8192_rollouts_take_less_than_300_ms_and_300_mb(form):
    # One thread: stricter than a core pair, and not at the mercy of whatever else runs on the second core.
    command = [sys.executable, str(BENCH), "--one", form, "--rollouts", "8192", "--group", "16", "--dim", "512"]
    command += ["--threads", "1", "--repeats", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["seconds"] < 0.3, figures
    # The gradient alone, 8192 x 512 in fp32, is 16.8 MB: a smaller growth would mean that nothing was measured.
    assert 16e6 < figures["bytes"] < 300e6, figures
