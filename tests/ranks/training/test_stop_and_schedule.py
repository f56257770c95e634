"""A stop signal reaches all ranks at the same step; learning rates decay over the updates that are made."""

import signal

import pytest
import torch.distributed as dist
from small_runs import write_config, write_model
from update_steps import actor_on

from clipo_megatron.config.load import load
from clipo_megatron.config.schema import LayoutConfig
from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.runtime.stop_requests import REQUESTS
from clipo_megatron.training.stop_signal import StopSignal


def a_signal_while_the_ranks_agree() -> list[tuple[bool, int]]:
    """Rank 1 is asked to end after it has told the others that it was not."""
    stop, reduce, answers = StopSignal(announce=False, grace_period_s=60.0), dist.all_reduce, []

    def all_reduce(*args, **kwargs):
        reduce(*args, **kwargs)
        if dist.get_rank() == 1 and not answers:
            signal.raise_signal(signal.SIGUSR1)

    dist.all_reduce = all_reduce
    try:
        with REQUESTS.handled(tolerated=1):
            for _ in range(3):
                answers.append((stop.on_any_rank(), stop.signum))
    finally:
        dist.all_reduce = reduce
    return answers


def test_a_signal_is_never_lost_and_reaches_all_ranks_at_the_same_step(ranks):
    asked = (True, signal.SIGUSR1)
    assert ranks.run(a_signal_while_the_ranks_agree, 2) == [
        [(False, 0), asked, asked],
        [(False, signal.SIGUSR1), asked, asked],
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    file = write_config(folder, write_model(folder / "model"))
    return file, load_tokenizer(folder / "model")


def lengths_of_schedules(config):
    """On a rank: over how many updates the learning rates of policy and critic fall."""
    actor = actor_on(config, LayoutConfig())
    return [each.trainable.optimizer.schedule.lr_decay_steps for each in (actor, actor.critic)]


def test_the_critics_learning_rate_decays_over_its_own_updates(small, ranks):
    """Neither replays nor steps in which the policy waits are among them."""
    settings = ("algorithm.name=ppo", "algorithm.plugins=[{name: pipo}]", "critic.epochs=3", "critic.warmup_steps=10")
    config = load(small[0], ["train.steps=84", "algorithm.epochs=2", *settings])
    assert ranks.run(lengths_of_schedules, 1, config) == [[100, 84 * 2 * 3]]
