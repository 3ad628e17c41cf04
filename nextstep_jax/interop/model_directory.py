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
        ValueError: The folder is of another format, or the tokenizer's ids are not the model's.
    """
    directory = pathlib.Path(directory)
    path = directory / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a model directory: it has no model.json")
    values = json.loads(path.read_text())
    if values.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {values.get('format')!r}, expected {_FORMAT}")
    config = nextstep_from_dict(values["model"])
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
        vae_config=vae_from_dict(values["vae"]),
        vae_params=load_tree(directory / "vae"),
        tokenizer=tokenizer,
        sampling=values["sampling"],
        step=step,
    )


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
    """
    directory = pathlib.Path(directory)
    if (directory / "model.json").is_file():
        config = vae_from_dict(json.loads((directory / "model.json").read_text())["vae"])
        return config, load_tree(directory / "vae")
    if not (directory / _VAE_JSON).is_file():
        raise FileNotFoundError(f"{directory} holds no image tokenizer: no {_VAE_JSON}")
    config = vae_from_dict(json.loads((directory / _VAE_JSON).read_text()))
    return config, load_params(directory / "checkpoints")[0]
