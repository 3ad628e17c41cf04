r"""Judges what was trained.

tokenizer: an image tokenizer (NextStep-1, arXiv 2508.10711, Table 8 and figure 6): PSNR, SSIM and,
with weight files, LPIPS and rFID of its reconstructions, without noise and with noise on the
latents; beside them bicubic scaling to as many values, the statistics of the latents and, on the
built-in world, how many scenes the checker reads right. Each source of images is judged by itself.

drift: a model by its sampled image tokens (figure 5): whether their mean and variance run away
from those of real images along the image, at several guidance scales.

Examples:
    python launch/evaluate.py --task=tokenizer --tokenizer=runs/tok
    python launch/evaluate.py --task=tokenizer --tokenizer=FLUX.1-dev/vae --source=images:photos \
        --image_size=256 --inception=pt_inception-2015-12-05-6726825d.pth \
        --lpips_network=vgg --lpips_backbone=vgg16-397923af.pth --lpips_weights=vgg.pth
    python launch/evaluate.py --task=drift --checkpoint=runs/easy --guidance=1.5,3,7,15

The folder --out gets TASK.json (the results, with settings and versions) and pictures: drift.png,
or robustness.png with a line for each source and, for each source NAME, latents-NAME.png,
reconstructions-NAME.png (originals beside reconstructions) and noise-NAME.png (one image a row,
the noise growing to the right). Files of these names that are there are replaced.
"""

import argparse
import json
import logging
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl.flags import argparse_flags
from PIL import Image
from tqdm import tqdm

import nextstep_jax
from nextstep_jax import runs
from nextstep_jax.data import source_types
from nextstep_jax.data.shapes import heldout_prompts
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.evaluation import timing, token_drift, tokenizer_quality
from nextstep_jax.evaluation.latent_statistics import plot_latent_statistics
from nextstep_jax.evaluation.pictures import captioned_grid, pairs_grid
from nextstep_jax.interop.model_directory import VAE_JSON, read_json
from nextstep_jax.interop.perceptual_weights import read_inception, read_lpips
from nextstep_jax.interop.pretrained import open_image_tokenizer
from nextstep_jax.models.perceptual import LPIPS_NETWORKS, Lpips
from nextstep_jax.models.vae import VAE
from nextstep_jax.sampling.pipeline import NextStepPipeline, data_parallel_mesh
from nextstep_jax.training import experiment
from nextstep_jax.training.logs import set_up_logging

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_DEFAULT_IMAGE_SIZE = 256
_NUM_IMAGES = {"tokenizer": 1000, "drift": 64}
# In the checkout, shared with training.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
_NUM_PICTURES = 16
_NUM_ROWS = 4
# Where the files of weights, which are other people's, usually come from.
_ORIGINS = {
    "lpips_backbone": "torchvision's weights: vgg16-397923af.pth or alexnet-owt-7be5be79.pth from"
    " download.pytorch.org/models",
    "lpips_weights": "the lpips package: lpips/weights/v0.1/vgg.pth or alex.pth",
    "inception": "the releases of pytorch-fid: pt_inception-2015-12-05-6726825d.pth",
}


# Reading what the flags name.


def own_config(directory: pathlib.Path) -> dict[str, Any] | None:
    """The experiment that trained a tokenizer, where the folder is the workdir of one."""
    path = directory / "config.json"
    config = read_json(path) if path.is_file() and (directory / VAE_JSON).is_file() else {}
    return config if {"sources", "tokenizer"} <= set(config) else None


def source_sections(text: str | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """The sources of the flag, or those of the run that trained the tokenizer.

    Returns:
        Name, safe for names of files -> values for `source_types.build_source`.

    Raises:
        ValueError: Neither is there, or two have the same name.
    """
    if text is not None:
        given = [(one, source_types.source_values(one)) for one in text.split(",")]
    elif config is not None:
        given = list(config["sources"].items())
        types = {values["type"] for _, values in given}
        seen = sorted(types - {"shapes", "photographs"})
        if seen:
            logging.warning(
                "the tokenizer may have seen these images: no held-out split of %s", seen
            )
    else:
        raise ValueError("source: the tokenizer is not the workdir of a run; give --source")
    sections = {re.sub(r"[^\w.]+", "-", name).strip("-."): values for name, values in given}
    if len(sections) < len(given) or "" in sections:
        raise ValueError(f"source: {[name for name, _ in given]} need different names")
    return sections


def read_networks(args: argparse.Namespace) -> dict[str, Any]:
    """LPIPS and Inception, those that the flags give files for.

    Raises:
        FileNotFoundError: A file is not there; says where such a file usually comes from.
        ValueError: A file that another one needs is not given, or it does not hold the weights.
    """
    if args.lpips_weights and not args.lpips_backbone:
        raise ValueError(f"lpips_weights needs lpips_backbone ({_ORIGINS['lpips_backbone']})")
    paths = {}
    for name, origin in _ORIGINS.items():
        given = getattr(args, name)
        paths[name] = pathlib.Path(given) if given else None
        if given and not pathlib.Path(given).is_file():
            raise FileNotFoundError(f"{name}: {given} is not there; usually from {origin}")
    networks = {}
    if paths["lpips_backbone"]:
        files = (paths["lpips_backbone"], paths["lpips_weights"])
        networks["lpips"] = (Lpips(args.lpips_network), read_lpips(args.lpips_network, *files))
    if paths["inception"]:
        networks["inception"] = read_inception(paths["inception"])
    return networks


def parse_numbers(args: argparse.Namespace, name: str) -> tuple[float, ...]:
    """Different numbers between commas, the value of a flag.

    Raises:
        ValueError: Something is no number, or is there twice.
    """
    text = getattr(args, name)
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={text!r} must be different numbers between commas")
    return numbers


def read_prompts(args: argparse.Namespace, level: str | None) -> list[str]:
    """Captions of the flag's file, one a line, or held-out ones of the built-in world.

    Raises:
        ValueError: Neither is there.
        FileNotFoundError: There is no such file.
    """
    if args.prompts:
        # Some editors begin a file with a byte order mark, which is no part of a prompt.
        lines = pathlib.Path(args.prompts).read_text(encoding="utf-8-sig").splitlines()
        prompts = [line.strip() for line in lines if line.strip()][: args.num_images]
    elif level is None:
        raise ValueError("prompts: the run has no level of the built-in world; give --prompts")
    else:
        claims = heldout_prompts(level, args.num_images, args.seed)
        prompts = [claim["prompt"] for claim in claims]
    if not prompts:
        raise ValueError(f"prompts: none in {args.prompts}, or num_images={args.num_images}")
    return prompts


def data_source(args: argparse.Namespace, level: str | None) -> str:
    """What names the images that sampled tokens are compared with.

    Raises:
        ValueError: Nothing does, or two flags do.
    """
    if args.source and args.records:
        raise ValueError("records: give one of --source and --records")
    if not (args.source or args.records or level):
        raise ValueError("source: the run has no level of the built-in world; give --source")
    if args.records:
        return f"records:{args.records}"
    return args.source or f"shapes:{level}"


# The tasks.


class _Pictures:
    """The progress bar, and the first images at every noise level."""

    def __init__(self, levels: Sequence[float], num_images: int, name: str):
        self._levels, self._name = levels, name
        self._originals: list[np.ndarray] = []
        self._decoded: dict[float, list[np.ndarray]] = {std: [] for std in levels}
        # Not shown at once: bad input is to end with one line and nothing else.
        self.bar = tqdm(desc=name, total=num_images, unit="image", delay=0.1)

    def __call__(self, std: float, pixels: np.ndarray, decoded: np.ndarray) -> None:
        if len(self._decoded[std]) < _NUM_PICTURES:
            self._decoded[std].extend(decoded)
            if std == self._levels[0]:
                self._originals.extend(pixels)
        if std == self._levels[-1]:
            self.bar.update(len(pixels))

    def save(self, folder: pathlib.Path) -> None:
        """Writes reconstructions-NAME.png (of the least noise) and noise-NAME.png."""
        originals = np.stack(self._originals[:_NUM_PICTURES])
        decoded = np.stack(self._decoded[min(self._levels)][:_NUM_PICTURES])
        pairs_grid(originals, decoded).save(folder / f"reconstructions-{self._name}.png")
        images, captions = [], []
        for i, original in enumerate(originals[:_NUM_ROWS]):
            images += [original, *(self._decoded[std][i] for std in sorted(self._levels))]
            captions += ["original", *(f"noise {std:g}" for std in sorted(self._levels))]
        pictures = [Image.fromarray(image) for image in images]
        grid = captioned_grid(pictures, captions, columns=len(self._levels) + 1, side=128)
        grid.save(folder / f"noise-{self._name}.png")


def out_folder(args: argparse.Namespace, judged: pathlib.Path) -> pathlib.Path:
    """The folder of the results, made if it is not there; files can be written to it.

    Raises:
        FileNotFoundError: What is judged is not there, so that nothing can be made in it.
        OSError: The folder is a file, or not ours to write to.
    """
    if not judged.is_dir():
        raise FileNotFoundError(f"{judged} is not a folder")
    out = pathlib.Path(args.out) if args.out else judged / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        return out


def write_report(
    args: argparse.Namespace, out: pathlib.Path, results: dict[str, Any], **settings: Any
) -> None:
    """Writes TASK.json; `settings` replace those of the flags."""
    report = {
        "task": args.task,
        "settings": {**vars(args), "out": str(out), **settings},
        "version": nextstep_jax.__version__,
        "environment": timing.environment(),
        "results": results,
    }
    # NaN and infinity are no JSON.
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (out / f"{args.task}.json").write_text(text, encoding="utf-8")
    print(f"written to {out}")


def tokenizer(args: argparse.Namespace) -> None:
    """Judges an image tokenizer source by source, writes the results and prints tables.

    Raises:
        FileNotFoundError: The tokenizer or a file of weights is not there.
        ValueError: A flag does not fit the tokenizer or a source.
    """
    if args.tokenizer is None:
        raise ValueError("tokenizer: give the folder of an image tokenizer, --tokenizer=DIR")
    directory = pathlib.Path(args.tokenizer)
    levels = parse_numbers(args, "noise_levels")
    config = own_config(directory)
    size = args.image_size
    if size is None:
        size = _DEFAULT_IMAGE_SIZE if config is None else config["tokenizer"]["image_size"]
    sections = source_sections(args.source, config)
    sources = experiment.build_sources({"sources": sections}, size, held_out=True)
    networks = read_networks(args)
    vae_config, load = open_image_tokenizer(directory)
    out, results = out_folder(args, directory), {}
    vae, params = VAE(vae_config, dtype=_DTYPES[args.dtype]), load()
    for name, (source, _) in sources.items():
        results[name] = _judge(args, vae, params, source, name, size, levels, networks, out)
        plot_latent_statistics(results[name]["latents"], out / f"latents-{name}.png")
        print(f"{results[name]['num_images']} images of {size}x{size} from {name}")
        print(tokenizer_quality.table(results[name]) + "\n")
    tokenizer_quality.plot_robustness(results, out / "robustness.png")
    write_report(args, out, results, source=sections, image_size=size)


def _judge(args, vae, params, source: DocumentSource, name, size, levels, networks, out):
    """The results of one source, with a progress bar; writes its pictures."""
    pictures = _Pictures(levels, min(args.num_images, len(source)), name)
    with pictures.bar:
        results = tokenizer_quality.evaluate_tokenizer(
            vae,
            params,
            source,
            image_size=size,
            batch_size=args.batch_size,
            num_images=args.num_images,
            noise_levels=levels,
            seed=args.seed,
            on_batch=pictures,
            **networks,
        )
    pictures.save(out)
    return results


def drift(args: argparse.Namespace) -> None:
    """Judges the tokens that a model samples, writes the results and prints a table.

    Raises:
        FileNotFoundError: The model, the prompts or records are not there.
        ValueError: A flag does not fit the model or the source.
    """
    if args.checkpoint is None:
        raise ValueError("checkpoint: give the folder of a model, --checkpoint=DIR")
    directory = pathlib.Path(args.checkpoint)
    scales = parse_numbers(args, "guidance")
    path = directory / "config.json"
    config = read_json(path) if path.is_file() else {}
    level = config.get("score", {}).get("level")
    prompts, text = read_prompts(args, level), data_source(args, level)
    # Before hours of sampling, not after them.
    out = out_folder(args, directory)
    mesh = data_parallel_mesh() if jax.device_count() > 1 else None
    pipe = NextStepPipeline.from_pretrained(directory, dtype=_DTYPES[args.dtype], mesh=mesh)
    source = source_types.source_from_text(text, max(pipe.image_size), "heldout")
    settings = {"batch_size": args.batch_size, "num_inference_steps": args.num_inference_steps}
    # float32 is what the flag says, not what GPUs take for it by default, TF32.
    with (
        jax.default_matmul_precision("highest"),
        tqdm(desc="sampling", unit="token", delay=0.1) as bar,
    ):
        tokens = token_drift.image_tokens(pipe, source, args.num_images, args.batch_size)
        settings["callback"] = _progress(bar, len(scales))
        results = token_drift.measure_drift(pipe, prompts, tokens, scales, **settings)
    token_drift.plot_drift({directory.name: results}, out / "drift.png")
    print(f"{len(prompts)} images at each scale, against {len(tokens)} from {text}")
    print(token_drift.table(results) + "\n")
    write_report(args, out, results, source=text, step=pipe.step)


def _progress(bar: tqdm, num_calls: int) -> Callable[[int, int], None]:
    """The pipeline's callback over several calls of the same length."""
    finished = 0

    def update(done: int, total: int) -> None:
        nonlocal finished
        bar.total = num_calls * total
        bar.update(finished * total + done - bar.n)
        finished += done == total

    return update


# A new task is one function and one row.
TASKS: dict[str, Callable[[argparse.Namespace], None]] = {"tokenizer": tokenizer, "drift": drift}


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse_flags.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=TASKS, required=True, help="what is judged")
    counts = ", ".join(f"{task}: {count}" for task, count in _NUM_IMAGES.items())
    add("--num_images", type=int, help=f"images of a source or scale, at most; default {counts}")
    add("--batch_size", type=int, default=32, help="images at once, over all devices")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--dtype", choices=_DTYPES, default="float32", help="of the computation")
    add("--out", metavar="DIR", help="results; default: evaluation/ in what is judged")
    kinds = "shapes:LEVEL, photographs, folder:PATH, images:PATH, records:PATH"
    own = "of a tokenizer several, between commas; default: the run's own, held out where it can be"
    add("--source", help=f"images: {kinds}; {own}")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer", metavar="DIR", help="workdir, model directory or published VAE")
    add("--image_size", type=int, help="side in pixels; default: the run's own, else 256")
    levels = ",".join(f"{std:g}" for std in tokenizer_quality.NOISE_LEVELS)
    add("--noise_levels", default=levels, help=f"std of the noise on the latents: {levels}")
    add("--lpips_network", choices=LPIPS_NETWORKS, default="vgg", help="network of LPIPS")
    for name, help_ in (
        ("lpips_backbone", "LPIPS' network, "),
        ("lpips_weights", "LPIPS' own weights, "),
        ("inception", "network of rFID, "),
    ):
        add(f"--{name}", metavar="FILE", help=help_ + _ORIGINS[name])
    add = parser.add_argument_group("drift").add_argument
    add("--checkpoint", metavar="DIR", help="workdir, model directory or published model")
    scales = ",".join(f"{scale:g}" for scale in token_drift.GUIDANCE_SCALES)
    add("--guidance", default=scales, help=f"guidance scales: {scales}")
    add("--num_inference_steps", type=int, help="of every token; default: the model's own")
    add("--prompts", metavar="FILE", help="captions, one a line; default: the world's, held out")
    add("--records", metavar="DIR", help="the tokens of real images, instead of --source")
    args = parser.parse_args(argv[1:])
    if args.num_images is None:
        args.num_images = _NUM_IMAGES[args.task]
    return args


def main(args: argparse.Namespace) -> None:
    """Judges; bad input ends the program with one line."""
    set_up_logging()
    runs.use_compilation_cache(_CACHE)
    try:
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"seed={args.seed} must lie in [0, {2**32})")
        TASKS[args.task](args)
    except (ValueError, OSError) as error:
        logging.debug("where it was raised", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
