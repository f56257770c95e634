"""An actor that takes turns with servers on its GPU hands back all memory but the policy's weights.

A CPU stands in for the GPU. Its allocator is one that keeps what is freed until it is told to hand it back, as CUDA's
does: what it holds then is what lives at that moment, and what is freed later stays with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expert_steps import train_a_little
from policy_steps import configuration
from tiny_models import tiny_llama
from torch import Tensor
from update_steps import VOCAB, actor_on

from clipo_megatron.config.schema import DType, LayoutConfig, RunConfig
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import Platform


def memory_of(trainable: Trainable) -> Iterator[Tensor]:
    """Weights, gradients, masters and moments."""
    for buffer in (*trainable.model.buffers, *trainable.model.expert_parallel_buffers):
        yield from (buffer.param_data, buffer.grad_data)
    for inner in trainable.optimizer.inner.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for master in group["params"]:
                yield master
                yield from (value for name, value in inner.optimizer.state[master].items() if name != "step")


def held(actor: PolicyActor) -> list[Tensor]:
    """What the actor holds on its device: of the policy, the critic and the reference policy."""
    models = [*memory_of(actor.trainable), *memory_of(actor.critic.trainable)]
    return [tensor.detach() for tensor in (*models, *actor.reference._weights)]


def live(tensors: list[Tensor]) -> int:
    """Their bytes, in which memory that several share counts once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def a_turn(config: RunConfig) -> tuple[int, int, int, int, bool]:
    """Hand the memory over and take it back.

    Returns:
        Bytes of the policy's weights, of everything, of what lives after `offload` and of what the allocator keeps, and
        whether everything but the gradients, which are zeros, is the same after `onload`.
    """
    actor = actor_on(config, LayoutConfig())
    train_a_little(actor, config, steps=1)
    weights = sum(buffer.param_data.nbytes for buffer in actor.trainable.model.buffers)
    before, everything = [tensor.clone() for tensor in held(actor)], live(held(actor))
    reserved = [everything]
    release = Platform.release_cached_memory
    Platform.release_cached_memory = lambda self: reserved.append(live(held(actor)))
    try:
        actor.offload()
        kept = reserved[-1]
        actor.offload()  # a second time changes nothing, and would hand back what the first has left
    finally:
        Platform.release_cached_memory = release
    after = live(held(actor))
    actor.onload()
    gradients = {
        buffer.grad_data.data_ptr() for part in (actor, actor.critic) for buffer in part.trainable.model.buffers
    }
    same = all(
        not now.any() if now.data_ptr() in gradients else torch.equal(now, then)
        for now, then in zip(held(actor), before, strict=True)
    )
    return weights, everything, after, kept, same


@pytest.mark.parametrize("dtype", [DType.fp32, DType.bf16])
def test_all_memory_but_the_weights_is_handed_back(dtype, ranks, tmp_path):
    config = configuration(tiny_llama(tmp_path / "model", vocab=VOCAB))
    config.model.dtype, config.algorithm.name, config.algorithm.kl.coefficient = dtype, "ppo", 0.01
    [(weights, everything, after, reserved, same)] = ranks.run(a_turn, 1, config)
    assert everything > 6 * weights
    assert after == weights, "only what is sent to the servers stays"
    assert reserved == after, "nothing is freed after the last time that memory is handed back"
    assert same
