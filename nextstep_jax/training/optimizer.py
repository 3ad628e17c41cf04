"""AdamW, schedules and the moving average (arXiv 2508.10711, Table 1 and the released trainer).

Warm-up is linear; afterwards the rate is constant or follows (1 - floor) * cosine + floor. The
released trainer clips gradients to norm 1 and decays matrices only.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine")
_MOMENT_DTYPES = ["float32", "bfloat16"]
# Root mean square of Adam's updates in units of the learning rate, as Moonlight (arXiv 2502.16982)
# found it.
_RMS_OF_ADAM = 0.2
# Leaves that are matrices, by name: stacked biases and gains have two axes as well.
_DECAYED = ("kernel", "embed_tokens")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        name: "adamw" as published; or "muon" (Jordan et al. 2024, optax's, consistent with Adam in
            the size of its updates) for convolution kernels, with Adam in Nesterov's form for all
            else. Ours: a tiny image tokenizer learns faster with it (docs/tokenizer.md).
        learning_rate: Rate after the warm-up.
        schedule: One of `SCHEDULES`.
        warmup_steps: Steps of the linear warm-up.
        num_steps: Step at which the cosine ends.
        floor: Last rate of the cosine over `learning_rate`.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of the matrices; with muon of the convolutions.
        clip_norm: Largest global norm of the gradient.
        ema_decay: Decay of the moving average of the parameters; 0 keeps none. Ours: no published
            text has one.
        first_moment_dtype: "float32", or "bfloat16" for half the memory of the first moment. Ours.
        rate_factors: Groups with a learning rate of their own, as "PATTERN=FACTOR": "decoder/*=0.1"
            makes the decoder's a tenth. Of several patterns that match, the first counts. The
            released trainer has such a switch, off by default.
        frozen: Parameters that stay as they are: patterns of paths such as "encoder/*", where *
            also stands for slashes. Neither gradients nor moments of them are kept.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 5000
    num_steps: int = 200_000
    floor: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    first_moment_dtype: str = "float32"
    rate_factors: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        """Checks the names."""
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name={self.name!r} is unknown; choose from {list(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; choose from {list(SCHEDULES)}"
            )
        if self.first_moment_dtype not in _MOMENT_DTYPES:
            raise ValueError(
                f"first_moment_dtype={self.first_moment_dtype!r}; choose from {_MOMENT_DTYPES}"
            )
        if self.name == "muon" and (self.rate_factors or self.first_moment_dtype != "float32"):
            raise ValueError("rate_factors and first_moment_dtype are for name='adamw'")
        for text in self.rate_factors:
            _parse_factor(text)


def learning_rate_schedule(config: OptimizerConfig) -> Callable[[Any], jax.Array]:
    """Step (from 0) to learning rate."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        # Step 0 already moves: the rate reaches its full value at step warmup_steps - 1.
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "constant":
            return config.learning_rate * warmup
        length = max(config.num_steps - config.warmup_steps, 1)
        share = jnp.clip((step - config.warmup_steps) / length, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * share))
        return config.learning_rate * warmup * ((1 - config.floor) * cosine + config.floor)

    return schedule


def decay_mask(params: Any) -> Any:
    """True for the leaves that are decayed: kernels and the embedding."""

    def is_matrix(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] in _DECAYED

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _convolutions(params: Any) -> Any:
    """Which axes of a convolution kernel (height, width, in, out) make it a matrix."""
    matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    return jax.tree.map(lambda leaf: matrix if leaf.ndim == 4 else None, params)


def _parse_factor(text: str) -> tuple[str, float]:
    pattern, _, number = text.rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if not pattern or not 0 <= factor < float("inf"):
        raise ValueError(f"optimizer.rate_factors: {text!r} must read like 'decoder/*=0.1'")
    return pattern, factor


def _paths(params: Any, patterns: Sequence[str], field: str) -> tuple[list[str], Any]:
    """Paths of the leaves, joined by slashes, and the structure of the tree.

    Raises:
        ValueError: A pattern matches nothing.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [
        "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for path, _ in leaves
    ]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            tops = sorted({path.split("/")[0] for path in paths})
            raise ValueError(
                f"optimizer.{field}: {pattern!r} matches no parameter; they are below {tops}"
            )
    return paths, tree


def frozen_mask(params: Any, patterns: Sequence[str]) -> Any:
    """True for the leaves whose path, joined by slashes, matches a pattern.

    Raises:
        ValueError: A pattern matches nothing, or all is frozen.
    """
    paths, tree = _paths(params, patterns, "frozen")
    mask = [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    if all(mask):
        raise ValueError(f"optimizer.frozen={list(patterns)} freezes every parameter")
    return jax.tree.unflatten(tree, mask)


def rate_factors(params: Any, texts: Sequence[str]) -> Any:
    """The factor of every leaf's learning rate; 1 where no pattern matches.

    Raises:
        ValueError: A pattern matches nothing, or a text is not of the form "PATTERN=FACTOR".
    """
    groups = [_parse_factor(text) for text in texts]
    paths, tree = _paths(params, [pattern for pattern, _ in groups], "rate_factors")

    def factor(path):
        return next((f for pattern, f in groups if fnmatch.fnmatchcase(path, pattern)), 1.0)

    return jax.tree.unflatten(tree, [factor(path) for path in paths])


def _scale_by_factors(texts: Sequence[str]) -> optax.GradientTransformation:
    """Multiplies the updates of each group."""

    def update(updates, params):
        return jax.tree.map(lambda factor, u: factor * u, rate_factors(params, texts), updates)

    return optax.stateless(update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and the update as one optax transformation."""
    update = _update(config)
    if config.frozen:

        def trained(params):
            return jax.tree.map(lambda frozen: not frozen, frozen_mask(params, config.frozen))

        # The gradients of frozen leaves are zero (`state.make_train_step`) and pass as they are.
        update = optax.masked(update, trained)
    if not config.rate_factors:
        return update
    return optax.chain(update, _scale_by_factors(config.rate_factors))


def _update(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.name == "muon":
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.contrib.muon(
                learning_rate_schedule(config),
                # The size of Adam's updates, so that one learning rate serves both.
                consistent_rms=_RMS_OF_ADAM,
                muon_weight_dimension_numbers=_convolutions,
                weight_decay=config.weight_decay,
                eps=config.eps,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
            ),
        )
    adam = optax.scale_by_adam(
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        mu_dtype=jnp.dtype(config.first_moment_dtype),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adam,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )


def update_ema(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """decay * ema + (1 - decay) * params; early on the decay is (1 + step) / (10 + step).

    Written so that a parameter which stays as it is, as frozen ones do, leaves its average as it
    is, to the last bit.
    """
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
