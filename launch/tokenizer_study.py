r"""Studies noise and normalisation of the latent at small size, see docs/tokenizer.md.

For every cell of configs/tokenizer_study.py (gamma of equation 3, with the token norm or without):
trains a tokenizer on the built-in world and on photographs, judges it on held-out ones, encodes
captioned images, trains a tiny model on the latents, and measures the model's loss, how many
captions it obeys and how its tokens drift under guidance. Then draws the report.

Examples:
    python launch/tokenizer_study.py --workdir=runs/study
    python launch/tokenizer_study.py --workdir=runs/study --cells=norm-0.5,plain-0.5

Started again it goes on where it stopped. Cells may be shared among processes: each --cells names
those of one. The report, in WORKDIR/report, holds the cells that are finished.
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from nextstep_jax import runs
from nextstep_jax.data.record_writer import write_json
from nextstep_jax.data.shapes import ShapesSource, heldout_prompts
from nextstep_jax.evaluation import tokenizer_study as report
from nextstep_jax.evaluation.hooks import score_alignment
from nextstep_jax.evaluation.timing import environment
from nextstep_jax.evaluation.token_drift import image_tokens, measure_drift
from nextstep_jax.evaluation.tokenizer_quality import evaluate_tokenizer
from nextstep_jax.interop.model_directory import read_vae, write_vae_directory
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training import experiment, loop
from nextstep_jax.training.checkpoint import load_params
from nextstep_jax.training.encoding import EncodingConfig, encode_source
from nextstep_jax.training.logs import run_program
from nextstep_jax.training.tokenizer import first_image

_WORKDIR = flags.DEFINE_string("workdir", "runs/study", "Where everything goes.")
_CELLS = flags.DEFINE_list("cells", None, "Cells such as norm-0.5; by default all.")
_DOCUMENTS = flags.DEFINE_integer("num_documents", 16_000, "Captioned images to train models on.")
_TOKENIZER_STEPS = flags.DEFINE_integer("tokenizer_steps", None, "Instead of the config's.")
_MODEL_STEPS = flags.DEFINE_integer("model_steps", None, "Instead of the config's.")
_IMAGES = flags.DEFINE_integer("num_images", 256, "Held-out images of each kind.")
_PROMPTS = flags.DEFINE_integer("num_prompts", 300, "Held-out captions.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_LEVEL = "easy"
_GUIDANCE = (1.0, 2.0)
_NUM_DRIFT = 64
_NUM_LOSS_BATCHES = 12
# Held-out documents for the loss, and images that scale and shift are measured on.
_NUM_HELD_OUT, _NUM_CALIBRATION = 512, 512
_SPEC = importlib.util.spec_from_file_location("study", _ROOT / "configs" / "tokenizer_study.py")
configs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(configs)


def once(path: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a JSON file holds; if there is none, what `make` returns, written there."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())


def with_steps(config: Any, num_steps: int | None) -> Any:
    """The config with another number of steps, if one is given."""
    if num_steps is not None:
        config.loop.num_steps = num_steps
    return config


def train_tokenizer(cell: str, folder: pathlib.Path) -> pathlib.Path:
    """Trains a cell's tokenizer; returns a folder of it whose tokens have mean 0 and variance 1.

    Without the norm the latents have whatever scale the encoder likes; scale and shift put that
    right for the model, as latent diffusion does (arXiv 2112.10752, appendix G). With the norm
    there is nothing to put right.
    """
    out = folder / "calibrated"
    if (out / "vae.json").is_file():
        return out
    runs.train_tokenizer(
        with_steps(configs.get_config(cell), _TOKENIZER_STEPS.value), folder / "tokenizer"
    )
    config, params = read_vae(folder / "tokenizer")
    if config.norm_patch_size is None:
        source = ShapesSource("pair", _LEVEL, "train", image_size=configs.IMAGE_SIZE)
        latents = encode(VAE(config), params, source)
        config = dataclasses.replace(
            config,
            shift_factor=float(latents.mean()),
            scaling_factor=float(1 / latents.std()),
        )
    write_vae_directory(out, config, params)
    return out


def encode(vae: VAE, params: Any, source: Any) -> np.ndarray:
    """float32 (images, rows, columns, latent): latents that scale and shift are measured on."""
    pixels = [first_image(source[i], configs.IMAGE_SIZE) for i in range(_NUM_CALIBRATION)]
    latents = jax.jit(lambda p, x: vae.apply({"params": p}, from_uint8(x), method="encode"))
    return np.asarray(latents(params, np.stack(pixels)))


def judge(tokenizer: pathlib.Path) -> dict[str, Any]:
    """Reconstruction and robustness on held-out images of both kinds."""
    config, params = read_vae(tokenizer)
    sources = experiment.build_sources(
        experiment.plain(configs.get_config()), configs.IMAGE_SIZE, held_out=True
    )
    return {
        name: evaluate_tokenizer(
            VAE(config),
            params,
            source,
            image_size=configs.IMAGE_SIZE,
            num_images=_IMAGES.value,
            batch_size=64,
        )
        for name, (source, _) in sources.items()
    } | {"scaling_factor": config.scaling_factor}


def write_records(tokenizer: pathlib.Path, split: str, num_documents: int, out: pathlib.Path):
    """Captioned images of the world as latents."""
    config, params = read_vae(tokenizer)
    source = ShapesSource("pair", _LEVEL, split, image_size=configs.IMAGE_SIZE)
    settings = EncodingConfig(
        num_documents=num_documents,
        image_bases=(configs.IMAGE_SIZE,),
        square_only=True,
        num_shards=4,
    )
    encode_source(VAE(config), params, source, settings, out)


def held_out_loss(folder: pathlib.Path, tokenizer: pathlib.Path) -> float:
    """The flow loss of the averaged parameters on documents that nobody trained on."""
    write_records(tokenizer, "heldout", _NUM_HELD_OUT, folder / "heldout")
    config = experiment.plain(configs.get_model_config(str(folder / "heldout")))
    pipe = NextStepPipeline.from_pretrained(folder / "model")
    vae_config, vae_params = read_vae(tokenizer)
    task, _ = experiment.build_nextstep_task(config, VAE(vae_config), vae_params, pipe.tokenizer)
    params, _ = load_params(folder / "model" / "checkpoints")
    loss = jax.jit(lambda params, batch, key: task.loss(params, batch, key)[1]["image_loss"])
    iterator = iter(task.dataset(0, 1))
    mesh = loop.set_up(task, experiment.build_loop(config)).mesh
    losses = [
        float(loss(params, loop.to_device(mesh, next(iterator)), jax.random.key(i)))
        for i in range(_NUM_LOSS_BATCHES)
    ]
    iterator.close()
    return float(np.mean(losses))


def generate(folder: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
    """Loss, alignment and drift of the model of a cell."""
    pipe = NextStepPipeline.from_pretrained(folder / "model")
    claims = heldout_prompts(_LEVEL, _PROMPTS.value, seed=1)
    scores = {
        f"{scale:g}": score_alignment(pipe, claims, guidance_scale=scale)[0].as_dict()
        for scale in _GUIDANCE
    }
    source = ShapesSource("pair", _LEVEL, "heldout", image_size=configs.IMAGE_SIZE)
    data = image_tokens(pipe, source, _IMAGES.value)
    prompts = [claim["prompt"] for claim in claims[:_NUM_DRIFT]]
    return {
        "loss": held_out_loss(folder, tokenizer),
        "scores": scores,
        "drift": measure_drift(pipe, prompts, data, batch_size=_NUM_DRIFT),
    }


def run_cell(cell: str, workdir: pathlib.Path) -> None:
    """All of a cell that is not there yet."""
    folder = workdir / cell
    folder.mkdir(parents=True, exist_ok=True)
    print(f"== {cell}", flush=True)
    tokenizer = train_tokenizer(cell, folder)
    once(folder / "quality.json", lambda: judge(tokenizer))
    if not (folder / "generation.json").is_file():
        write_records(tokenizer, "train", _DOCUMENTS.value, folder / "records")
        config = configs.get_model_config(str(folder / "records"))
        config = with_steps(config, _MODEL_STEPS.value)
        runs.train_model(config, folder / "model", tokenizer)
    once(folder / "generation.json", lambda: generate(folder, tokenizer))


def main(argv: list[str]) -> None:
    """Runs the cells and draws the report."""
    del argv
    runs.use_compilation_cache(_ROOT / ".cache" / "jax")
    workdir = pathlib.Path(_WORKDIR.value)
    cells = configs.cells() if _CELLS.value is None else _CELLS.value
    for cell in cells:
        configs.get_config(cell)  # names are checked before the first hour has passed
    once(workdir_settings(workdir), lambda: {"environment": environment(), **settings()})
    for cell in cells:
        run_cell(cell, workdir)
    results = report.read_results(workdir)
    report.write_report(results, workdir / "report")
    print(report.table(results))
    print(f"written to {workdir / 'report'}")


def workdir_settings(workdir: pathlib.Path) -> pathlib.Path:
    """Where the settings stand.

    Raises:
        ValueError: The folder was begun with other ones.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "study.json"
    if path.is_file():
        begun = json.loads(path.read_text())
        differing = {k: begun[k] for k, v in settings().items() if begun[k] != v}
        if differing:
            raise ValueError(f"{workdir} was begun with {differing}; give another --workdir")
    return path


def settings() -> dict[str, Any]:
    """What all cells of a study share; the experiments themselves by a digest."""
    names = ("num_documents", "tokenizer_steps", "model_steps", "num_images", "num_prompts")
    experiments = [configs.get_config(), configs.get_model_config("records")]
    text = json.dumps([experiment.plain(config) for config in experiments], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return {**{name: flags.FLAGS[name].value for name in names}, "experiments": digest}


if __name__ == "__main__":
    run_program(main)
