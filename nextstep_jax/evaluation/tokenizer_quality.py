"""How well an image tokenizer reconstructs, and how much noise on its latents it forgives.

NextStep-1 (arXiv 2508.10711) judges its tokenizer by reconstruction (Table 8) and by how PSNR, SSIM
and rFID fall when Gaussian noise is added to the normalised latents (figure 6). Noise is in the
units that the model sees, (latent - shift_factor) * scaling_factor, and image i gets the same
direction at every level, drawn from a key that depends on the seed and on i alone: neither the
batch size nor the number of devices changes a result. What is compared are pixels as users see
them, clamped and rounded to 0 ... 255.

Words for axes: rows of a batch, some of them padding; latents are (rows, height, width, latent).
"""

import collections
import concurrent.futures
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from matplotlib.figure import Figure

from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.evaluation import image_metrics
from nextstep_jax.evaluation.image_metrics import FeatureStatistics
from nextstep_jax.evaluation.latent_statistics import LatentStatistics
from nextstep_jax.evaluation.scoring import make_report
from nextstep_jax.evaluation.shapes_checker import check_claim
from nextstep_jax.models.perceptual import LPIPS_MIN_SIDES, Lpips
from nextstep_jax.models.vae import VAE, from_uint8, to_uint8
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.parallel.sharding import BATCH_AXES, batch_sharding, replicated
from nextstep_jax.training.loop import to_device
from nextstep_jax.training.tokenizer import first_image

# Standard deviations; 0.2 and 0.5 are those of the paper's figure 6, the others ours.
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)

# rFID is warned of below so many images; ours: twice what Inception's 2048 features need at least.
_ENOUGH_FOR_RFID = 5000

# The seed is a uint32 on the devices.
_NUM_SEEDS = 2**32

# Threads that read and decode images, and batches they are ahead.
_NUM_THREADS = 4
_BATCHES_AHEAD = 2

# A network and its parameters.
Network = tuple[nn.Module, Any]
# (noise level, originals, reconstructions), both uint8 (n, side, side, 3), after every batch.
BatchHook = Callable[[float, np.ndarray, np.ndarray], None]


def evaluate_tokenizer(
    vae: VAE,
    params: Any,
    source: DocumentSource,
    *,
    image_size: int,
    batch_size: int = 32,
    num_images: int | None = None,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    lpips: Network | None = None,
    inception: Network | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    patch_size: int = 2,
    on_batch: BatchHook | None = None,
) -> dict[str, Any]:
    """Judges an image tokenizer on the first image of each of the first documents of a source.

    Args:
        vae: The tokenizer.
        params: Its parameters.
        source: Documents with images, each scaled and cropped to a square.
        image_size: Side of that square in pixels.
        batch_size: Images encoded together; rounded up to a multiple of the devices.
        num_images: How many; by default, and at most, all.
        noise_levels: Standard deviations of the noise on the latents.
        lpips: A perceptual distance, (images, images) in [-1, 1] -> (rows,), and its parameters.
        inception: A network, images in [-1, 1] -> (rows, features), and its parameters, for rFID.
        mesh: Devices; images lie over its data and fsdp axes. By default all devices.
        seed: Of the noise.
        patch_size: Latent pixels along one side of a token, for the statistics of the latents.
        on_batch: Called after every batch and noise level.

    Returns:
        Plain values for JSON: num_images, image_size, seed; latent (its shape and num_values);
        levels, a list in the order of `noise_levels`: noise_std, psnr, ssim, lpips and rfid (if
        asked for), scenes (see below), num_images, images_per_second (decoding alone);
        bicubic: psnr, ssim, lpips (if asked for), size and num_values of the `bicubic_baseline`
        with at least as many values as the latent has; latents: see `LatentStatistics.as_dict`;
        encode_images_per_second.
        For documents of the built-in world, `scenes` of a level and of the originals
        (`originals.scenes`) says how many scenes the checker reads right
        (`scoring.Report.as_dict`).

    Raises:
        ValueError: An argument is out of range, a document has no image, or the encoder or the
            decoder gives values that are not finite.
    """
    count = len(source) if num_images is None else min(num_images, len(source))
    _check(vae, image_size, batch_size, count, noise_levels, patch_size, inception)
    _check_lpips(lpips, image_size)
    if not 0 <= seed < _NUM_SEEDS:
        raise ValueError(f"seed={seed} must lie in [0, {_NUM_SEEDS})")
    if inception is not None and count < _ENOUGH_FOR_RFID:
        logging.warning(
            "rFID of %d images is strongly biased upwards: compare it only with that of as many"
            " images. The covariance of Inception's 2048 features is singular below 2049, and the"
            " bias fades only with some thousands of images",
            count,
        )
    mesh = make_mesh({"data": -1}) if mesh is None else mesh
    programs = _Programs(vae, params, mesh, lpips, inception, seed)
    gathered = _Gathered(noise_levels, patch_size)
    batch_size = min(batch_size, count)
    # On GPUs float32 convolutions default to TF32, ten bits of mantissa: what is judged is the
    # tokenizer, and what judges are float32 networks. Products of bfloat16 stay as they are.
    with jax.default_matmul_precision("highest"):
        for batch in _batches(source, image_size, count, batch_size):
            gathered.add(programs, *batch, batch_size, on_batch)
    settings = {"num_images": count, "image_size": image_size, "seed": seed}
    return {**settings, **gathered.results(image_size)}


def _check(vae, image_size, batch_size, count, noise_levels, patch_size, inception):
    """Refuses what cannot be evaluated, before any device is touched."""
    side = vae.config.downsampling * math.lcm(patch_size, vae.config.norm_patch_size or 1)
    if image_size % side or image_size < image_metrics.WINDOW_SIZE:
        raise ValueError(
            f"image_size={image_size} must be a multiple of {side} (downsampling"
            f"={vae.config.downsampling} x patch) and at least {image_metrics.WINDOW_SIZE}, the"
            " window of SSIM"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    least = 1 if inception is None else 2
    if count < least:
        raise ValueError(f"num_images={count} must be at least {least}")
    bad = [std for std in noise_levels if not (math.isfinite(std) and std >= 0)]
    if bad or not len(noise_levels) or len(set(noise_levels)) != len(noise_levels):
        raise ValueError(
            f"noise_levels={list(noise_levels)} must be different numbers, none below 0"
        )
    if jax.process_count() > 1:
        raise ValueError("the evaluation runs on one process, over all of its devices")


def _check_lpips(lpips, image_size):
    """Refuses images that are too small for LPIPS; other networks have no such limit here."""
    if lpips is None or not isinstance(lpips[0], Lpips):
        return
    least = LPIPS_MIN_SIDES[lpips[0].network]
    if image_size < least:
        raise ValueError(
            f"image_size={image_size} must be at least {least} for LPIPS over {lpips[0].network}"
        )


# What runs on the devices. The programs are of the module, not of a call, and their networks are
# static arguments that compare by their configs: judging many tokenizers of one shape compiles
# once.


def _program(function):
    """Compiles for each network; the rows of the result lie over the batch axes of the mesh."""

    def on_mesh(network, mesh, *args):
        result = function(network, *args)
        return jax.lax.with_sharding_constraint(result, batch_sharding(mesh))

    return jax.jit(on_mesh, static_argnums=(0, 1))


@_program
def _encode(vae, params, pixels):
    latents = vae.apply({"params": params}, from_uint8(pixels), method="encode")
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@_program
def _decode(vae, params, latents, indices, std, seed):
    def draw(index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.normal(key, latents.shape[1:])

    latents = latents + std * jax.vmap(draw)(indices)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = vae.apply({"params": params}, latents, method="decode")
    # As pixels, NaN would be black and infinity white.
    return to_uint8(images), jnp.isfinite(images).all(axis=(1, 2, 3))


@_program
def _compare(lpips, params, pixels, others):
    distances = {
        "psnr": image_metrics.psnr(pixels, others),
        "ssim": image_metrics.ssim(pixels, others),
    }
    if lpips is not None:
        images = (from_uint8(pixels), from_uint8(others))
        distances["lpips"] = lpips.apply({"params": params}, *images)
    return distances


@_program
def _features(inception, params, pixels):
    return inception.apply({"params": params}, from_uint8(pixels))


class _Programs:
    """The programs of one evaluation, with the parameters on every device."""

    def __init__(self, vae, params, mesh, lpips, inception, seed):
        self._mesh, self._seed = mesh, np.uint32(seed)
        self._ways = math.prod(mesh.shape[name] for name in BATCH_AXES)
        self._timed: set[Any] = set()

        def place(network):
            module, values = network or (None, {})
            return module, mesh, jax.device_put(values, replicated(mesh))

        self._vae, self._lpips = place((vae, params)), place(lpips)
        self._inception = place(inception)

    def place(self, values, batch_size):
        """A batch over the devices; rows that are wanting repeat the last one."""
        wanting = -(-batch_size // self._ways) * self._ways - len(values)
        padding = np.repeat(values[-1:], wanting, axis=0)
        return to_device(self._mesh, np.concatenate([values, padding]))

    def encode(self, rows):
        """Latents in the model's units, and the seconds."""
        return self._time(_encode, *self._vae, rows)

    def decode(self, latents, indices, std):
        """Pixels of disturbed latents and whether they came from finite values; the seconds."""
        return self._time(_decode, *self._vae, latents, indices, np.float32(std), self._seed)

    def compare(self, rows, others):
        """Distances by name, one for each row."""
        return _compare(*self._lpips, rows, others)

    def features(self, rows):
        """Inception's features, or None where they are not asked for."""
        return None if self._inception[0] is None else _features(*self._inception, rows)

    def _time(self, program, *args):
        """The result once it is there, and the seconds that took; compiling is not among them."""
        if program not in self._timed:
            # The first run pays for more than the computation.
            self._timed.add(program)
            jax.block_until_ready(program(*args))
        began = time.perf_counter()
        result = jax.block_until_ready(program(*args))
        return result, time.perf_counter() - began


class _Level:
    """What is gathered about one set of pictures over all batches."""

    def __init__(self):
        self.seconds = 0.0
        self._distances: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._features: FeatureStatistics | None = None
        self.flags: list[bool] = []
        self._claims: list[Mapping[str, Any]] = []

    def add_distances(self, programs, rows, others, count):
        """Per-image distances of the first `count` rows."""
        for name, values in programs.compare(rows, others).items():
            self._distances[name].append(np.asarray(values, np.float64)[:count])

    def add_features(self, programs, rows, count):
        """Inception features of the first `count` rows, if they are asked for."""
        features = programs.features(rows)
        if features is None:
            return
        new = FeatureStatistics.of(np.asarray(features)[:count])
        self._features = new if self._features is None else self._features.merge(new)

    def add_scenes(self, pixels, claims):
        """Whether the checker reads those pictures right that somebody claims something of."""
        for picture, claim in zip(pixels, claims, strict=True):
            if claim is not None:
                self.flags.append(check_claim(picture, claim))
                self._claims.append(claim)

    def distances(self):
        """Means over all images."""
        return {name: float(np.concatenate(all_).mean()) for name, all_ in self._distances.items()}

    def scenes(self):
        """The report of the checker."""
        tags = [claim["tag"] for claim in self._claims]
        unseen = [claim.get("unseen") for claim in self._claims]
        return make_report(self.flags, tags, None if None in unseen else unseen).as_dict()

    def summary(self, originals):
        """All as plain values."""
        count = sum(len(values) for values in self._distances["psnr"])
        values = self.distances()
        if self._features is not None:
            values["rfid"] = image_metrics.frechet_distance(originals._features, self._features)
        if self.flags:
            values["scenes"] = self.scenes()
        return {**values, "num_images": count, "images_per_second": count / self.seconds}


class _Gathered:
    """Everything that is gathered over the batches."""

    def __init__(self, noise_levels, patch_size):
        self._levels = {std: _Level() for std in noise_levels}
        self._originals, self._bicubic = _Level(), _Level()
        self._latents, self._latent_shape = LatentStatistics(patch_size), ()
        self._encoded, self._seconds = 0, 0.0

    def add(self, programs, numbers, pixels, claims, batch_size, on_batch):
        """A batch: encoded once, decoded at every level."""
        count = len(pixels)
        rows = programs.place(pixels, batch_size)
        indices = programs.place(numbers, batch_size)
        latents, seconds = programs.encode(rows)
        self._seconds += seconds
        self._encoded += count
        on_host = np.asarray(latents)[:count]
        _refuse_rows(np.isfinite(on_host).all(axis=(1, 2, 3)), numbers, "encoder: the latents")
        self._latents.update(on_host)
        self._latent_shape = latents.shape[1:]
        self._originals.add_scenes(pixels, claims)
        self._originals.add_features(programs, rows, count)
        baseline = image_metrics.bicubic_baseline(pixels, math.prod(self._latent_shape))
        self._bicubic.add_distances(programs, rows, programs.place(baseline, batch_size), count)
        for std, level in self._levels.items():
            (decoded, finite), seconds = programs.decode(latents, indices, std)
            fault = f"decoder: with noise_std={std:g} the pixels"
            _refuse_rows(np.asarray(finite)[:count], numbers, fault)
            level.seconds += seconds
            level.add_distances(programs, rows, decoded, count)
            level.add_features(programs, decoded, count)
            result = np.asarray(decoded)[:count]
            level.add_scenes(result, claims)
            if on_batch is not None:
                on_batch(std, pixels, result)

    def results(self, image_size):
        """All as plain values."""
        num_values = math.prod(self._latent_shape)
        size = image_metrics.baseline_size(image_size, image_size, num_values)
        results = {
            "latent": {"shape": list(self._latent_shape), "num_values": num_values},
            "levels": [
                {"noise_std": float(std), **level.summary(self._originals)}
                for std, level in self._levels.items()
            ],
            "bicubic": {
                **self._bicubic.distances(),
                **{"size": list(size), "num_values": 3 * math.prod(size)},
            },
            "latents": self._latents.as_dict(),
            "encode_images_per_second": self._encoded / self._seconds,
        }
        if self._originals.flags:
            results["originals"] = {"scenes": self._originals.scenes()}
        return results


def _refuse_rows(finite, numbers, fault):
    """Raises if a row is not finite; `fault` says of what."""
    if not finite.all():
        number = int(numbers[np.argmin(finite)])
        raise ValueError(f"{fault} of image {number} are not finite")


def _batches(
    source: DocumentSource, image_size: int, count: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[Mapping[str, Any] | None]]]:
    """The first images of the first documents, read ahead of the devices.

    Yields:
        Numbers of the documents, uint8 pixels, and what is claimed of each image, or None.
    """

    def load(number):
        document = source[number]
        return first_image(document, image_size), _claim_of(document)

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        pending = collections.deque()
        starts = iter(range(0, count, batch_size))
        while True:
            while len(pending) < _BATCHES_AHEAD and (start := next(starts, None)) is not None:
                numbers = np.arange(start, min(start + batch_size, count), dtype=np.int32)
                pending.append((numbers, [pool.submit(load, int(n)) for n in numbers]))
            if not pending:
                return
            numbers, futures = pending.popleft()
            pixels, claims = zip(*(future.result() for future in futures), strict=True)
            yield numbers, np.stack(pixels), list(claims)


def _claim_of(document: Document) -> Mapping[str, Any] | None:
    """What the built-in world claims of a document's first image."""
    claims = document.metadata.get("claims")
    return claims[0] if claims else None


# For people.

# Key of a level, its name in tables and plots, and its format.
_COLUMNS = (
    ("psnr", "PSNR", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("lpips", "LPIPS", ".4f"),
    ("rfid", "rFID", ".3f"),
    ("scenes", "scenes %", ".1f"),
)


def table(results: Mapping[str, Any]) -> str:
    """What `evaluate_tokenizer` returned as a table of text: one line a noise level."""
    rows = [(f"noise {level['noise_std']:g}", level) for level in results["levels"]]
    baseline = results["bicubic"]
    rows.append(("bicubic {}x{}".format(*baseline["size"]), baseline))
    rows.append(("originals", results.get("originals", {})))
    columns = [c for c in _COLUMNS if any(_value(row, c[0]) is not None for _, row in rows)]
    lines = [f"{'':<16}" + "".join(f"{name:>10}" for _, name, _ in columns) + f"{'images/s':>10}"]
    for label, row in rows:
        cells = [(_value(row, key), style) for key, _, style in columns]
        cells.append((row.get("images_per_second"), ".1f"))
        if any(value is not None for value, _ in cells):
            shown = ("" if value is None else format(value, style) for value, style in cells)
            lines.append(f"{label:<16}" + "".join(f"{text:>10}" for text in shown).rstrip())
    return "\n".join(lines)


def plot_robustness(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws every measure against the noise on the latents, one line a tokenizer or source.

    Dashed: the bicubic baseline of the line of the same colour.

    Args:
        results: Name of a line -> what `evaluate_tokenizer` returned.
        path: A file; its suffix names the format.
    """
    levels = [level for one in results.values() for level in one["levels"]]
    columns = [c for c in _COLUMNS if any(_value(level, c[0]) is not None for level in levels)]
    figure = Figure(figsize=(4 * len(columns), 3.6), layout="constrained")
    for axes, (key, title, _) in zip(
        np.ravel(figure.subplots(1, len(columns))), columns, strict=True
    ):
        for i, (name, one) in enumerate(results.items()):
            points = [(level["noise_std"], _value(level, key)) for level in one["levels"]]
            points = sorted(point for point in points if point[1] is not None)
            # Not every source has scenes.
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=name)
            baseline = _value(one["bicubic"], key)
            if baseline is not None:
                axes.axhline(baseline, color=f"C{i}", linestyle="--", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("std of the noise on the latents")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def _value(row: Mapping[str, Any], key: str) -> float | int | None:
    """A number of a level; of the scenes the share that is read right, in per cent."""
    value = row.get(key)
    return 100.0 * value["accuracy"] if isinstance(value, Mapping) else value
