"""Whole runs, from a config to a finished workdir: what the programs in `launch/` start.

On top of all rooms: here training meets the sample grids and scores that it must not know.
"""

import functools
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.evaluation.hooks import ReconstructionHook, SampleHook
from nextstep_jax.interop.model_directory import (
    read_vae,
    write_model_directory,
    write_vae_config,
)
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.sampling.presets import get_preset
from nextstep_jax.training import experiment, loop
from nextstep_jax.training.tokenizer import first_image

_NUM_RECONSTRUCTIONS = 16
_CACHE_BYTES = 2 * 2**30


def use_compilation_cache(directory: pathlib.Path) -> None:
    """Keeps compiled programs in a folder, unless the environment names another one."""
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory))
    jax.config.update("jax_compilation_cache_dir", directory)
    # A bound keeps the folder small and puts a lock on it; all users of a folder need the same.
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def train_tokenizer(config: Any, workdir: pathlib.Path) -> None:
    """Trains the image tokenizer of a config, or continues it."""
    config = experiment.plain(config)
    task, loop_config = experiment.build_tokenizer_task(config)
    write_vae_config(workdir, task.vae.config)
    pixels = _held_out_pixels(config, task.train.image_size)
    loop.run(task, loop_config, workdir, [ReconstructionHook(workdir, task.vae, pixels)])


def train_model(config: Any, workdir: pathlib.Path, tokenizer_dir: pathlib.Path) -> None:
    """Trains the model of a config, or continues it; the workdir is a model directory."""
    config = experiment.plain(config)
    task, loop_config, write, make_pipeline = prepare_model(config, workdir, tokenizer_dir)
    write()
    hooks = []
    if "score" in config:
        hooks.append(SampleHook(workdir, make_pipeline, **config["score"]))
    loop.run(task, loop_config, workdir, hooks)


def prepare_model(config: Any, workdir: pathlib.Path, tokenizer_dir: pathlib.Path) -> tuple:
    """The task and the loop of a model's training, and what goes with them.

    Returns:
        Task, loop config, a function that writes the model directory around the checkpoints, and
        a function from parameters to a pipeline.
    """
    config = experiment.plain(config)
    vae_config, vae_params = read_vae(tokenizer_dir)
    vae = VAE(vae_config)
    model_config = experiment.build_model_config(config["model"])
    tokenizer = experiment.load_or_train_text_tokenizer(
        pathlib.Path(workdir) / "tokenizer.json",
        experiment.build_sources(config),
        model_config.decoder.vocab_size,
    )
    task, loop_config = experiment.build_nextstep_task(config, vae, vae_params, tokenizer)
    size = (config["image_size"], config["image_size"])
    sampling = {**config["sampling"], "image_size": list(size)}
    write = functools.partial(
        write_model_directory, workdir, model_config, vae_config, vae_params, tokenizer, sampling
    )
    model = NextStep(model_config)
    make_pipeline = functools.partial(_pipeline, model, vae, vae_params, tokenizer, size)
    return task, loop_config, write, make_pipeline


def seconds_per_step(task: loop.Task, config: loop.LoopConfig, num_steps: int = 20) -> float:
    """Median time of a training step on this machine, compilation apart; nothing is kept."""
    setup = loop.set_up(task, config)
    iterator = iter(task.dataset(jax.process_index(), jax.process_count()))
    with jax.set_mesh(setup.mesh):
        state, seconds = setup.init(), []
        for _ in range(num_steps):
            began = time.monotonic()
            batch = task.prepare(loop.to_device(setup.mesh, next(iterator)))
            state, metrics = setup.step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - began)
    iterator.close()
    return float(np.median(seconds[num_steps // 4 :]))


def _pipeline(
    model: NextStep,
    vae: VAE,
    vae_params: Any,
    tokenizer: TextTokenizer,
    image_size: tuple[int, int],
    params: Any,
) -> NextStepPipeline:
    return NextStepPipeline(
        model,
        nn.unbox(params),
        vae,
        vae_params,
        tokenizer,
        preset=get_preset("plain"),
        image_size=image_size,
    )


def _held_out_pixels(config: Any, image_size: int) -> np.ndarray:
    """Images that the run does not train on, where the source has a held-out split."""
    values = dict(config["source"])
    if values["type"] == "shapes":
        values["split"] = "heldout"
    source = experiment.build_source(values, image_size)
    indices = (i % len(source) for i in range(_NUM_RECONSTRUCTIONS))
    return np.stack([first_image(source[i], image_size) for i in indices])
