"""What NextStep-1 is trained on: cross-entropy and flow matching over packed rows.

L = w_text * L_text + w_image * L_image with weights 0.01 and 1 (arXiv 2508.10711, eq 2). Pixels
become image tokens in a jitted encode of their own (`batch_encoding.py`); the loss sees tokens.

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

from nextstep_jax.data.pipeline import (
    DataConfig,
    Sources,
    layout_of,
    make_pipeline,
    pipeline_fingerprint,
)
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.flow.path import logit_normal_times
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import VAE
from nextstep_jax.training.batch_encoding import BatchEncoder
from nextstep_jax.training.loop import to_device
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
        image_positions: Image positions gathered from a row. None gathers as many as a row may
            hold: `data.max_image_tokens`, or the whole row without such a limit. Ours.
        images_per_encode: Images of pixels that a device encodes at once; see `BatchEncoder`.
            Ours.
    """

    text_weight: float = 0.01
    image_weight: float = 1.0
    text_chunk: int = 512
    image_positions: int | None = None
    images_per_encode: int = 8


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
        layout_of(data, model.config)
        most, gathered = data.max_image_tokens or data.row_length, loss.image_positions
        if gathered is not None and gathered < most:
            raise ValueError(
                f"loss.image_positions={gathered}, but a row of data.row_length={data.row_length}"
                f" with data.max_image_tokens={data.max_image_tokens} can hold {most} image"
                f" tokens: image_positions must be at least {most}, or None"
            )
        self._num_positions = min(gathered or most, data.row_length)
        self.config = config
        self.fingerprint = {
            **pipeline_fingerprint(data, sources, tokenizer, model.config),
            # Other weights give other tokens: as much part of the data as the pixels.
            "image_tokenizer": tree_digest(vae_params),
        }
        self._model, self._data, self._loss = model, data, loss
        self._sources, self._tokenizer = sources, tokenizer
        self._encoder = None
        if vae is not None:
            args = (model.config.patch_size, loss.images_per_encode)
            self._encoder = BatchEncoder(vae, vae_params, *args)

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

    def place(self, mesh: jax.sharding.Mesh, local: Batch) -> Batch:
        """On the devices, with latents in place of pixels."""
        on_host = ("images", "image_slots", "kinds", "document_ids")
        batch = to_device(mesh, {k: v for k, v in local.items() if k not in on_host})
        if "images" not in local:
            return batch
        return {**batch, "latents": self._encoder(mesh, local)}

    def loss(
        self, params: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """w_text * L_text + w_image * L_image and its parts."""
        rows = len(batch["token_ids"])
        shape = (self._model.config.flow_head.draws_per_token, rows, self._num_positions)
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
