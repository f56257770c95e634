"""Where the facts of a model come from that is to be planned: its config.json alone."""

from __future__ import annotations

from pathlib import Path

from clipo_megatron.algorithms.methods.registry import baseline
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import ModelSpec, read_config, read_config_file

BESIDE = "architectures"  # a folder beside a configuration, with the config.json of models that are not here yet


def find_critic(config: RunConfig, config_file: str | Path) -> ModelSpec | None:
    """The model that a critic starts from; None: the policy's, or there is no critic.

    Raises:
        PlanError, WeightsError: as `find_architecture`.
    """
    if config.critic.path is None or not baseline(config.algorithm).critic:
        return None
    return find_architecture(config.critic.path, config_file, setting="critic.path")[0]


def find_architecture(
    model_path: str, config_file: str | Path, *, setting: str = "model.path"
) -> tuple[ModelSpec, Path]:
    """The model of a configuration, and the file that says what it is.

    That file is config.json in `model_path`, which `setting` gives, or, while the model is not on this machine,
    architectures/<last part of model_path>.json beside the configuration.

    Raises:
        PlanError: there is neither.
        WeightsError: the file cannot be read, or is of a model that cannot be trained.
    """
    folder = hf_folder(model_path)
    if (folder / "config.json").is_file():
        return model_spec(read_config(folder)), folder / "config.json"
    beside = Path(config_file).parent / BESIDE / f"{Path(model_path).name}.json"
    if beside.is_file():
        return model_spec(read_config_file(beside)), beside
    raise PlanError(
        f"{setting} = {model_path} has no config.json, and there is no {beside} either. A plan needs nothing else of "
        "the model: put its config.json in one of these places, or correct "
        f"{setting}."
    )
