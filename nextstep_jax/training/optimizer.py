"""AdamW, schedules and the moving average (arXiv 2508.10711, Table 1 and the released trainer).

Warm-up is linear; afterwards the rate is constant or follows (1 - floor) * cosine + floor. The
released trainer clips gradients to norm 1 and decays matrices only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

SCHEDULES = ("constant", "cosine")
# Leaves that are matrices, by name: stacked biases and gains have two axes as well.
_DECAYED = ("kernel", "embed_tokens")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        learning_rate: Rate after the warm-up.
        schedule: One of `SCHEDULES`.
        warmup_steps: Steps of the linear warm-up.
        num_steps: Step at which the cosine ends.
        floor: Last rate of the cosine over `learning_rate`.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of the matrices.
        clip_norm: Largest global norm of the gradient.
        ema_decay: Decay of the moving average of the parameters; 0 keeps none. Ours: no published
            text has one.
    """

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

    def __post_init__(self):
        """Checks the schedule."""
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; choose from {list(SCHEDULES)}"
            )


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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and AdamW as one optax transformation."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )


def update_ema(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """decay * ema + (1 - decay) * params; early on the decay is (1 + step) / (10 + step)."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
