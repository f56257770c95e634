"""The contrastive head: initialisation, debiasing, precision, and that it needs no Megatron."""

import subprocess
import sys

import pytest
import torch

from clipo_megatron.algorithms.clipo import ContrastiveHead, contrastive_loss


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_same_seed_gives_the_same_head_whatever_the_global_state(kind):
    torch.manual_seed(1)
    first = ContrastiveHead(24, dim=6, kind=kind, seed=5)
    state = torch.get_rng_state()
    with torch.device("meta"):
        second = ContrastiveHead(24, dim=6, kind=kind, seed=5)
    other = ContrastiveHead(24, dim=6, kind=kind, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, second.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
        assert weight.abs().max() <= 24**-0.5 and weight.std() > 0.5 * 24**-0.5


def test_shapes_and_parameters_of_both_kinds():
    linear, mlp = ContrastiveHead(24, dim=6), ContrastiveHead(24, dim=6, kind="mlp")
    assert {n: tuple(p.shape) for n, p in linear.named_parameters()} == {"projection": (6, 24)}
    assert {n: tuple(p.shape) for n, p in mlp.named_parameters()} == {"hidden": (24, 24), "projection": (6, 24)}
    pooled = torch.randn(9, 24)
    torch.testing.assert_close(linear(pooled), torch.nn.functional.normalize(pooled @ linear.projection.T))
    torch.testing.assert_close(
        mlp(pooled), torch.nn.functional.normalize((pooled @ mlp.hidden.T).relu() @ mlp.projection.T)
    )
    assert linear(pooled[:0]).shape == (0, 6)


def test_the_scale_of_the_states_does_not_matter_and_the_length_is_one():
    head, pooled = ContrastiveHead(24, dim=6), torch.randn(9, 24)
    torch.testing.assert_close(head(pooled).norm(dim=1), torch.ones(9))
    torch.testing.assert_close(head(1000 * pooled), head(pooled))


def test_the_mean_is_taken_out():
    head, plain = ContrastiveHead(24, dim=6, debias="mean"), ContrastiveHead(24, dim=6)
    pooled, shift = torch.randn(9, 24), 5 * torch.randn(24)
    torch.testing.assert_close(head(pooled + shift), head(pooled), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(pooled), plain(pooled - pooled.mean(0)))
    assert (plain(pooled + shift) - plain(pooled)).abs().max() > 0.1
    # Two ranks that are given the mean over both embed as one would.
    mean = pooled.mean(0)
    parts = torch.cat([head(pooled[:2], mean=mean), head(pooled[2:], mean=mean)])
    torch.testing.assert_close(parts, head(pooled))
    assert (head(pooled[:2]) - parts[:2]).abs().max() > 0.1


def test_one_state_minus_its_own_mean_is_zero_not_nan():
    head = ContrastiveHead(24, dim=6, debias="mean")
    z = head(torch.randn(1, 24))
    z.sum().backward()
    assert (z == 0).all() and head.projection.grad.isfinite().all()
    assert head(torch.zeros(0, 24)).shape == (0, 6)


def test_layer_norm_takes_out_shift_and_scale_of_each_state():
    head, plain = ContrastiveHead(24, dim=6, debias="layer_norm"), ContrastiveHead(24, dim=6)
    pooled = torch.randn(9, 24)
    moved = pooled * torch.rand(9, 1).add(0.5) + torch.randn(9, 1)
    torch.testing.assert_close(head(moved), head(pooled), rtol=1e-3, atol=1e-4)
    assert (plain(moved) - plain(pooled)).abs().max() > 0.05


def test_half_precision_states_are_embedded_in_float32_even_under_autocast():
    head, pooled = ContrastiveHead(24, dim=6, kind="mlp"), torch.randn(9, 24).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(pooled)
    assert z.dtype == torch.float32 and torch.equal(z, head(pooled.float()))


def test_the_gradient_reaches_the_head_and_not_the_states():
    head, pooled = ContrastiveHead(24, dim=6), torch.randn(8, 24, requires_grad=True)
    loss, valid = contrastive_loss(head(pooled), torch.arange(8) % 2 == 0, torch.zeros(8, dtype=torch.long))
    (loss.sum() / valid.sum()).backward()
    assert head.projection.grad.abs().sum() > 0 and pooled.grad is None


def test_training_the_head_separates_correct_from_wrong():
    generator = torch.Generator().manual_seed(0)
    correct, group = torch.arange(64) % 2 == 0, torch.arange(64) // 8
    pooled = torch.randn(64, 24, generator=generator) + 0.5 * correct[:, None]
    head = ContrastiveHead(24, dim=6)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.01)
    means = []
    for _ in range(40):
        loss, valid = contrastive_loss(head(pooled), correct, group, loss="supcon_out")
        means.append((loss.sum() / valid.sum()).item())
        optimizer.zero_grad()
        (loss.sum() / valid.sum()).backward()
        optimizer.step()
    assert means[-1] < 0.7 * means[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ContrastiveHead(8, kind="conv"), "linear, mlp"),
        (lambda: ContrastiveHead(8, debias="median"), "none, mean, layer_norm"),
        (lambda: ContrastiveHead(0), "at least 1"),
        (lambda: ContrastiveHead(8)(torch.zeros(2, 9)), r"needs \[b, 8\]"),
        (lambda: ContrastiveHead(8)(torch.zeros(2, 8), mean=torch.zeros(8)), "debias='mean'"),
        (lambda: ContrastiveHead(8, debias="mean")(torch.zeros(2, 8), mean=torch.zeros(2, 8)), "mean has shape"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_library_needs_neither_megatron_nor_a_configuration_loader():
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine", "apex", "omegaconf", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from clipo_megatron.algorithms.clipo import ContrastiveHead, contrastive_loss, contrastive_reward
from clipo_megatron.algorithms.clipo import draw, hook, statistics
correct, group = torch.tensor([1, 1, 0, 0]).bool(), torch.zeros(4).long()
states = torch.ones(4, 8) + 0.1 * torch.eye(4, 8)  # close together, so that no loss rounds to 0
loss, valid = contrastive_loss(ContrastiveHead(8, 4)(states), correct, group)
assert contrastive_reward(loss, valid).ne(0).sum() == 2
try:
    import megatron
except ImportError:
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
