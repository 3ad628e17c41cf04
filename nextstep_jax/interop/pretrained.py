"""What a folder holds in whichever form: ours, or published files as they are."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nextstep_jax.interop import huggingface, streaming
from nextstep_jax.interop.convert import default_sampling
from nextstep_jax.interop.model_directory import (
    MODEL_JSON,
    VAE_JSON,
    ModelDirectory,
    read_json,
    read_model_directory,
    read_vae,
    read_vae_config,
)
from nextstep_jax.models.config import VAEConfig


def read_pretrained(
    directory: pathlib.Path,
    *,
    vae: pathlib.Path | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> ModelDirectory:
    """Reads a model to sample from.

    Args:
        directory: A model directory (see `interop.model_directory`), or the folder of a published
            model, whose layers are then not stacked.
        vae: The folder of a published model's image tokenizer, if it is not the model's own.
        dtype: Of the model's parameters; by default that on disk.
        mesh: Where the sharding rules lay them out; by default they go to the first device.

    Raises:
        FileNotFoundError: The folder is neither, or something in it is missing.
        ValueError: See `read_model_directory` and `huggingface.open_model`.
    """
    directory = pathlib.Path(directory)
    published = (directory / "config.json").is_file()
    if (directory / MODEL_JSON).is_file() or not published:
        if vae is not None:
            raise ValueError(f"vae={vae}: {directory} has an image tokenizer of its own")
        return read_model_directory(directory, dtype=dtype, mesh=mesh)
    values = read_json(directory / "config.json")
    opened_vae = huggingface.open_vae(vae or huggingface.find_vae(directory, values))
    model = huggingface.open_model(directory, downsampling=opened_vae.config.downsampling)
    huggingface.check_pair(model.config, opened_vae.config)
    # What would stop the use shall do so before gigabytes are read.
    if model.tokenizer is None:
        raise FileNotFoundError(f"{directory} has no tokenizer.json, so that it cannot be prompted")
    return ModelDirectory(
        config=model.config,
        params=streaming.tree_of_groups(model.stream(scan_layers=False, dtype=dtype, mesh=mesh)),
        vae_config=opened_vae.config,
        vae_params=opened_vae.load(),
        tokenizer=model.tokenizer,
        sampling=default_sampling(model),
        step=None,
    )


def open_image_tokenizer(directory: pathlib.Path) -> tuple[VAEConfig, Callable[[], Any]]:
    """An image tokenizer from its workdir, from a model directory, or as it was published.

    Published are NextStep's own under the original names, and Flux's under those or diffusers'.

    Returns:
        The configuration, and a function that reads the parameters, as float32.

    Raises:
        FileNotFoundError: The folder holds none.
        ValueError: Its files do not hold what they should.
    """
    directory = pathlib.Path(directory)
    # Training writes a config.json too.
    ours = any((directory / name).is_file() for name in (MODEL_JSON, VAE_JSON))
    if ours or not (directory / "config.json").is_file():
        return read_vae_config(directory), lambda: read_vae(directory)[1]
    files = huggingface.open_vae(directory)
    return files.config, functools.partial(files.load, jnp.float32)
