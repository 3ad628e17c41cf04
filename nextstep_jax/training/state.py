"""The state of a training run and the step that moves it.

Every value a step needs is in the state or in the batch: the same state and the same batch give
the same next state, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from nextstep_jax.training.optimizer import (
    OptimizerConfig,
    frozen_mask,
    learning_rate_schedule,
    make_optimizer,
    update_ema,
)

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (loss, metrics); both float32 scalars.
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """What training carries from step to step.

    Attributes:
        step: int32 (), updates made so far.
        params: Float32 master parameters.
        opt_state: State of the optax transformation.
        ema: Moving average of the parameters, or None.
        key: Typed key of the run; a step draws from fold_in(key, step).
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


def init_state(params: Any, config: OptimizerConfig, key: Key[Array, ""]) -> TrainState:
    """A fresh state around initial parameters (boxed or not)."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
        key=key,
    )


def make_train_step(
    loss_fn: LossFn, config: OptimizerConfig
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The update as a function (state, batch) -> (state, metrics), to be jitted by the caller."""
    optimizer = make_optimizer(config)
    schedule = learning_rate_schedule(config)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grad_fn = jax.value_and_grad(_with_frozen(loss_fn, config.frozen), has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = update_ema(ema, params, state.step, config.ema_decay)
        metrics = {
            "loss": loss,
            **metrics,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    return train_step


def _with_frozen(loss_fn: LossFn, patterns: Sequence[str]) -> LossFn:
    """The loss with no gradient to the frozen leaves: the compiler drops what leads there."""
    if not patterns:
        return loss_fn

    def loss(params, batch, key):
        mask = frozen_mask(params, patterns)
        stop = jax.lax.stop_gradient
        params = jax.tree.map(lambda p, frozen: stop(p) if frozen else p, params, mask)
        return loss_fn(params, batch, key)

    return loss
