"""Pixels of packed rows to image tokens in their places, by the frozen image tokenizer.

The images of a batch come sorted by size, as many of each as there happen to be. Every process
encodes its own ones on its own devices, in groups of one static shape for each size, so that a
program is compiled once for each size that occurs and no process waits for another. The tokens
are then put where they stand in the rows.

Axes: batch, length, token; rows are the images of a group, slots the tokens of an image.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nextstep_jax.data.schema import Batch
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel import sharding
from nextstep_jax.training.encoding_shard import Encoder


@functools.partial(jax.jit, donate_argnums=0)
def _scatter(
    latents: Float[Array, "positions token"],
    tokens: Float[Array, "rows slots token"],
    places: Int[Array, "rows slots"],
) -> Float[Array, "positions token"]:
    """Writes tokens to their positions; those behind the end belong to no image."""
    return latents.at[places].set(tokens, mode="drop")


class BatchEncoder:
    """Encodes the images of this process's rows."""

    def __init__(self, vae: VAE, vae_params: Any, patch_size: int, group_size: int):
        """Takes an image tokenizer; its parameters go to the devices with the first batch.

        Args:
            vae: The image tokenizer.
            vae_params: Its parameters; the encoder's are used.
            patch_size: Latent pixels along one side of a token.
            group_size: Images that a device encodes at once. What is missing to a whole group
                is encoded as black, so that few images of many sizes want small groups.
        """
        self._vae, self._vae_params = vae, vae_params
        self._patch_size, self._group_size = patch_size, group_size
        self._token_dim = vae.config.latent_channels * patch_size**2
        self._encoder: tuple[Any, Encoder] | None = None

    def __call__(self, mesh: jax.sharding.Mesh, batch: Batch) -> Float[Array, "batch length token"]:
        """The latents of a batch.

        Args:
            mesh: Where the result lies, its rows over the batch axes.
            batch: This process's rows on the host: `images`, `image_slots`, and `token_ids` for
                their shape.

        Returns:
            float32, of the global batch; zero off images.
        """
        encoder = self._encoder_on(mesh)
        rows, length = batch["token_ids"].shape
        everywhere = sharding.replicated(encoder.mesh)
        latents = jax.device_put(np.zeros((rows * length, self._token_dim), np.float32), everywhere)
        for key, images in batch["images"].items():
            slots, size = batch["image_slots"][key], encoder.group_size * encoder.num_groups
            for start in range(0, len(images), size):
                pixels = _padded(images[start : start + size], size, 0)
                # Behind the last position: dropped.
                places = _padded(slots[start : start + size], size, rows * length)
                tokens = jax.device_put(encoder(pixels), everywhere)
                latents = _scatter(latents, tokens, jax.device_put(places, everywhere))
        return _distribute(latents, (rows, length, self._token_dim), mesh)

    def _encoder_on(self, mesh: jax.sharding.Mesh) -> Encoder:
        """The encoder on this process's devices of a mesh."""
        if self._encoder is None or self._encoder[0] != mesh:
            encoder = Encoder(
                self._vae,
                self._vae_params,
                patch_size=self._patch_size,
                group_size=self._group_size,
                dtype=jnp.float32,
                devices=mesh.local_devices,
            )
            self._encoder = (mesh, encoder)
        return self._encoder[1]


def _padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    """The array with its first axis filled up to a length."""
    missing = [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, missing, constant_values=value)


def _distribute(
    latents: Float[Array, "positions token"], shape: tuple[int, int, int], mesh: jax.sharding.Mesh
) -> Float[Array, "batch length token"]:
    """An array that every local device has whole -> the global array, each device with its part."""
    copies = {shard.device: shard.data.reshape(shape) for shard in latents.addressable_shards}

    def part_on(device: jax.Device, part: tuple[slice, ...]) -> jax.Array:
        # Not by an index, which would be sent to the device.
        found = copies[device]
        for axis, here in enumerate(part[:2]):
            found = jax.lax.slice_in_dim(found, here.start, here.stop, axis=axis)
        return found

    return sharding.global_rows(mesh, part_on, shape, has_length=True)
