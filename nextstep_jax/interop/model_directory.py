"""A model on disk: what an evaluation job or a sampler needs, in one folder.

    model.json       configurations of model and VAE, and the settings to sample with
    tokenizer.json   the text tokenizer
    vae/             parameters of the image tokenizer (Orbax)
    params/          parameters of the model (Orbax), or
    checkpoints/     checkpoints of a training run, of which the newest is read

A training run writes the first three when it starts, so its workdir is such a folder from its
first checkpoint on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.models.config import (
    NextStepConfig,
    VAEConfig,
    nextstep_from_dict,
    to_dict,
    vae_from_dict,
)
from nextstep_jax.training.checkpoint import load_params, load_tree, save_tree

_FORMAT = 1
_VAE_JSON = "vae.json"


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """What the folder holds, read.

    Attributes:
        config: The model's configuration.
        params: Its parameters, layers stacked.
        vae_config: The image tokenizer's configuration.
        vae_params: Its parameters.
        tokenizer: The text tokenizer.
        sampling: Settings to sample with; see `NextStepPipeline`.
        step: The training step of the parameters, if known.
    """

    config: NextStepConfig
    params: Any
    vae_config: VAEConfig
    vae_params: Any
    tokenizer: TextTokenizer
    sampling: dict[str, Any]
    step: int | None


def write_model_directory(
    directory: pathlib.Path,
    config: NextStepConfig,
    vae_config: VAEConfig,
    vae_params: Any,
    tokenizer: TextTokenizer,
    sampling: dict[str, Any],
    params: Any = None,
) -> None:
    """Writes all but the checkpoints; `model.json` comes last, so that it marks a whole folder."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")
    save_tree(directory / "vae", vae_params)
    if params is not None:
        save_tree(directory / "params", params)
    values = {
        "format": _FORMAT,
        "model": to_dict(config),
        "vae": to_dict(vae_config),
        "sampling": sampling,
    }
    fresh = directory / "model.json.tmp"
    fresh.write_text(json.dumps(values, indent=2) + "\n")
    fresh.rename(directory / "model.json")


def read_model_directory(directory: pathlib.Path) -> ModelDirectory:
    """Reads a folder that `write_model_directory` wrote.

    Raises:
        FileNotFoundError: `model.json` or the parameters are missing.
        ValueError: The folder is of another format, `model.json` does not hold what it should, or
            the tokenizer's ids are not the model's.
    """
    directory = pathlib.Path(directory)
    path = directory / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a model directory: it has no model.json")
    values = _read_json(path)
    if values.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {values.get('format')!r}, expected {_FORMAT}")
    config = _parse(path, "model", nextstep_from_dict, values)
    vae_config = _parse(path, "vae", vae_from_dict, values)
    sampling = _parse(path, "sampling", dict, values)
    tokenizer = TextTokenizer.from_file(directory / "tokenizer.json")
    tokenizer.check(config)
    step = None
    if (directory / "params").is_dir():
        params = load_tree(directory / "params")
    else:
        params, step = load_params(directory / "checkpoints")
    return ModelDirectory(
        config=config,
        params=params,
        vae_config=vae_config,
        vae_params=load_tree(directory / "vae"),
        tokenizer=tokenizer,
        sampling=sampling,
        step=step,
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def _parse(path: pathlib.Path, key: str, make: Callable[[Any], Any], values: dict[str, Any]) -> Any:
    """What `make` makes of an entry of a file; whatever is wrong with it names both."""
    if not isinstance(values.get(key), dict):
        raise ValueError(f"{path}: {key!r} must be a mapping, got {values.get(key)!r}")
    try:
        return make(values[key])
    except KeyError as error:
        raise ValueError(f"{path}: {key!r} lacks {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {key!r} is not what it should be: {error}") from error


def write_vae_config(directory: pathlib.Path, config: VAEConfig) -> None:
    """Marks the workdir of a tokenizer's training with what is trained there."""
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    path = pathlib.Path(directory) / _VAE_JSON
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def read_vae(directory: pathlib.Path) -> tuple[VAEConfig, Any]:
    """Configuration and parameters of an image tokenizer.

    Args:
        directory: The workdir of its training, or a model directory that carries it.

    Raises:
        FileNotFoundError: The directory is neither, or holds no finished checkpoint.
        ValueError: Its JSON does not hold what it should.
    """
    directory = pathlib.Path(directory)
    if (directory / "model.json").is_file():
        path = directory / "model.json"
        config = _parse(path, "vae", vae_from_dict, _read_json(path))
        return config, load_tree(directory / "vae")
    if not (directory / _VAE_JSON).is_file():
        raise FileNotFoundError(f"{directory} holds no image tokenizer: no {_VAE_JSON}")
    path = directory / _VAE_JSON
    config = _parse(path, "vae", vae_from_dict, {"vae": _read_json(path)})
    return config, load_params(directory / "checkpoints")[0]
