"""What NextStep-1 is trained on: cross-entropy and flow matching over packed rows.

L = w_text * L_text + w_image * L_image with weights 0.01 and 1 (arXiv 2508.10711, eq 2). Pixels
become image tokens in a jitted encode of their own (`batch_encoding.py`); the loss sees tokens.

Axes: batch, length, embed, token; n = image positions gathered from a row.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from nextstep_jax.data.pipeline import (
    DataConfig,
    Sources,
    layout_of,
    make_pipeline,
    pipeline_fingerprint,
)
from nextstep_jax.data.schema import KINDS
from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.flow.path import logit_normal_times
from nextstep_jax.models.config import NextStepConfig
from nextstep_jax.models.flops import TrainingFlops, training_flops
from nextstep_jax.models.layers import constrain
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel import sharding
from nextstep_jax.training.batch_encoding import BatchEncoder
from nextstep_jax.training.loop import to_device
from nextstep_jax.training.losses import (
    chunked_cross_entropy,
    flow_matching_error,
    gather_image_positions,
    next_position,
    weighted_mean,
)
from nextstep_jax.training.state import Mean

Batch = Mapping[str, Any]


# Image positions of a row are rounded up to this, so that a mesh can split them. Ours.
_POSITIONS_MULTIPLE = 16
# Parts of [0, 1) that the flow loss is shown for. Ours.
_TIME_BINS = 10


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses and sizes of their pieces.

    Attributes:
        text_weight: Weight of the cross-entropy (paper, Table 1).
        image_weight: Weight of the flow loss (paper, Table 1).
        text_chunk: Positions of a row whose logits exist at one time. Ours: memory against speed.
        image_positions: Image positions gathered from a row. None gathers as many as a row may
            hold: `data.max_image_tokens`, or the whole row without such a limit. Ours.
        draws_one_by_one: The flow head takes the draws of a token one after another and computes
            them again in the backward pass. Ours: memory against speed.
        images_per_encode: Images of pixels that a device encodes at once; see `BatchEncoder`.
            Ours.
    """

    text_weight: float = 0.01
    image_weight: float = 1.0
    text_chunk: int = 512
    image_positions: int | None = None
    draws_one_by_one: bool = False
    images_per_encode: int = 8


@dataclasses.dataclass(frozen=True)
class PositionLosses:
    """What every position of packed rows contributes, float32.

    Attributes:
        text: (batch, length), the cross-entropy of predicting what stands at position p + 1.
        text_weights: (batch, length), its weight.
        image: (draws, batch, n), the flow-matching error of the gathered image positions.
        image_weights: (batch, n), its weight; 0 where a row has fewer.
        order: (batch, n), where the gathered positions stand in their row.
    """

    text: jax.Array
    text_weights: jax.Array
    image: jax.Array
    image_weights: jax.Array
    order: jax.Array


def position_losses(
    model: NextStep,
    params: Any,
    batch: Batch,
    times: Float[Array, "draws batch n"],
    noise: Float[Array, "draws batch n token"],
    config: LossConfig,
) -> PositionLosses:
    """Cross-entropy and flow-matching error of packed rows, position by position.

    Args:
        model: The model.
        params: Its parameters.
        batch: token_ids, latents, segment_ids, positions, text_weights, image_weights.
        times: The times of every gathered position.
        noise: The noise they are mixed with.
        config: Sizes of the pieces.
    """

    def apply(method, *args):
        return model.apply({"params": params}, *args, method=method)

    rows = (batch["token_ids"], batch["latents"], batch["positions"], batch["segment_ids"])
    hidden = apply("hidden", *rows)
    targets, text_weights = (next_position(batch[k]) for k in ("token_ids", "text_weights"))
    text = chunked_cross_entropy(
        lambda h: apply("text_logits", h), hidden, targets, text_weights, config.text_chunk
    )
    order, weights = gather_image_positions(batch["image_weights"], times.shape[-1])
    # The hidden state before an image token is its condition.
    before = jnp.take_along_axis(hidden, jnp.maximum(order - 1, 0)[..., None], axis=1)
    before = constrain(before, "act_batch", "act_len", "act_embed")
    image = flow_matching_error(
        lambda x, t, y: apply("velocity_given", x, t, y),
        # Once a token, whatever the number of draws.
        apply("embed_condition", apply("condition", before)),
        jnp.take_along_axis(batch["latents"], order[..., None], axis=1),
        times,
        noise,
        one_by_one=config.draws_one_by_one,
    )
    return PositionLosses(text, text_weights, image, weights, order)


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
        batch: See `position_losses`.
        times: See `position_losses`.
        noise: See `position_losses`.
        chunk: See `LossConfig.text_chunk`.

    Returns:
        Float32; a kind of token that the batch does not have gives 0.
    """
    config = LossConfig(text_chunk=chunk)
    parts = position_losses(model, params, batch, times, noise, config)
    text = weighted_mean(jnp.sum(parts.text * parts.text_weights), parts.text_weights)
    image = jnp.sum(parts.image_weights * jnp.mean(parts.image, axis=0))
    return text, weighted_mean(image, parts.image_weights)


class NextStepObjective:
    """The loss of the unified model over packed rows; knows neither data nor image tokenizer.

    Attributes:
        model: The model.
        loss_config: Weights and sizes.
        num_positions: Image positions gathered from a row.
    """

    def __init__(self, model: NextStep, config: LossConfig, row_length: int, max_image_tokens: int):
        """Takes what a row may hold.

        Raises:
            ValueError: A row could hold more image tokens than `config.image_positions`, and the
                rest would silently not be trained.
        """
        gathered = config.image_positions
        if gathered is not None and gathered < max_image_tokens:
            raise ValueError(
                f"loss.image_positions={gathered}, but a row of data.row_length={row_length}"
                f" with this data.max_image_tokens can hold {max_image_tokens} image"
                f" tokens: image_positions must be at least {max_image_tokens}, or None"
            )
        wanted = gathered or max_image_tokens
        rounded = -(-wanted // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE
        self.model, self.loss_config = model, config
        self.num_positions = min(rounded, row_length)

    def init_params(self, key: Key[Array, ""]) -> Any:
        """Published initialisers; boxed with the logical axes."""
        return init_params(self.model, key)

    def abstract_batch(self, mesh: jax.sharding.Mesh, rows: int, length: int) -> Batch:
        """Shapes, dtypes and shardings of a global batch, for compiling without data."""
        here = sharding.batch_sharding(mesh, has_length=True)

        def leaf(dtype, *more):
            return jax.ShapeDtypeStruct((rows, length, *more), dtype, sharding=here)

        return {
            **{name: leaf(jnp.int32) for name in ("token_ids", "segment_ids", "positions")},
            **{name: leaf(jnp.float32) for name in ("text_weights", "image_weights")},
            "kinds": leaf(jnp.int8),
            "latents": leaf(jnp.float32, self.model.config.token_dim),
        }

    def draw(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """Adds times, noise and the sums of weights of the whole batch; see `DrawFn`.

        times (batch, draws, n) and noise (batch, draws, n, token), rows first, do not depend on
        the parts that a step may cut the batch into.
        """
        rows, draws = len(batch["token_ids"]), self.model.config.flow_head.draws_per_token
        shape = (rows, draws, self.num_positions)
        time_key, noise_key = jax.random.split(key)
        return {
            **batch,
            "times": logit_normal_times(time_key, shape),
            "noise": jax.random.normal(noise_key, (*shape, self.model.config.token_dim)),
            "text_total": jnp.sum(batch["text_weights"][:, 1:]),
            "image_total": jnp.sum(batch["image_weights"]),
        }

    def loss(
        self, params: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """w_text * L_text + w_image * L_image of a batch or a part of one, and what to log.

        Args:
            params: The model's parameters.
            batch: As `draw` returns it, or a part of that; `draw` is called on another.
            key: For `draw`.
        """
        if "times" not in batch:
            batch = self.draw(batch, key)
        times, noise = (jnp.moveaxis(batch[name], 1, 0) for name in ("times", "noise"))
        parts = position_losses(self.model, params, batch, times, noise, self.loss_config)
        text = jnp.sum(parts.text * parts.text_weights)
        image = jnp.sum(parts.image_weights * jnp.mean(parts.image, axis=0))
        padding = (batch["segment_ids"] == 0).astype(jnp.float32)
        loss = self.loss_config.text_weight * _share(text, batch["text_total"])
        loss = loss + self.loss_config.image_weight * _share(image, batch["image_total"])
        return loss, {
            "text_loss": Mean(text, jnp.sum(parts.text_weights)),
            "image_loss": Mean(image, jnp.sum(parts.image_weights)),
            "padding": Mean(jnp.sum(padding), jnp.float32(padding.size)),
            **losses_by_kind(parts, batch.get("kinds")),
            **loss_by_time(parts, times),
        }


def losses_by_kind(
    parts: PositionLosses, kinds: Int[Array, "batch length"] | None
) -> dict[str, Mean]:
    """text_loss/KIND and image_loss/KIND: both losses on the documents of each of `KINDS`.

    Args:
        parts: Of a batch.
        kinds: Its `kinds`, see `data.schema.Batch`; nothing is returned without them.
    """
    if kinds is None:
        return {}
    numbers = kinds.astype(jnp.int32) - 1
    at_image = jnp.take_along_axis(numbers, parts.order, axis=1)
    # What is predicted stands one further.
    text = mean_by_group(parts.text, parts.text_weights, next_position(numbers), len(KINDS))
    image = jnp.mean(parts.image, axis=0)
    image = mean_by_group(image, parts.image_weights, at_image, len(KINDS))
    return _by_name(text, "text_loss/", KINDS) | _by_name(image, "image_loss/", KINDS)


def loss_by_time(parts: PositionLosses, times: Float[Array, "draws batch n"]) -> dict[str, Mean]:
    """image_loss/t0.0 to image_loss/t0.9: the flow loss by tenths of the time it was taken at.

    Every draw counts with the weight of its position; t = 0 is noise and t = 1 is data.
    """
    weights = jnp.broadcast_to(parts.image_weights, times.shape)
    tenths = jnp.clip(jnp.floor(_TIME_BINS * times), 0, _TIME_BINS - 1).astype(jnp.int32)
    found = mean_by_group(parts.image, weights, tenths, _TIME_BINS)
    return _by_name(found, "image_loss/t", [f"{i / _TIME_BINS:.1f}" for i in range(_TIME_BINS)])


def mean_by_group(
    values: Float[Array, "*shape"],
    weights: Float[Array, "*shape"],
    groups: Int[Array, "*shape"],
    num_groups: int,
) -> Mean:
    """The weighted mean of each group, (num_groups,); other group numbers count nowhere."""
    numbers = jnp.arange(num_groups).reshape(-1, *[1] * values.ndim)
    # Never in memory: the comparison becomes part of the sums.
    weights = jnp.where(groups == numbers, weights, 0.0)
    axes = tuple(range(1, weights.ndim))
    return Mean(jnp.sum(weights * values, axes), jnp.sum(weights, axes))


def _by_name(means: Mean, prefix: str, names: Sequence[str]) -> dict[str, Mean]:
    """The entries of a vector of means, one by one."""
    return {
        f"{prefix}{name}": Mean(means.total[i], means.weight[i]) for i, name in enumerate(names)
    }


def _share(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """total / weight, 0 where nothing is weighted."""
    return total / jnp.where(weight > 0, weight, 1.0)


def batch_flops(config: NextStepConfig, batch: Batch) -> TrainingFlops:
    """What a step on these rows needs, by their weights and documents; see `training_flops`.

    Args:
        config: The model.
        batch: segment_ids, text_weights and image_weights of packed rows, as numpy arrays.
    """
    segments = np.asarray(batch["segment_ids"])
    rows, length = segments.shape
    # A document is a run of one number, and none goes over into the next row.
    begins = np.ones((rows, length), bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=segments.size)[segments.ravel()[starts] > 0]
    return training_flops(
        config,
        rows=rows,
        length=length,
        positions=int(lengths.sum()),
        attention_pairs=int(np.sum(lengths * (lengths + 1) // 2)),
        # Nothing predicts the first of a row.
        text_positions=int(np.count_nonzero(batch["text_weights"][:, 1:] > 0)),
        image_positions=int(np.count_nonzero(batch["image_weights"] > 0)),
    )


def tree_digest(tree: Any) -> str:
    """A short digest of the values of a tree of arrays, for fingerprints."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class NextStepTask(NextStepObjective):
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
        most = min(data.max_image_tokens or data.row_length, data.row_length)
        super().__init__(model, loss, data.row_length, most)
        self._data = data
        self.config = config
        self.fingerprint = {
            **pipeline_fingerprint(data, sources, tokenizer, model.config),
            # Other weights give other tokens: as much part of the data as the pixels.
            "image_tokenizer": tree_digest(vae_params),
        }
        self._sources, self._tokenizer = sources, tokenizer
        self._encoder = None
        if vae is not None:
            args = (model.config.patch_size, loss.images_per_encode)
            self._encoder = BatchEncoder(vae, vae_params, *args)

    def dataset(self, process_index: int, process_count: int) -> Any:
        """Packed rows of the mixture."""
        return make_pipeline(
            self._sources,
            self._tokenizer,
            self.model.config,
            self._data,
            process_index,
            process_count,
        )

    def place(self, mesh: jax.sharding.Mesh, local: Batch) -> Batch:
        """On the devices, with latents in place of pixels."""
        on_host = ("images", "image_slots", "document_ids")
        rows = {k: v for k, v in local.items() if k not in on_host}
        batch = to_device(mesh, rows, has_length=True)
        if "images" not in local:
            return batch
        return {**batch, "latents": self._encoder(mesh, local)}

    def num_tokens(self, batch: Batch) -> int:
        """Positions of the rows of the global batch, padding included."""
        return batch["token_ids"].size * jax.process_count()

    def num_flops(self, local: Batch) -> float:
        """FLOPs that a step on the global batch needs, if all processes hold what this one does.

        Args:
            local: This process's rows; see `batch_flops`.
        """
        return batch_flops(self.model.config, local).total * jax.process_count()

    def num_samples(self, batch: Batch) -> int:
        """Documents in the local part of a batch, over all processes."""
        documents = int(np.max(batch["segment_ids"], axis=1).sum())
        return documents * jax.process_count()
