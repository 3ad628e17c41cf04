"""Published checkpoints to model directories and back.

On the way in, everything that a parameter tree cannot hold is kept in `published/` of the model
directory, so that the way back gives the same files bit for bit: the configurations and the other
small files as they were, tensors that are no parameters, and the dtype of a tensor that lies in a
stack of a wider one.

Results are written aside and renamed, so that a folder with the final name is whole.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from nextstep_jax.data.buckets import aspect_grid_of
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.interop import (
    huggingface,
    published_config,
    published_vae_config,
    streaming,
)
from nextstep_jax.interop.huggingface import GEN_POS_EMBED, ModelFiles, VAEFiles
from nextstep_jax.interop.model_directory import (
    MODEL_JSON,
    open_params,
    read_configs,
    read_json,
    read_vae,
    write_model_directory,
    write_vae_directory,
)
from nextstep_jax.interop.tensor_map import Slot, leaves_of, nextstep_slots, tree_of, vae_slots
from nextstep_jax.interop.tensor_writer import SafetensorsWriter
from nextstep_jax.interop.tensors import TensorFiles, TensorInfo
from nextstep_jax.models.config import NextStepConfig, VAEConfig
from nextstep_jax.models.nextstep import gen_position_table
from nextstep_jax.training.checkpoint import save_tree_in_parts

PUBLISHED = "published"
_NOTES, _BUFFERS = "notes.json", "buffers.safetensors"
_TOKENIZER = "tokenizer.json"
_VAE_CONFIG = "vae_config.json"
_UNFINISHED = ".unfinished"
# Small files of a published model that travel along: the tokenizer's other files, its code.
_COMPANIONS = (".json", ".txt", ".py")
_LARGEST_COMPANION = 2**25
_INDEX = ".safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# The released model was trained at 512; the paper's smaller stages at 256.
_IMAGE_SIZE = 512
# The original reads an image tokenizer from one file.
_ONE_FILE = 2**62


def import_model(
    model: ModelFiles,
    vae: VAEFiles,
    out: pathlib.Path,
    *,
    source: pathlib.Path | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    preset: str | None = None,
    image_size: int = _IMAGE_SIZE,
) -> None:
    """Writes a model directory from published files, a group of parameters at a time.

    Args:
        model: The model, opened.
        vae: Its image tokenizer.
        out: The model directory to make.
        source: The folder whose small files are to come along.
        dtype: Of the model's parameters; by default that of the files.
        mesh: Devices that the parameters pass through, sharded by the rules.
        preset: Settings to sample with; by default those of the model's generation.
        image_size: Default side of the images in pixels.

    Raises:
        FileExistsError: There is something at `out`.
        ValueError: Model and image tokenizer do not go together, or the size of the images is none
            that the model makes.
    """
    huggingface.check_pair(model.config, vae.config)
    aspect_grid_of(image_size, image_size, model.config.pixels_per_token)
    with written_aside(out) as folder:
        # Unlike a generator expression, `map` holds on to nothing.
        save_tree_in_parts(folder / "params", map(tree_of, model.stream(dtype=dtype, mesh=mesh)))
        if model.values is not None:
            _keep(model, vae, folder / PUBLISHED, source, dtype)
        write_model_directory(
            folder,
            model.config,
            vae.config,
            vae.load(),
            model.tokenizer,
            default_sampling(model, preset, image_size),
        )


def default_sampling(
    model: ModelFiles, preset: str | None = None, image_size: int = _IMAGE_SIZE
) -> dict[str, Any]:
    """The settings that a published model is sampled with if nothing else is said."""
    return {"preset": preset or model.generation, "image_size": [image_size, image_size]}


def import_vae(vae: VAEFiles, out: pathlib.Path) -> None:
    """Writes an image tokenizer alone, as the start of a training or for one.

    Raises:
        FileExistsError: There is something at `out`.
    """
    with written_aside(out) as folder:
        (folder / PUBLISHED).mkdir()
        _write_json(folder / PUBLISHED / _VAE_CONFIG, vae.values)
        write_vae_directory(folder, vae.config, vae.load())


def export_checkpoint(
    checkpoint: pathlib.Path, out: pathlib.Path, max_shard_size: int = 5 * 10**9
) -> None:
    """Writes published files from a model directory, a parameter at a time, or from a tokenizer's.

    Args:
        checkpoint: A model directory: converted, or the workdir of a training run, of which the
            newest checkpoint and the moving average are taken where there is one. Or the folder
            of an image tokenizer.
        out: The folder to make.
        max_shard_size: Largest file in bytes, if no tensor is larger.

    Raises:
        FileExistsError: There is something at `out`.
        FileNotFoundError: The checkpoint is not there or has no parameters.
    """
    checkpoint = pathlib.Path(checkpoint)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder")
    vae_config, vae_params = read_vae(checkpoint)
    published = checkpoint / PUBLISHED
    vae_values = _vae_values(vae_config, published)
    if not (checkpoint / MODEL_JSON).is_file():
        with written_aside(out) as folder:
            _export_vae(vae_values, vae_params, folder)
        return
    config, _, _ = read_configs(checkpoint)
    stored = open_params(checkpoint)
    slots = sorted(nextstep_slots(stored.abstract), key=lambda slot: natural_key(slot.name))
    notes = read_json(published / _NOTES) if published.is_dir() else {}
    extra = _extra_tensors(config, published, notes)
    abstract = leaves_of(stored.abstract)
    infos = _infos(slots, abstract, notes.get("dtypes", {}))
    infos |= {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in extra.items()}
    if notes.get("has_head"):
        infos[_HEAD] = infos[_EMBEDDING]
    renamed = notes.get("renamed", {})
    values = _model_values(config, published, notes, infos[_EMBEDDING].dtype.name)
    with written_aside(out) as folder:
        if published.is_dir():
            _copy_companions(published, folder)
        _write_json(folder / "config.json", values)
        tokenizer = checkpoint / _TOKENIZER
        if tokenizer.is_file() and not (folder / tokenizer.name).is_file():
            shutil.copyfile(tokenizer, folder / tokenizer.name)
        theirs = {renamed.get(name, name): info for name, info in infos.items()}
        slots = [dataclasses.replace(s, name=renamed.get(s.name, s.name)) for s in slots]
        with SafetensorsWriter(folder, theirs, max_shard_size=max_shard_size) as writer:
            parts = map(tree_of, streaming.in_groups(abstract))
            streaming.write_params(map(leaves_of, map(stored.load, parts)), slots, writer, theirs)
            if notes.get("has_head"):
                embedding = stored.load({"embed_tokens": stored.abstract["embed_tokens"]})
                head = renamed.get(_HEAD, _HEAD)
                writer.write(head, np.asarray(embedding["embed_tokens"]))
            for name, tensor in extra.items():
                writer.write(renamed.get(name, name), tensor)
        (folder / "vae").mkdir()
        _export_vae(vae_values, vae_params, folder / "vae")


@contextlib.contextmanager
def written_aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into that gets its name when all went well, and is removed otherwise.

    Raises:
        FileExistsError: There is something at `out`.
    """
    out = pathlib.Path(out).absolute()
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; give another --out or remove it")
    out = out.resolve()  # The folder that a link stands for, not the link.
    for left in sorted(out.parent.glob(f"{out.name}.*{_UNFINISHED}")):
        logging.warning("%s is of a run that was killed, or that still goes on", left)
    # A name of its own: two runs do not write into one folder, and nobody else's is touched.
    unfinished = out.with_name(f"{out.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def natural_key(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _keep(
    model: ModelFiles,
    vae: VAEFiles,
    folder: pathlib.Path,
    source: pathlib.Path | None,
    dtype: DTypeLike | None,
) -> None:
    """Writes `published/`."""
    folder.mkdir()
    if source is not None:
        _copy_companions(source, folder)
    # Another tokenizer than the source's may have been asked for.
    kept = folder / _TOKENIZER
    text = model.tokenizer
    if text and kept.is_file() and TextTokenizer.from_file(kept).fingerprint != text.fingerprint:
        kept.unlink()
    _write_json(folder / "config.json", model.values)
    _write_json(folder / _VAE_CONFIG, vae.values)
    # The tied head of a file that has it is written again from the embedding.
    has_head = _HEAD in model.ignored
    buffers = {n: model.files.read(n) for n in model.ignored if n != _HEAD}
    if buffers:
        save_file(buffers, folder / _BUFFERS)
    notes = {
        "has_head": has_head,
        "dtype": None if dtype is None else np.dtype(dtype).name,
        "dtypes": {} if dtype is not None else narrow_dtypes(model.files, model.slots()),
        "renamed": getattr(model.files, "renamed", {}),
    }
    _write_json(folder / _NOTES, notes)


def narrow_dtypes(files: TensorFiles, slots: Sequence[Slot]) -> dict[str, str]:
    """The dtype of each tensor that lies in a parameter of a wider one."""
    by_path: dict[Any, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.path, []).append(slot)
    wide = {path: streaming.dtype_of(files, group) for path, group in by_path.items()}
    return {
        slot.name: files.infos[slot.name].dtype.name
        for slot in slots
        if files.infos[slot.name].dtype != wide[slot.path]
    }


def _infos(
    slots: Sequence[Slot], leaves: Mapping[Any, Any], dtypes: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor to be written."""
    return {
        slot.name: TensorInfo(
            slot.shape, jax.numpy.dtype(dtypes.get(slot.name, leaves[slot.path].dtype))
        )
        for slot in slots
    }


def _extra_tensors(
    config: NextStepConfig, published: pathlib.Path, notes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Tensors of the file that are no parameters: as they came, or what the original expects."""
    if notes:
        path = published / _BUFFERS
        return load_file(path) if path.is_file() else {}
    return {GEN_POS_EMBED: gen_position_table(config)[None]}


def _model_values(
    config: NextStepConfig, published: pathlib.Path, notes: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The config.json: the one that came along, as long as it says what the model is."""
    if not published.is_dir():
        return published_config.model_to_published(config, torch_dtype=dtype)
    values = read_json(published / "config.json")
    same = published_config.model_from_published(
        values,
        image_area_id=config.image_area_id,
        downsampling=config.downsampling,
        gen_pos_embed_positions=config.base_image_grid_size**2,
    )
    if dataclasses.replace(same.config, base_image_grid_size=config.base_image_grid_size) != config:
        return published_config.model_to_published(config, torch_dtype=dtype)
    if not notes["dtype"]:
        return values
    # Newer files have it under the second name.
    names = [name for name in ("torch_dtype", "dtype") if name in values] or ["torch_dtype"]
    return {**values, **dict.fromkeys(names, dtype)}


def _vae_values(config: VAEConfig, published: pathlib.Path) -> dict[str, Any]:
    """The image tokenizer's config.json: the one that came along if it has the original names.

    What that one leaves out is written: the class that reads it has other defaults than we took.
    """
    complete = published_vae_config.vae_to_published(config)
    if published.is_dir():
        values = read_json(published / _VAE_CONFIG)
        original = not published_vae_config.is_diffusers(values)
        if original and published_vae_config.vae_from_published(values)[0] == config:
            return {**values, **{k: v for k, v in complete.items() if k not in values}}
    return complete


def _export_vae(values: Mapping[str, Any], params: Any, folder: pathlib.Path) -> None:
    """Writes an image tokenizer under the original names; as a torch file too where torch is."""
    _write_json(folder / "config.json", values)
    slots = sorted(vae_slots(params), key=lambda slot: natural_key(slot.name))
    leaves = leaves_of(params)
    infos = _infos(slots, leaves, {})
    with SafetensorsWriter(folder, infos, max_shard_size=_ONE_FILE) as writer:
        streaming.write_params([leaves], slots, writer, infos)
    if importlib.util.find_spec("torch") is None:
        logging.info("%s: no checkpoint.pt, since torch is not installed", folder)
        return
    import torch  # An extra: only users of the original code need its format.
    from safetensors.torch import load_file as load_torch

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_torch(path)
    torch.save(tensors, folder / "checkpoint.pt")


def _copy_companions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the small files of a published model, its weights' index and configs excepted."""
    left = {"config.json", _NOTES, _VAE_CONFIG}
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and path.suffix in _COMPANIONS and not path.name.endswith(_INDEX)
        if wanted and path.name not in left and path.stat().st_size <= _LARGEST_COMPANION:
            shutil.copyfile(path, folder / path.name)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
