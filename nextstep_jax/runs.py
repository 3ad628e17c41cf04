"""Whole runs, from a config to a finished workdir: what the programs in `launch/` start.

On top of all rooms: here training meets the sample grids and scores that it must not know.
"""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Text
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.data.tolerance import good_documents
from nextstep_jax.evaluation.hooks import ReconstructionHook, SampleHook, sampling_params
from nextstep_jax.interop.model_directory import (
    write_model_directory,
    write_vae_config,
)
from nextstep_jax.interop.perceptual_weights import read_lpips
from nextstep_jax.interop.pretrained import open_image_tokenizer
from nextstep_jax.interop.start import open_start
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.flops import peak_flops
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.models.perceptual import Lpips
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.sampling.presets import preset_from_settings
from nextstep_jax.training import experiment, loop
from nextstep_jax.training.checkpoint import stored_params
from nextstep_jax.training.pretrain import NextStepTask
from nextstep_jax.training.reporting import Yardstick
from nextstep_jax.training.tokenizer import PerceptualNetwork, TokenizerConfig, first_image

# Fields of a VAEConfig that decide its parameters.
ARCHITECTURE = (
    *("in_channels", "channels", "channel_multipliers", "num_res_blocks", "latent_channels"),
    *("num_groups", "norm_eps"),
)

_NUM_RECONSTRUCTIONS = 16
_NUM_CAPTIONS = 8
_CACHE_BYTES = 2 * 2**30


def use_compilation_cache(directory: pathlib.Path) -> None:
    """Keeps compiled programs in a folder; a cache that the environment names is left alone.

    Several CPU devices have none.
    """
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Read from the cache, a program of several CPU devices runs its collectives in another
        # order on each of them, and the devices wait for each other (jaxlib 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # A bound keeps the folder small and puts a lock on it; all users of a folder need the same.
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def train_tokenizer(config: Any, workdir: pathlib.Path) -> None:
    """Trains the image tokenizer of a config, or continues it."""
    config = experiment.plain(config)
    network = _perceptual_network(config["tokenizer"])
    task, loop_config = experiment.build_tokenizer_task(config, network)
    start = None
    # A run that goes on has parameters of its own; what it began with may be gone.
    if config.get("init_from") and not _goes_on(workdir):
        start = _start_of_vae(pathlib.Path(config["init_from"]), task.vae.config)
    pixels = _held_out_pixels(config, task.train.image_size)
    hooks = [ReconstructionHook(workdir, task.vae, pixels)]
    write = functools.partial(write_vae_config, workdir, task.vae.config)
    loop.run(task, loop_config, workdir, hooks, write, start)


def _goes_on(workdir: pathlib.Path) -> bool:
    """Whether a run has a finished checkpoint to continue from."""
    try:
        stored_params(pathlib.Path(workdir) / "checkpoints")
    except FileNotFoundError:
        return False
    return True


def _start_of_vae(directory: pathlib.Path, config: VAEConfig) -> Callable[[Any], Any]:
    """Reads the parameters that a tokenizer's training starts from, when called.

    Args:
        directory: See `interop.pretrained.open_image_tokenizer`.
        config: Of the tokenizer to be trained. What decides the shapes of parameters must agree;
            normalisation, scale and shift may differ, as NextStep's differ from Flux's.

    Raises:
        ValueError: The architectures differ; lists the fields.
        FileNotFoundError: There is no tokenizer.
    """
    found, load = open_image_tokenizer(directory)
    differing = [
        f"{name}={getattr(config, name)!r}, there {getattr(found, name)!r}"
        for name in ARCHITECTURE
        if getattr(config, name) != getattr(found, name)
    ]
    if differing:
        raise ValueError(f"config.vae does not fit init_from={directory}: {'; '.join(differing)}")
    return lambda _: load()


def _perceptual_network(values: Mapping[str, Any]) -> PerceptualNetwork | None:
    """The network of the perceptual term, read from the user's files, or None without one."""
    train = experiment.build(TokenizerConfig, values, "tokenizer")
    if not train.needs_network:
        return None
    linear = pathlib.Path(train.perceptual_linear) if train.perceptual_linear else None
    backbone = pathlib.Path(train.perceptual_backbone)
    params = read_lpips(train.perceptual, backbone, linear)
    return PerceptualNetwork(Lpips(train.perceptual), params)


def train_model(
    config: Any, workdir: pathlib.Path, tokenizer_dir: pathlib.Path | None = None
) -> None:
    """Trains the model of a config, or continues it; the workdir is a model directory.

    `config.init_from` is the workdir of the stage before, or another model directory: its
    parameters and its text tokenizer are taken, and its image tokenizer where `tokenizer_dir` is
    None. Optimizer, schedule and data begin anew.
    """
    config = experiment.plain(config)
    run = prepare_model(config, workdir, tokenizer_dir)
    section = dict(config.get("score", {}))
    if "level" not in section and not section.get("prompts"):
        section["prompts"] = _captions(experiment.build_sources(config))
    hooks = [SampleHook(workdir, run.make_pipeline, **section)]
    loop.run(
        run.task, run.loop_config, workdir, hooks, run.write, run.initial_params, run.yardstick
    )


@dataclasses.dataclass(frozen=True)
class ModelRun:
    """A model's training, prepared.

    Attributes:
        task: What is trained.
        loop_config: How long, how often, on what.
        write: Writes the model directory around the checkpoints.
        make_pipeline: Parameters -> a pipeline on this process's devices that samples as the
            config says; every process must call.
        initial_params: Abstract parameters -> those of `config.init_from`; None without it.
        yardstick: What the speed is measured against.
    """

    task: loop.Task
    loop_config: loop.LoopConfig
    write: Callable[[], None]
    make_pipeline: Callable[[Any], NextStepPipeline]
    initial_params: Callable[[Any], Any] | None
    yardstick: Yardstick


def prepare_model(
    config: Any, workdir: pathlib.Path, tokenizer_dir: pathlib.Path | None = None
) -> ModelRun:
    """Everything about a model's training that is not its loop; see `train_model`.

    Raises:
        ValueError: Something in the config is unknown, or does not fit the image tokenizer or the
            model that the run begins with; or there is no image tokenizer.
        FileNotFoundError: `tokenizer_dir` holds no image tokenizer.
    """
    config = experiment.plain(config)
    size = (config["image_size"], config["image_size"])
    preset = preset_from_settings(config["sampling"])
    model_config = experiment.build_model_config(config["model"])
    # A run that goes on has parameters and a tokenizer of its own; what it began with may be gone.
    before, goes_on = None, _goes_on(workdir)
    start = config.get("init_from")
    if goes_on and start:
        logging.info("the run goes on from its own checkpoint; init_from=%s is not read", start)
    elif start:
        before = open_start(pathlib.Path(start), model_config)
    elif start == "" and not goes_on:
        logging.warning("init_from is empty: the parameters begin as noise")
    if tokenizer_dir is None:
        if not before and not goes_on:
            raise ValueError("an image tokenizer is missing: give --tokenizer, or config.init_from")
        tokenizer_dir = before.directory if before else pathlib.Path(workdir)
    vae_config, load_vae = open_image_tokenizer(pathlib.Path(tokenizer_dir))
    vae_params = load_vae()
    vae = VAE(vae_config)
    if before:
        before.check_image_tokenizer(vae_config, vae_params)
    tokenizer = (
        before.tokenizer
        if before
        else experiment.load_or_train_text_tokenizer(
            pathlib.Path(workdir) / "tokenizer.json",
            experiment.build_sources(config),
            model_config.decoder.vocab_size,
        )
    )
    task, loop_config = experiment.build_nextstep_task(config, vae, vae_params, tokenizer)
    sampling = {**config["sampling"], "image_size": list(size)}
    write = functools.partial(
        write_model_directory, workdir, model_config, vae_config, vae_params, tokenizer, sampling
    )

    def make_pipeline(params: Any) -> NextStepPipeline:
        model = NextStep(model_config, dtype=task.model.dtype)
        params, mesh = sampling_params(model, nn.unbox(params))
        args = (model, params, vae, vae_params, tokenizer)
        return NextStepPipeline(*args, preset=preset, image_size=size, mesh=mesh)

    start = before and before.load
    return ModelRun(task, loop_config, write, make_pipeline, start, _yardstick(task))


def _yardstick(task: NextStepTask) -> Yardstick:
    """The peak of the devices here at what the model computes in."""
    device = jax.devices()[0]
    # What jax multiplies float32 as on NVIDIA's devices unless told otherwise.
    of_float32 = "tensorfloat32" if device.platform == "gpu" else "float32"
    dtype = "bfloat16" if task.model.dtype == jnp.bfloat16 else of_float32
    return Yardstick(peak_flops(device.device_kind, dtype))


def seconds_per_step(task: loop.Task, config: loop.LoopConfig, num_steps: int = 20) -> float:
    """Median time of a training step on this machine, compilation apart; nothing is kept."""
    setup = loop.set_up(task, config)
    iterator = iter(task.dataset(jax.process_index(), jax.process_count()))
    with jax.set_mesh(setup.mesh):
        state, seconds = setup.init(), []
    for _ in range(num_steps):
        began = time.monotonic()
        batch = task.place(setup.mesh, next(iterator))
        with jax.set_mesh(setup.mesh):
            state, metrics = setup.step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - began)
    iterator.close()
    return float(np.median(seconds[num_steps // 4 :]))


def _captions(sources: Mapping[str, tuple[DocumentSource, float]]) -> list[str]:
    """The first captions of the sources, for sample grids of data without held-out prompts."""
    documents = (one for source, _ in sources.values() for one in good_documents(source))
    texts = (part.text for one in documents for part in one.parts if isinstance(part, Text))
    return list(itertools.islice(texts, _NUM_CAPTIONS))


def _held_out_pixels(config: Any, image_size: int) -> np.ndarray:
    """Images that the run does not train on, of every source that has a held-out split."""
    sources = experiment.build_sources(config, image_size, held_out=True)
    each = -(-_NUM_RECONSTRUCTIONS // len(sources))
    pixels = []
    for source, _ in sources.values():
        found = list(itertools.islice(_good_images(source, image_size), each))
        # A short source gives its images more than once.
        pixels += list(itertools.islice(itertools.cycle(found), each))
    if not pixels:
        raise ValueError("none of the sources has an image that can be used")
    return np.stack(pixels)


def _good_images(source: DocumentSource, image_size: int) -> Iterator[np.ndarray]:
    """The first images of a source, without those of bad documents."""
    for document in good_documents(source):
        try:
            yield first_image(document, image_size)
        except DocumentError as error:
            logging.info("passed over: %s", error)
