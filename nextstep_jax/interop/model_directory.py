"""A model on disk: what an evaluation job or a sampler needs, in one folder.

    model.json       configurations of model and VAE, and the settings to sample with
    tokenizer.json   the text tokenizer
    vae/             parameters of the image tokenizer (Orbax)
    params/          parameters of the model (Orbax), or
    checkpoints/     checkpoints of a training run, of which the newest is read
    published/       what a converted checkpoint needs on its way back, see `convert.py`

A training run writes the first three when it starts, so its workdir is such a folder from its
first checkpoint on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.models.config import (
    NextStepConfig,
    VAEConfig,
    nextstep_from_dict,
    to_dict,
    vae_from_dict,
)
from nextstep_jax.models.decoder import LAYERS
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.parallel.sharding import tree_shardings
from nextstep_jax.training.checkpoint import (
    StoredParams,
    load_params,
    load_tree,
    save_tree,
    stored_params,
)

MODEL_JSON = "model.json"
TOKENIZER_JSON = "tokenizer.json"
_FORMAT = 1
VAE_JSON = "vae.json"


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """What the folder holds, read.

    Attributes:
        config: The model's configuration.
        params: Its parameters, layers stacked or one subtree a layer.
        vae_config: The image tokenizer's configuration.
        vae_params: Its parameters.
        tokenizer: The text tokenizer; None for a converted checkpoint that came without.
        sampling: Settings to sample with; see `NextStepPipeline`.
        step: The training step of the parameters, if known.
    """

    config: NextStepConfig
    params: Any
    vae_config: VAEConfig
    vae_params: Any
    tokenizer: TextTokenizer | None
    sampling: dict[str, Any]
    step: int | None


def write_model_directory(
    directory: pathlib.Path,
    config: NextStepConfig,
    vae_config: VAEConfig,
    vae_params: Any,
    tokenizer: TextTokenizer | None,
    sampling: dict[str, Any],
    params: Any = None,
) -> None:
    """Writes all but the checkpoints; `model.json` comes last, so that it marks a whole folder.

    Of several processes all call it, and process 0 writes.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and jax.process_index() == 0:
        tokenizer.save(directory / TOKENIZER_JSON)
    save_tree(directory / "vae", vae_params)
    if params is not None:
        save_tree(directory / "params", params)
    if jax.process_index() != 0:
        return
    values = {
        "format": _FORMAT,
        "model": to_dict(config),
        "vae": to_dict(vae_config),
        "sampling": sampling,
    }
    fresh = directory / "model.json.tmp"
    fresh.write_text(json.dumps(values, indent=2) + "\n")
    fresh.rename(directory / MODEL_JSON)


def read_model_directory(
    directory: pathlib.Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> ModelDirectory:
    """Reads a folder that `write_model_directory` wrote.

    Args:
        directory: The folder.
        dtype: Of the model's parameters; by default that on disk.
        mesh: Where the sharding rules lay the model's parameters out; by default they go to the
            first device.

    Raises:
        FileNotFoundError: `model.json` or the parameters are missing.
        ValueError: The folder is of another format, `model.json` does not hold what it should, or
            the tokenizer's ids are not the model's.
    """
    directory = pathlib.Path(directory)
    path = directory / MODEL_JSON
    values = _read_values(path)
    config = _parse(path, "model", nextstep_from_dict, values)
    vae_config = _parse(path, "vae", vae_from_dict, values)
    sampling = _parse(path, "sampling", dict, values)
    tokenizer = None
    # Only a checkpoint that was converted without one may lack it.
    if (directory / TOKENIZER_JSON).is_file() or not (directory / "published").is_dir():
        tokenizer = TextTokenizer.from_file(directory / TOKENIZER_JSON)
        tokenizer.check(config)
    stored = open_params(directory)
    abstract = _placed(stored.abstract, config, dtype, mesh)
    return ModelDirectory(
        config=config,
        params=stored.load(abstract),
        vae_config=vae_config,
        vae_params=load_tree(directory / "vae"),
        tokenizer=tokenizer,
        sampling=sampling,
        step=stored.step,
    )


def read_configs(directory: pathlib.Path) -> tuple[NextStepConfig, VAEConfig, dict[str, Any]]:
    """The configurations of model and image tokenizer and the sampling settings, without weights.

    Raises:
        FileNotFoundError: There is no `model.json`.
        ValueError: See `read_model_directory`.
    """
    path = pathlib.Path(directory) / MODEL_JSON
    values = _read_values(path)
    makers = (("model", nextstep_from_dict), ("vae", vae_from_dict), ("sampling", dict))
    return tuple(_parse(path, key, make, values) for key, make in makers)


def open_params(directory: pathlib.Path) -> StoredParams:
    """The model's parameters on disk.

    Raises:
        FileNotFoundError: There are none.
    """
    directory = pathlib.Path(directory).absolute()
    if (directory / "params").is_dir():
        return StoredParams(directory / "params")
    return stored_params(directory / "checkpoints")


def _placed(abstract: Any, config: NextStepConfig, dtype: DTypeLike | None, mesh: Mesh | None):
    """Leaves with the dtype and the sharding that they are to be read with."""
    if dtype is not None:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    if mesh is None:
        return abstract
    model = NextStep(config, scan_layers=LAYERS in abstract["decoder"])
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        tree_shardings(boxed, mesh),
    )


def _read_values(path: pathlib.Path) -> dict[str, Any]:
    """The content of a `model.json` of our format."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a model directory: it has no model.json")
    values = read_json(path)
    if values.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {values.get('format')!r}, expected {_FORMAT}")
    return values


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
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
    """Marks the workdir of a tokenizer's training with what is trained there; process 0 does."""
    if jax.process_index() != 0:
        return
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    path = pathlib.Path(directory) / VAE_JSON
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def write_vae_directory(directory: pathlib.Path, config: VAEConfig, params: Any) -> None:
    """Writes an image tokenizer alone; its configuration comes last and marks a whole folder."""
    save_tree(pathlib.Path(directory) / "vae", params)
    write_vae_config(directory, config)


def read_vae_config(directory: pathlib.Path) -> VAEConfig:
    """Configuration of the image tokenizer in a folder that `read_vae` reads.

    Raises:
        FileNotFoundError: The directory holds none.
        ValueError: Its JSON does not hold what it should.
    """
    directory = pathlib.Path(directory)
    if (directory / MODEL_JSON).is_file():
        path = directory / MODEL_JSON
        return _parse(path, "vae", vae_from_dict, read_json(path))
    path = directory / VAE_JSON
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no image tokenizer: no {VAE_JSON}")
    return _parse(path, "vae", vae_from_dict, {"vae": read_json(path)})


def read_vae(directory: pathlib.Path) -> tuple[VAEConfig, Any]:
    """Configuration and parameters of an image tokenizer.

    Args:
        directory: The workdir of its training, what `write_vae_directory` wrote, or a model
            directory that carries it.

    Raises:
        FileNotFoundError: The directory is neither, or holds no finished checkpoint.
        ValueError: Its JSON does not hold what it should.
    """
    directory = pathlib.Path(directory)
    config = read_vae_config(directory)
    if (directory / "vae").is_dir():
        return config, load_tree(directory / "vae")
    return config, load_params(directory / "checkpoints")[0]
