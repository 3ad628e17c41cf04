"""What NextStep-1 is trained on: cross-entropy and flow matching over packed rows.

L = w_text * L_text + w_image * L_image with weights 0.01 and 1 (arXiv 2508.10711, eq 2). Pixels
become image tokens in a jitted encode of their own, keyed by image size; the loss sees tokens.

Axes: batch, length, embed, token; n = image positions gathered from a row.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from nextstep_jax.data.buckets import ordered_image_keys
from nextstep_jax.data.packing import PackingConfig
from nextstep_jax.data.pipeline import (
    DataConfig,
    Sources,
    make_pipeline,
    pipeline_fingerprint,
    stage_configs,
)
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.flow.path import logit_normal_times
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import VAE, from_uint8
from nextstep_jax.parallel import sharding
from nextstep_jax.training.losses import (
    chunked_cross_entropy,
    flow_matching_error,
    gather_image_positions,
    next_position,
    weighted_mean,
)

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses and sizes of their pieces.

    Attributes:
        text_weight: Weight of the cross-entropy (paper, Table 1).
        image_weight: Weight of the flow loss (paper, Table 1).
        text_chunk: Positions of a row whose logits exist at one time. Ours: memory against speed.
        image_positions: Image positions gathered from a row. None gathers the whole row; less is
            faster, and must suffice for the fullest row (`most_image_tokens`). Ours.
    """

    text_weight: float = 0.01
    image_weight: float = 1.0
    text_chunk: int = 512
    image_positions: int | None = None


def encode_images(
    vae: VAE, vae_params: Any, batch: Batch, patch_size: int
) -> Float[Array, "batch length token"]:
    """The pixels of packed rows as latents in their places.

    Args:
        vae: The frozen image tokenizer.
        vae_params: Its parameters.
        batch: `images`, a dict "HxW" -> uint8 (batch, I, H, W, 3), and `image_index`, int32
            (batch, length): an image token's place among the row's tokens, sizes in ascending
            order, or -1.
        patch_size: Latent pixels along one side of a token.

    Returns:
        float32 (batch, length, token), zero off images.
    """
    images = batch["images"]
    buffers = []
    for size in ordered_image_keys(images):
        pixels = images[size]
        rows, slots = pixels.shape[:2]
        flat = from_uint8(pixels.reshape(rows * slots, *pixels.shape[2:]))
        tokens = vae.apply({"params": vae_params}, flat, patch_size, method="encode_tokens")
        buffers.append(tokens.reshape(rows, slots * tokens.shape[1], tokens.shape[2]))
    index = batch["image_index"][..., None]
    latents = jnp.take_along_axis(jnp.concatenate(buffers, axis=1), jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, latents, 0.0)


def nextstep_losses(
    model: NextStep,
    params: Any,
    batch: Batch,
    times: Float[Array, "draws batch n"],
    noise: Float[Array, "draws batch n token"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy and mean flow-matching error of packed rows.

    Args:
        model: The model.
        params: Its parameters.
        batch: token_ids, latents, segment_ids, positions, text_weights, image_weights.
        times: The times of every gathered position.
        noise: The noise they are mixed with.
        chunk: See `LossConfig.text_chunk`.

    Returns:
        Float32; a kind of token that the batch does not have gives 0.
    """

    def apply(method, *args):
        return model.apply({"params": params}, *args, method=method)

    rows = (batch["token_ids"], batch["latents"], batch["positions"], batch["segment_ids"])
    hidden = apply("hidden", *rows)
    text_total = chunked_cross_entropy(
        lambda h: apply("text_logits", h),
        hidden,
        next_position(batch["token_ids"]),
        next_position(batch["text_weights"]),
        chunk,
    )
    order, weights = gather_image_positions(batch["image_weights"], times.shape[-1])
    # The hidden state before an image token is its condition.
    before = jnp.take_along_axis(hidden, jnp.maximum(order - 1, 0)[..., None], axis=1)
    error = flow_matching_error(
        lambda x, t, c: apply("velocity", x, t, c),
        apply("condition", before),
        jnp.take_along_axis(batch["latents"], order[..., None], axis=1),
        times,
        noise,
    )
    text_loss = weighted_mean(text_total, batch["text_weights"][:, 1:])
    return text_loss, weighted_mean(jnp.sum(weights * error), weights)


def most_image_tokens(packing: PackingConfig) -> int:
    """Image tokens that no packed row exceeds, by its length and its slots.

    Documents that carry latents take no slots, so that only the length bounds them.
    """
    if packing.latent_dim is not None:
        return packing.row_length
    in_slots = sum(packing.slots_of(size) * packing.tokens_of(size) for size in packing.image_sizes)
    return min(packing.row_length, in_slots)


def tree_digest(tree: Any) -> str:
    """A short digest of the values of a tree of arrays, for fingerprints."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class NextStepTask:
    """Training of the unified model, for `training.loop`."""

    name = "model"

    def __init__(
        self,
        model: NextStep,
        vae: VAE | None,
        vae_params: Any,
        sources: Sources,
        tokenizer: TextTokenizer,
        data: DataConfig,
        loss: LossConfig,
        config: dict[str, Any],
    ):
        """Holds what the loop asks for; `vae` is not needed for records with latents.

        Raises:
            ValueError: A row could hold more image tokens than `loss.image_positions`, and the
                rest would silently not be trained.
        """
        _, packing = stage_configs(data, tokenizer, model.config)
        most, gathered = most_image_tokens(packing), loss.image_positions
        if gathered is not None and gathered < most:
            raise ValueError(
                f"loss.image_positions={gathered}, but a row of data.row_length={data.row_length}"
                f" with data.max_images_per_row={data.max_images_per_row} can hold {most} image"
                f" tokens: image_positions must be at least {most}, or None"
            )
        self.config = config
        self.fingerprint = {
            **pipeline_fingerprint(data, sources, tokenizer, model.config, jax.process_count()),
            # Other weights give other tokens: as much part of the data as the pixels.
            "image_tokenizer": tree_digest(vae_params),
        }
        self._model, self._vae_params, self._vae_mesh = model, vae_params, None
        self._data, self._loss = data, loss
        self._sources, self._tokenizer = sources, tokenizer
        patch = model.config.patch_size
        self._encode = jax.jit(lambda params, batch: encode_images(vae, params, batch, patch))

    def init_params(self, key: Key[Array, ""]) -> Any:
        """Published initialisers."""
        return init_params(self._model, key)

    def dataset(self, process_index: int, process_count: int) -> Any:
        """Packed rows of the mixture."""
        return make_pipeline(
            self._sources,
            self._tokenizer,
            self._model.config,
            self._data,
            process_index,
            process_count,
        )

    def prepare(self, batch: Batch) -> Batch:
        """Pixels to latents."""
        if "images" not in batch:
            return batch
        rest = {k: v for k, v in batch.items() if k not in ("images", "image_index")}
        images = {"images": batch["images"], "image_index": batch["image_index"]}
        return {**rest, "latents": self._encode(self._placed_vae_params(batch), images)}

    def _placed_vae_params(self, batch: Batch) -> Any:
        """On all devices of the batch; as read from disk they lie on the first alone."""
        mesh = batch["image_index"].sharding.mesh
        if mesh != self._vae_mesh:
            self._vae_params = jax.device_put(self._vae_params, sharding.replicated(mesh))
            self._vae_mesh = mesh
        return self._vae_params

    def loss(
        self, params: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """w_text * L_text + w_image * L_image and its parts."""
        rows, length = batch["token_ids"].shape
        num_positions = min(self._loss.image_positions or length, length)
        shape = (self._model.config.flow_head.draws_per_token, rows, num_positions)
        time_key, noise_key = jax.random.split(key)
        times = logit_normal_times(time_key, shape)
        noise = jax.random.normal(noise_key, (*shape, self._model.config.token_dim))
        text, image = nextstep_losses(
            self._model, params, batch, times, noise, self._loss.text_chunk
        )
        loss = self._loss.text_weight * text + self._loss.image_weight * image
        padding = jnp.mean((batch["segment_ids"] == 0).astype(jnp.float32))
        return loss, {"text_loss": text, "image_loss": image, "padding": padding}

    def num_samples(self, batch: Batch) -> int:
        """Documents in the local part of a batch, over all processes."""
        documents = int(np.max(batch["segment_ids"], axis=1).sum())
        return documents * jax.process_count()
