"""A sound configuration, for tests that spoil it."""

import pytest
from model_folders import FACTS, model_folder

from clipo_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
)


@pytest.fixture
def folder(tmp_path):
    model_folder(tmp_path / "model", FACTS)
    (tmp_path / "train.jsonl").touch()
    return tmp_path


@pytest.fixture
def config(folder):
    source = SourceConfig(path=str(folder / "train.jsonl"))
    return RunConfig(model=ModelConfig(path=str(folder / "model")), data=DataConfig(train=[source]))
