"""Whether the tensors of a model's folder are those of its config.json, told from the headers of its files."""

from __future__ import annotations

from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.runtime.manifest import ManifestError
from clipo_megatron.weights.coverage import check_tensors
from clipo_megatron.weights.errors import WeightsError
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.formats.source import open_weights
from clipo_megatron.weights.spec import read_config


def check_weights(key: str, path: str) -> None:
    """Compare names, shapes and element types of a model's tensors with what is mapped of them, as loading does.

    Args:
        key: the setting that names the folder.
        path: a Hugging Face folder, or a checkpoint.

    Raises:
        ConfigError: the folder cannot be loaded; says what `Policy` would.
    """
    try:
        spec = model_spec(read_config(hf_folder(path)))
        with open_weights(path, spec) as reader:
            check_tensors(reader, spec)
    except (WeightsError, ManifestError, OSError) as error:
        raise ConfigError(f"{key} = {path}: {error}. Fetch the model again, or correct its config.json.") from error
