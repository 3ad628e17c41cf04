"""The state of a training run and the step that moves it.

Every value a step needs is in the state or in the batch: the same state and the same batch give
the same next state, bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from nextstep_jax.training.optimizer import (
    OptimizerConfig,
    frozen_mask,
    learning_rate_schedule,
    make_optimizer,
    update_ema,
)


@flax.struct.dataclass
class Mean:
    """A mean that adds up over the parts of a batch.

    Attributes:
        total: Float32, the weighted sum; any shape.
        weight: Float32 of the same shape, the sum of the weights.
    """

    total: Any
    weight: Any

    def value(self) -> Float[Array, "..."]:
        """total / weight; NaN where nothing was weighted."""
        return jnp.where(self.weight > 0, self.total / self.weight, jnp.nan)


Metrics = dict[str, jax.Array]
# (params, batch, key) -> (loss, metrics): a float32 scalar, and scalars or means to log. Over the
# parts of a batch, loss and scalars are summed.
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, Any]]]
# (batch, key) -> batch: adds what is drawn for, or counted over, the batch as a whole.
DrawFn = Callable[[Any, jax.Array], Any]


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
    loss_fn: LossFn,
    config: OptimizerConfig,
    *,
    draw_fn: DrawFn | None = None,
    accumulate: int = 1,
    placed: Callable[[Any], Any] = lambda grads: grads,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The update as a function (state, batch) -> (state, metrics), to be jitted by the caller.

    Args:
        loss_fn: See `LossFn`.
        config: The update.
        draw_fn: Applied to the whole batch first; see `DrawFn`.
        accumulate: Parts that the rows are cut into, one after another; the sums of their losses,
            means and float32 gradients are those of the whole batch, so that `loss_fn` must
            divide by what `draw_fn` has counted over all of it. Needs `draw_fn` beyond 1.
        placed: Lays gradients out like the parameters, which they do not inherit by themselves.

    Raises:
        ValueError: Parts without a `draw_fn`.
    """
    if accumulate > 1 and draw_fn is None:
        raise ValueError(f"accumulate={accumulate}: this loss knows no parts of a batch")
    optimizer = make_optimizer(config)
    schedule = learning_rate_schedule(config)
    grad_fn = jax.value_and_grad(_with_frozen(loss_fn, config.frozen), has_aux=True)

    def whole(params, batch, key):
        (loss, metrics), grads = grad_fn(params, batch, key)
        return placed(grads), {"loss": loss, **metrics}

    def in_parts(params, batch, key):
        def add(total, part):
            return jax.tree.map(jnp.add, total, whole(params, {**rest, **part}, key)), None

        rest, rows = _rows_apart(batch, accumulate)
        first = jax.tree.map(lambda x: x[0], rows)
        shapes = jax.eval_shape(lambda: whole(params, {**rest, **first}, key))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        return jax.lax.scan(add, (placed(zeros[0]), zeros[1]), rows)[0]

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if draw_fn is not None:
            batch = draw_fn(batch, key)
        grads, metrics = (whole if accumulate == 1 else in_parts)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = update_ema(ema, params, state.step, config.ema_decay)
        metrics = {
            **{k: m.value() if isinstance(m, Mean) else m for k, m in metrics.items()},
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
            **_norms_by_group("grad_norm", grads),
            **_norms_by_group("param_norm", params),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    return train_step


def _rows_apart(batch: Any, parts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scalars, arrays with their rows cut into parts on a new leading axis).

    Every part takes rows from all over the batch: on a mesh every device keeps its own.
    """

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    scalars = {k: x for k, x in batch.items() if jnp.ndim(x) == 0}
    return scalars, {k: cut(x) for k, x in batch.items() if k not in scalars}


def _norms_by_group(name: str, tree: Any) -> Metrics:
    """The norm of each part of a model, under NAME/PART; nothing where there is but one."""
    if not isinstance(tree, Mapping) or len(tree) < 2:
        return {}
    return {f"{name}/{part}": optax.tree.norm(leaves) for part, leaves in tree.items()}


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
