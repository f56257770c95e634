"""Configurations with settings changed, and how they are refused."""

import time

import pytest

from clipo_megatron.checks.run import check
from clipo_megatron.config.errors import ConfigError


def assign(config, **settings):
    for key, value in settings.items():
        place = config
        *sections, name = key.split("__")
        for section in sections:
            place = getattr(place, section)
        assert hasattr(place, name), key
        setattr(place, name, value)
    return config


def refusal(config, ranks=None):
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        check(config, ranks=ranks)
    assert time.process_time() - started < 1
    return caught.value
