"""Training of the image tokenizer (arXiv 2508.10711, eq 3).

The latent is normalised and disturbed, z~ = norm(z) + alpha * eps with alpha ~ U[0, gamma] per
sample, so that the decoder forgives what a sampler gets slightly wrong. The loss is reconstruction
plus a perceptual term.

Axes: batch, height, width, channels.
"""

import dataclasses
import json
import math
import threading
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, UInt8

from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.images import pixels_of, random_crop, resize_cover
from nextstep_jax.data.pipeline import Sources
from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource, source_fingerprint
from nextstep_jax.data.tolerance import Tally
from nextstep_jax.models.config import to_dict
from nextstep_jax.models.latents import latents_of
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.parallel import sharding
from nextstep_jax.training.loop import to_device
from nextstep_jax.training.pretrain import tree_digest
from nextstep_jax.training.tokenizer_losses import (
    disturb_latents,
    gradient_error,
    kl_divergence,
    psnr,
)

# "gradient" needs no weights; "vgg" and "alex" are LPIPS on that network.
PERCEPTUAL_TERMS = ("none", "gradient", "vgg", "alex")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How the tokenizer is trained. No loss weight is published: all of them are ours.

    Attributes:
        image_size: Side of the square training images in pixels.
        batch_size: Images of the global batch.
        random_crop: The square is cut out at a random place instead of the middle.
        smallest_crop: Side of the smallest square over the largest that fits, with `random_crop`;
            1 takes the largest, wherever it lies. Ours.
        random_flip: Mirrors every other image.
        noise_gamma: Largest noise added to the normalised latent (0.5 in the paper).
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        perceptual: One of `PERCEPTUAL_TERMS`.
        perceptual_weight: Weight of that term.
        perceptual_backbone: File of the network's weights, as torchvision distributes them.
        perceptual_linear: File of LPIPS' own weights; empty if both are in one file.
        gradient_scales: Scales of the gradient error, each half the one before.
        kl_weight: Weight of the KL divergence of the latent; 0 in the paper. It needs a VAE that
            samples and is not normalised, or the divergence would be that of something else.
        seed: Order of the images, crops and mirroring.
        num_threads: Threads that read images.
        max_bad_fraction: The share of a source's documents that may be bad (`data/faults.py`) and
            are passed over, before the run stops.
    """

    image_size: int = 256
    batch_size: int = 512
    random_crop: bool = False
    smallest_crop: float = 1.0
    random_flip: bool = False
    noise_gamma: float = 0.5
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    perceptual: str = "gradient"
    perceptual_weight: float = 1.0
    perceptual_backbone: str = ""
    perceptual_linear: str = ""
    gradient_scales: int = 2
    kl_weight: float = 0.0
    seed: int = 0
    num_threads: int = 2
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        """Checks names and ranges."""
        if self.perceptual not in PERCEPTUAL_TERMS:
            raise ValueError(
                f"perceptual={self.perceptual!r} is unknown; choose from {list(PERCEPTUAL_TERMS)}"
            )
        if self.needs_network and not self.perceptual_backbone:
            raise ValueError(
                f"perceptual={self.perceptual!r} needs perceptual_backbone, the file of the"
                " network's weights; perceptual='gradient' needs none"
            )
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop={self.smallest_crop} must lie in (0, 1]")
        for name in ("noise_gamma", "l1_weight", "l2_weight", "perceptual_weight", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        for name in ("image_size", "batch_size", "gradient_scales"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_threads < 0:
            raise ValueError(f"num_threads={self.num_threads} must be at least 0")
        # Differences of neighbours need two pixels at the coarsest scale.
        if self.perceptual == "gradient" and self.image_size < 2**self.gradient_scales:
            raise ValueError(
                f"gradient_scales={self.gradient_scales} halve image_size={self.image_size} to"
                " less than two pixels"
            )

    @property
    def needs_network(self) -> bool:
        """Whether the perceptual term is a network with weights."""
        return self.perceptual not in ("none", "gradient")


class PerceptualNetwork(NamedTuple):
    """A distance of images by a network: module(images, others) -> (batch,), and its weights."""

    module: nn.Module
    params: Any


class TokenizerTask:
    """Training of the VAE, for `training.loop`."""

    name = "tokenizer"

    def __init__(
        self,
        vae: VAE,
        sources: Sources,
        train: TokenizerConfig,
        config: dict[str, Any],
        network: PerceptualNetwork | None = None,
    ):
        """Holds what the loop asks for.

        Args:
            vae: What is trained.
            sources: Documents with images, of which the first of each is used, with weights.
            train: How it is trained.
            config: The experiment as plain values.
            network: The perceptual term, where the config names one.

        Raises:
            ValueError: The batch is not a multiple of the processes, or a network is missing.
        """
        if train.batch_size % jax.process_count():
            raise ValueError(
                f"tokenizer.batch_size={train.batch_size} must be a multiple of the"
                f" {jax.process_count()} processes"
            )
        if train.kl_weight and (vae.config.deterministic or vae.config.norm_patch_size):
            raise ValueError(
                f"kl_weight={train.kl_weight} needs a VAE that samples and is not normalised:"
                " vae.deterministic=False and vae.norm_patch_size=None"
            )
        if train.needs_network != (network is not None):
            raise ValueError(f"perceptual={train.perceptual!r} and the network given do not agree")
        self.config = config
        self.fingerprint = {
            "sources": [
                [name, source_fingerprint(source), len(source), weight]
                for name, (source, weight) in sources.items()
            ],
            "process_count": jax.process_count(),
            **{
                name: getattr(train, name)
                for name in ("image_size", "batch_size", "seed", "random_crop", "smallest_crop")
            },
            "random_flip": train.random_flip,
            # Not the data, but no less what a checkpoint's parameters were trained for.
            "vae": json.loads(json.dumps(to_dict(vae.config))),
            "perceptual": train.perceptual,
            "perceptual_network": None if network is None else tree_digest(network.params),
        }
        self.vae, self.train = vae, train
        self._sources, self._network = sources, network
        self._placed: tuple[Any, Any] = (None, None)

    def init_params(self, key: Key[Array, ""]) -> Any:
        """Fresh parameters of both halves."""
        side = self.train.image_size
        return self.vae.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def dataset(self, process_index: int, process_count: int) -> Any:
        """Batches {"images": uint8 (batch, side, side, 3)}."""
        train, components, weights = self.train, [], []
        for name, (source, weight) in self._sources.items():
            # One source keeps the order of its seed, whatever it is called.
            seed = train.seed + (zlib.crc32(name.encode()) if len(self._sources) > 1 else 0)
            dataset = grain.MapDataset.range(len(source)).shuffle(seed=seed % 2**32).repeat()
            dataset = dataset.map_with_index(_FirstImage(train, name, source))
            components.append(dataset[process_index::process_count])
            weights.append(weight)
        dataset = grain.MapDataset.mix(components, weights)
        ahead = max(train.batch_size, train.num_threads)
        options = grain.ReadOptions(train.num_threads, prefetch_buffer_size=ahead)
        return dataset.to_iter_dataset(options).batch(
            train.batch_size // process_count, drop_remainder=True
        )

    def place(self, mesh: jax.sharding.Mesh, local: Mapping[str, Any]) -> Mapping[str, Any]:
        """On the devices, with what the loss needs besides."""
        return self.prepare(to_device(mesh, local))

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the weights of the perceptual network, laid out once on the batch's devices."""
        if self._network is None:
            return batch
        mesh = batch["images"].sharding.mesh
        if self._placed[0] != mesh:
            params = jax.device_put(self._network.params, sharding.replicated(mesh))
            self._placed = (mesh, params)
        return {**batch, "perceptual": self._placed[1]}

    def loss(
        self, params: Any, batch: Mapping[str, Any], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """Reconstruction from the disturbed latent, and its parts."""
        train, config, variables = self.train, self.vae.config, {"params": params}
        images = from_uint8(batch["images"])
        moments = self.vae.apply(variables, images, method="encode_moments")
        posterior_key, noise_key = jax.random.split(key)
        noise = None
        if not config.deterministic:
            shape = (*moments.shape[:-1], config.latent_channels)
            noise = jax.random.normal(posterior_key, shape)
        latents = latents_of(config, moments, noise)
        latents = disturb_latents(latents, noise_key, train.noise_gamma)
        decoded = self.vae.apply(variables, latents, method="decode")
        l1 = jnp.mean(jnp.abs(decoded - images))
        l2 = jnp.mean(jnp.square(decoded - images))
        loss = train.l1_weight * l1 + train.l2_weight * l2
        metrics = {"l1": l1, "psnr": psnr(l2)}
        if train.perceptual != "none":
            metrics["perceptual"] = self._perceptual(batch, decoded, images)
            loss += train.perceptual_weight * metrics["perceptual"]
        if train.kl_weight:
            metrics["kl"] = kl_divergence(moments)
            loss += train.kl_weight * metrics["kl"]
        return loss, metrics

    def _perceptual(self, batch: Mapping[str, Any], decoded: Array, images: Array) -> Array:
        if self._network is None:
            return gradient_error(decoded, images, self.train.gradient_scales)
        variables = {"params": batch["perceptual"]}
        return jnp.mean(self._network.module.apply(variables, images, decoded))

    def num_samples(self, batch: Mapping[str, Any]) -> int:
        """Images of the global batch."""
        return len(batch["images"]) * jax.process_count()


def first_image(document: Document, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A document's first image, scaled and cropped to a square.

    Raises:
        ValueError: It has no image, no pixels or cannot be decoded; names the document.
    """
    return _square(document, lambda pixels: resize_cover(pixels, side, side))


def _square(document: Document, fit: Any) -> np.ndarray:
    """What `fit` makes of the pixels of the first image; errors name the document."""
    where = f"document {document.id} of {document.source}"
    if not document.images:
        raise DocumentError("missing_image", f"{where} has no image")
    try:
        return np.asarray(fit(pixels_of(document.images[0])))
    except DocumentError as error:
        raise error.within(where) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _FirstImage(grain.experimental.MapWithIndexTransform):
    """The first image of a document, cropped and mirrored as a function of its place.

    The place counts on from epoch to epoch, so that every epoch crops anew. In place of a bad
    document stands None, which Grain passes over.
    """

    def __init__(self, train: TokenizerConfig, name: str, source: DocumentSource):
        self._train, self._name, self._source = train, name, source
        self._stream = zlib.crc32(name.encode())
        self._tally, self._lock = Tally(name, train.max_bad_fraction), threading.Lock()

    def map_with_index(self, place, index):
        square, error = None, None
        try:
            square = self._read(place, int(index))
        except DocumentError as caught:
            error = caught.within(f"source {self._name!r}, document {index}")
        with self._lock:
            self._tally.read(error)
        return None if square is None else {"images": square}

    def _read(self, place, index):
        train, side = self._train, self._train.image_size
        rng = np.random.default_rng([train.seed, self._stream, place])

        def fit(pixels):
            if train.random_crop:
                return random_crop(pixels, side, rng, train.smallest_crop)
            return resize_cover(pixels, side, side)

        square = _square(self._source[index], fit)
        if train.random_flip and rng.random() < 0.5:
            square = np.ascontiguousarray(square[:, ::-1])
        return square
