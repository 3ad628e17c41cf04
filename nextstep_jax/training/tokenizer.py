"""Training of the image tokenizer (arXiv 2508.10711, eq 3).

The latent is normalised token by token and disturbed, z~ = norm(z) + alpha * eps with alpha ~
U[0, gamma] per sample, so that the decoder forgives what a sampler gets slightly wrong. The loss
is reconstruction plus a weight-free stand-in for the perceptual term: the error of the image's
gradients at several scales.

Axes: batch, height, width, channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from nextstep_jax.data.images import pixels_of, resize_cover
from nextstep_jax.data.pipeline import source_fingerprint
from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.models.vae import VAE, from_uint8


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How the tokenizer is trained. The loss weights are ours: the paper gives none.

    Attributes:
        image_size: Side of the square training images in pixels.
        batch_size: Images of the global batch.
        noise_gamma: Largest noise added to the normalised latent (0.5 in the paper).
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        gradient_weight: Weight of the gradient error.
        gradient_scales: Scales of the gradient error, each half the one before.
        seed: Order of the images.
        num_threads: Threads that read images.
    """

    image_size: int = 256
    batch_size: int = 512
    noise_gamma: float = 0.5
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    gradient_weight: float = 1.0
    gradient_scales: int = 2
    seed: int = 0
    num_threads: int = 2


def disturb_latents(
    latents: Float[Array, "batch height width channels"], key: Key[Array, ""], gamma: float
) -> Float[Array, "batch height width channels"]:
    """latents + alpha * eps, alpha ~ U[0, gamma] per sample, eps ~ N(0, I) (eq 3)."""
    alpha_key, noise_key = jax.random.split(key)
    alpha = jax.random.uniform(alpha_key, (latents.shape[0], 1, 1, 1), maxval=gamma)
    return latents + alpha * jax.random.normal(noise_key, latents.shape)


def gradient_error(
    images: Float[Array, "batch height width channels"],
    others: Float[Array, "batch height width channels"],
    num_scales: int,
) -> Float[Array, ""]:
    """Mean absolute difference of horizontal and vertical differences, averaged over scales."""
    error = jnp.zeros((), jnp.float32)
    difference = images - others  # taking differences and averaging are both linear
    for _ in range(num_scales):
        error += jnp.mean(jnp.abs(jnp.diff(difference, axis=1)))
        error += jnp.mean(jnp.abs(jnp.diff(difference, axis=2)))
        batch, height, width, channels = difference.shape
        halves = (batch, height // 2, 2, width // 2, 2, channels)
        difference = difference[:, : height // 2 * 2, : width // 2 * 2].reshape(halves)
        difference = jnp.mean(difference, axis=(2, 4))
    return error / num_scales


def psnr(mean_squared_error: Float[Array, ""]) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], peak 2."""
    return 10 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-12))


class TokenizerTask:
    """Training of the VAE, for `training.loop`."""

    name = "tokenizer"

    def __init__(
        self, vae: VAE, source: DocumentSource, train: TokenizerConfig, config: dict[str, Any]
    ):
        """`source` holds documents with images; the first image of each is used."""
        self.config = config
        self.fingerprint = {
            "source": source_fingerprint(source),
            "image_size": train.image_size,
            "documents": len(source),
            "batch_size": train.batch_size,
            "seed": train.seed,
            "process_count": jax.process_count(),
        }
        self.vae, self.train = vae, train
        self._source = source

    def init_params(self, key: Key[Array, ""]) -> Any:
        """Fresh parameters of both halves."""
        side = self.train.image_size
        return self.vae.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def dataset(self, process_index: int, process_count: int) -> Any:
        """Batches {"images": uint8 (batch, side, side, 3)}."""
        train = self.train
        dataset = grain.MapDataset.source(self._source).shuffle(seed=train.seed).repeat()
        dataset = dataset[process_index::process_count].map(_FirstImage(train.image_size))
        options = grain.ReadOptions(train.num_threads, prefetch_buffer_size=train.batch_size)
        return dataset.to_iter_dataset(options).batch(
            train.batch_size // process_count, drop_remainder=True
        )

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing to do."""
        return batch

    def loss(
        self, params: Any, batch: Mapping[str, Any], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """Reconstruction from the disturbed latent, and its parts."""
        train, variables = self.train, {"params": params}
        images = from_uint8(batch["images"])
        latents = self.vae.apply(variables, images, method="encode")
        latents = disturb_latents(latents, key, train.noise_gamma)
        decoded = self.vae.apply(variables, latents, method="decode")
        l1 = jnp.mean(jnp.abs(decoded - images))
        l2 = jnp.mean(jnp.square(decoded - images))
        gradient = gradient_error(decoded, images, train.gradient_scales)
        loss = train.l1_weight * l1 + train.l2_weight * l2 + train.gradient_weight * gradient
        return loss, {"l1": l1, "gradient": gradient, "psnr": psnr(l2)}

    def num_samples(self, batch: Mapping[str, Any]) -> int:
        """Images of the global batch."""
        return len(batch["images"]) * jax.process_count()


def first_image(document: Document, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A document's first image, scaled and cropped to a square.

    Raises:
        ValueError: It has no pixels or cannot be decoded; names the document.
    """
    try:
        return np.asarray(resize_cover(pixels_of(document.images[0]), side, side))
    except ValueError as error:
        raise ValueError(f"document {document.id} of {document.source}: {error}") from error


class _FirstImage(grain.transforms.Map):
    """`first_image` as an element of a batch."""

    def __init__(self, side: int):
        self._side = side

    def map(self, element):
        return {"images": first_image(element, self._side)}
