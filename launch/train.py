"""Trains NextStep on a mixture of documents.

Example:
    python launch/train.py --config=configs/shapes.py:easy --tokenizer=runs/tok --workdir=runs/easy

`--tokenizer` is the workdir of an image tokenizer. Any value of the config can be changed:
--config.optimizer.learning_rate=1e-3. Started again with the same workdir, the run goes on where
it stopped. The workdir is a model directory: sample from it with launch/sample.py.
"""

import functools
import pathlib

from absl import app, flags
from flax import linen as nn
from ml_collections import config_flags

from nextstep_jax.evaluation.hooks import SampleHook
from nextstep_jax.interop.model_directory import read_vae, write_model_directory
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.sampling.presets import get_preset
from nextstep_jax.training import experiment, loop
from nextstep_jax.training.logs import set_up_logging

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Workdir of the image tokenizer.")


def train(config, workdir: pathlib.Path, tokenizer_dir: pathlib.Path) -> None:
    """Trains the model of a config; writes a model directory around the checkpoints."""
    workdir = pathlib.Path(workdir)
    vae_config, vae_params = read_vae(tokenizer_dir)
    vae = VAE(vae_config)
    model_config = experiment.build_model_config(config["model"])
    tokenizer = experiment.load_or_train_text_tokenizer(
        workdir / "tokenizer.json",
        experiment.build_sources(config),
        model_config.decoder.vocab_size,
    )
    task, loop_config = experiment.build_nextstep_task(config, vae, vae_params, tokenizer)
    size = config["image_size"]
    sampling = {**experiment.plain(config["sampling"]), "image_size": [size, size]}
    write_model_directory(workdir, model_config, vae_config, vae_params, tokenizer, sampling)
    make_pipeline = functools.partial(
        pipeline_of, model_config, vae, vae_params, tokenizer, (size, size)
    )
    hooks = []
    if "score" in config:
        hooks.append(SampleHook(workdir, make_pipeline, **config["score"]))
    loop.run(task, loop_config, workdir, hooks)


def pipeline_of(model_config, vae, vae_params, tokenizer, image_size, params) -> NextStepPipeline:
    """A pipeline around parameters of the running training."""
    return NextStepPipeline(
        NextStep(model_config),
        nn.unbox(params),
        vae,
        vae_params,
        tokenizer,
        preset=get_preset("plain"),
        image_size=image_size,
    )


def main(argv) -> None:
    """Reads the flags and trains."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    set_up_logging()
    train(_CONFIG.value, pathlib.Path(_WORKDIR.value), pathlib.Path(_TOKENIZER.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "tokenizer"])
    app.run(main)
