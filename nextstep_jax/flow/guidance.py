"""Classifier-free guidance of velocities, and its schedule over the tokens of an image.

NextStep-1 (arXiv 2508.10711, eq 4): the velocity under the full condition is extrapolated away
from the velocity without it, v = v_u + w (v_c - v_u). Editing has a third branch and a second
scale for the source image. The mix is linear in velocities that lie close to each other and w is
large, so it is computed in float32 whatever the network's precision.

Axes: `branches` the conditions (order below), `*batch` any leading axes, `dim` values of a token.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

SCHEDULES = ("constant", "falling", "rising")


def guide(
    velocities: Float[Array, "branches *batch dim"],
    scale: float | Float[Array, "*#batch"],
    image_scale: float | Float[Array, "*#batch"] = 1.0,
    *,
    renorm: bool = False,
) -> Float32[Array, "*batch dim"]:
    """Mixes the velocities of the guidance branches.

    Branch order: [condition], [condition, unconditional], or [condition, source image with the
    negative prompt, negative prompt alone]. With three,
    v = v_2 + image_scale (v_1 - v_2) + scale (v_0 - v_1).

    Args:
        velocities: Velocities of 1, 2 or 3 branches.
        scale: Guidance scale w, one for all or one a token; not used with one branch.
        image_scale: Scale of the source image; used with three branches only.
        renorm: Scales a guided velocity that is longer than the conditional one back to its
            length, token by token. Nothing is lengthened.

    Returns:
        The guided velocity.

    Raises:
        ValueError: If there are not 1, 2 or 3 branches.
    """
    velocities = velocities.astype(jnp.float32)
    scale = jnp.asarray(scale, jnp.float32)[..., None]
    image_scale = jnp.asarray(image_scale, jnp.float32)[..., None]
    condition = velocities[0]
    match velocities.shape[0]:
        case 1:
            return condition
        case 2:
            guided = velocities[1] + scale * (condition - velocities[1])
        case 3:
            _, image, negative = velocities
            guided = negative + image_scale * (image - negative) + scale * (condition - image)
        case num_branches:
            raise ValueError(f"velocities must have 1, 2 or 3 branches, got {num_branches}")
    if renorm:
        ratio = _length(condition) / (_length(guided) + 1e-6)
        guided = guided * jnp.clip(ratio, 0.0, 1.0)
    return guided


def _length(velocity: Float[Array, "*batch dim"]) -> Float[Array, "*batch 1"]:
    """Euclidean norm of each token."""
    return jnp.linalg.norm(velocity, axis=-1, keepdims=True)


def check_schedule(schedule: str, interval: tuple[float, float]) -> None:
    """Refuses a schedule or an interval that `guidance_scale_at` does not know.

    Raises:
        ValueError: If the schedule is unknown or the interval is not 0 <= start <= end <= 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known schedules: {', '.join(SCHEDULES)}")
    start, end = interval
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"interval must be shares 0 <= start <= end <= 1, got {interval}")


def guidance_scale_at(
    schedule: str,
    scale: float | Float[Array, "*#index"],
    token_index: int | Int[Array, "*index"],
    num_tokens: int,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Float32[Array, "*index"]:
    """The guidance scale of one token of an image.

    "falling" and "rising" are the two published schedules that both go by the name "linear":
    1 + (w - 1) (N - n) / N in the code of August 2025, max(w / 2, 1 + (w - 1) n / N) in that of
    February 2026. Both apply the formula to the image scale of an edit as well: one call each.

    Args:
        schedule: One of `SCHEDULES`.
        scale: The guidance scale w.
        token_index: n, from 0.
        num_tokens: N, number of tokens of the image.
        interval: Shares (start, end) of the image. Guidance acts on the tokens with
            start <= n / N < end; elsewhere the scale is 1. Ours, the whole image by default.

    Returns:
        The scale at token n.

    Raises:
        ValueError: See `check_schedule`.
    """
    check_schedule(schedule, interval)
    index = jnp.asarray(token_index)
    scale = jnp.asarray(scale, jnp.float32)
    share = index.astype(jnp.float32) / num_tokens
    if schedule == "falling":
        scale = 1.0 + (scale - 1.0) * (1.0 - share)
    elif schedule == "rising":
        scale = jnp.maximum(0.5 * scale, 1.0 + (scale - 1.0) * share)
    # Whole-token bounds; the slack keeps a share such as 0.7 of 10 tokens at token 7.
    first, last = (math.ceil(edge * num_tokens - 1e-6) for edge in interval)
    return jnp.where((index >= first) & (index < last), scale, 1.0)
