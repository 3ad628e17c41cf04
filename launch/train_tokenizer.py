"""Trains an image tokenizer.

Example:
    python launch/train_tokenizer.py --config=configs/shapes_tokenizer.py:easy --workdir=runs/tok

Any value of the config can be changed: --config.loop.num_steps=500. Started again with the same
workdir, the run goes on where it stopped.
"""

import pathlib

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from nextstep_jax.evaluation.hooks import ReconstructionHook
from nextstep_jax.interop.model_directory import write_vae_config
from nextstep_jax.training import experiment, loop
from nextstep_jax.training.logs import set_up_logging
from nextstep_jax.training.tokenizer import first_image

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")


def train(config, workdir: pathlib.Path) -> None:
    """Trains the image tokenizer of a config."""
    task, loop_config = experiment.build_tokenizer_task(config)
    write_vae_config(workdir, task.vae.config)
    pixels = held_out_pixels(config, task.train.image_size)
    loop.run(task, loop_config, workdir, [ReconstructionHook(workdir, task.vae, pixels)])


def held_out_pixels(config, image_size: int, num: int = 16) -> np.ndarray:
    """Images that the run does not train on, where the source has a held-out split."""
    values = dict(config["source"])
    if values["type"] == "shapes":
        values["split"] = "heldout"
    source = experiment.build_source(values, image_size)
    return np.stack([first_image(source[i % len(source)], image_size) for i in range(num)])


def main(argv) -> None:
    """Reads the flags and trains."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    set_up_logging()
    train(_CONFIG.value, pathlib.Path(_WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
