"""Finds the config.json of a model that is to be planned."""

from __future__ import annotations

from pathlib import Path

from clipo_megatron.algorithms.methods.registry import has_critic
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import ModelSpec, read_config, read_config_file

ARCHITECTURES = "architectures"  # a folder beside a configuration, with the config.json of models that are not here yet


def find_critic(config: RunConfig, config_file: str | Path) -> ModelSpec | None:
    """Read the model that a critic starts from; None if it is the policy's, or if there is no critic.

    Raises:
        PlanError, WeightsError: as for `find_architecture`.
    """
    if config.critic.path is None or not has_critic(config.algorithm):
        return None
    return find_architecture(config.critic.path, config_file, setting="critic.path")[0]


def find_architecture(
    model_path: str, config_file: str | Path, *, setting: str = "model.path"
) -> tuple[ModelSpec, Path]:
    """Read the facts of a model; return them and the file they come from.

    The file is config.json in `model_path` or, while the model is not on this machine, architectures/<last part of
    model_path>.json beside the configuration. `setting` names the path in messages.

    Raises:
        PlanError: neither file exists.
        WeightsError: the file cannot be read, or describes a model that cannot be trained.
    """
    folder = hf_folder(model_path)
    if (folder / "config.json").is_file():
        return model_spec(read_config(folder)), folder / "config.json"
    stand_in = Path(config_file).parent / ARCHITECTURES / f"{Path(model_path).name}.json"
    if stand_in.is_file():
        return model_spec(read_config_file(stand_in)), stand_in
    raise PlanError(
        f"{setting} = {model_path} has no config.json, and there is no {stand_in} either. A plan needs nothing else of "
        f"the model: put its config.json in one of these places, or correct {setting}."
    )
