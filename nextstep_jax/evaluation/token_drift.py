"""Drift of the statistics of sampled tokens along a generation (arXiv 2508.10711, figure 5).

Every image token is sampled after those before it. Where guidance pushes a token off the data's
distribution, the next ones start from there, and mean and variance of the tokens run away along
the sequence; a tokenizer whose tokens are normalised holds them. Shown are, for each guidance
scale, mean and variance of the values of a token by its place in the image, averaged over images,
and the same of the data.

Axes: images, n = tokens of an image, token = values of a token.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from nextstep_jax.data.schema import Document
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.models.vae import from_uint8
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training.tokenizer import first_image

# The scales of the paper's figure; 1.5 and 3 for both tokenizers, 7 and 15 with normalisation.
GUIDANCE_SCALES = (1.5, 3.0, 7.0, 15.0)


def token_statistics(tokens: Float[np.ndarray, "images n token"]) -> dict[str, Any]:
    """Mean and variance of the values of a token by its place, averaged over images.

    Returns:
        "mean" and "variance", n numbers each; and "rms_mean", the root of the mean square of the
        tokens' means over all images and places, in which signs do not cancel.

    Raises:
        ValueError: A token has a single value, or values are not finite.
    """
    tokens = np.asarray(tokens, np.float64)
    if tokens.shape[-1] < 2:
        raise ValueError("tokens of one value have no variance")
    if not np.isfinite(tokens).all():
        raise ValueError("the tokens hold NaN or infinite values")
    means, variances = tokens.mean(axis=-1), tokens.var(axis=-1)
    return {
        "mean": means.mean(axis=0).tolist(),
        "variance": variances.mean(axis=0).tolist(),
        "rms_mean": float(np.sqrt(np.square(means).mean())),
    }


def drift(statistics: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, float]:
    """How far the statistics of samples are from those of the data, as ratios.

    Returns:
        "variance_ratio": mean variance of the samples' tokens over the data's; "last_over_first":
        the variance of the last token over that of the first, divided by the same of the data, so
        that 1 is no drift along the sequence; "rms_mean": as in `token_statistics`.

    Raises:
        ValueError: A variance is 0 that others are divided by.
    """
    if 0 in (statistics["variance"][0], data["variance"][0], data["variance"][-1]):
        raise ValueError("the first or last tokens are constant: there is no ratio of variances")

    def slope(values):
        return values["variance"][-1] / values["variance"][0]

    return {
        "variance_ratio": float(np.mean(statistics["variance"]) / np.mean(data["variance"])),
        "last_over_first": float(slope(statistics) / slope(data)),
        "rms_mean": statistics["rms_mean"],
    }


def measure_drift(
    pipe: Callable[..., Any],
    prompts: Sequence[str],
    data_tokens: Float[np.ndarray, "images n token"],
    scales: Sequence[float] = GUIDANCE_SCALES,
    **settings: Any,
) -> dict[str, Any]:
    """Samples one image a prompt at each guidance scale and measures its tokens.

    Args:
        pipe: The model, a `NextStepPipeline`.
        prompts: Captions; prompt i is drawn with seed i at every scale.
        data_tokens: Tokens of real images in the same units.
        scales: Guidance scales.
        **settings: Arguments of the pipeline.

    Returns:
        Plain values: "data", the data's `token_statistics`; "guidance", scale -> those of the
        samples with their `drift`.

    Raises:
        ValueError: See `token_statistics`, which says whose tokens they are, and `drift`.
    """
    data = _statistics_of("the data", data_tokens)
    seeds, result = list(range(len(prompts))), {}
    for scale in scales:
        output = pipe(list(prompts), seed=seeds, guidance_scale=scale, **settings)
        statistics = _statistics_of(f"guidance {scale:g}", output.tokens)
        result[f"{scale:g}"] = {**statistics, **drift(statistics, data)}
    return {"data": data, "guidance": result, "num_images": len(prompts)}


def _statistics_of(name: str, tokens: np.ndarray) -> dict[str, Any]:
    """`token_statistics`, the error with a name."""
    try:
        return token_statistics(tokens)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def image_tokens(
    pipe: NextStepPipeline, source: DocumentSource, num_images: int, batch_size: int = 32
) -> Float[np.ndarray, "images n token"]:
    """Tokens of the first images of the first documents, as the pipeline's model sees them.

    Pixels are fitted to the size that the pipeline samples by default and encoded by its image
    tokenizer; latents, such as records hold, are taken as they are.

    Args:
        pipe: The model.
        source: Documents with images.
        num_images: How many, at most.
        batch_size: Images encoded together.

    Raises:
        ValueError: There is no image, the pipeline's images are not square, latents are not of
            the grid and the width of its tokens, or the encoder's are not finite.
    """
    count = min(num_images, len(source))
    if count < 1 or batch_size < 1:
        raise ValueError(f"num_images={count} and batch_size={batch_size} must be at least 1")
    height, width = pipe.image_size
    config = pipe.model.config
    if height != width:
        raise ValueError(f"image_size: the model samples {height}x{width}, only squares are judged")
    side = height // config.pixels_per_token
    tokens: list[np.ndarray] = []
    for start in range(0, count, batch_size):
        documents = [source[i] for i in range(start, min(start + batch_size, count))]
        if all(one.images and one.images[0].latents is not None for one in documents):
            tokens += [_latents(one, side, config.token_dim) for one in documents]
            continue
        pixels = np.stack([first_image(one, height) for one in documents])
        # Whole batches, so that one program serves all.
        filled = np.concatenate([pixels, pixels[-1:].repeat(batch_size - len(pixels), axis=0)])
        encoded = _encode(pipe.vae, pipe.vae_params, filled, config.patch_size)
        found = np.asarray(encoded)[: len(pixels)]
        if not np.isfinite(found).all():
            raise ValueError("encoder: the latents of the image tokenizer are not finite")
        tokens += list(found)
    return np.stack(tokens)


@functools.partial(jax.jit, static_argnames=("vae", "patch_size"))
def _encode(vae, params, pixels, patch_size):
    images = from_uint8(pixels)
    return vae.apply({"params": params}, images, patch_size, method="encode_tokens")


def _latents(document: Document, side: int, token_dim: int) -> np.ndarray:
    """The first image's, if they are of the model's grid and width."""
    image = document.images[0]
    if tuple(image.grid) != (side, side) or image.latents.shape[-1] != token_dim:
        raise ValueError(
            f"document {document.id} of {document.source} has latents of grid {image.grid} and"
            f" width {image.latents.shape[-1]}, the model {(side, side)} and {token_dim}"
        )
    return image.latents.astype(np.float32)


def table(result: Mapping[str, Any]) -> str:
    """What `measure_drift` returned as a table of text: one line a guidance scale."""
    names = ("variance_ratio", "last_over_first", "rms_mean")
    # By their definition, the data are at 1 of themselves.
    rows = {"data": {"variance_ratio": 1.0, "last_over_first": 1.0, **result["data"]}}
    lines = [f"{'guidance':<10}" + "".join(f"{name:>17}" for name in names)]
    for scale, values in {**result["guidance"], **rows}.items():
        lines.append(f"{scale:<10}" + "".join(f"{values[name]:>17.3f}" for name in names))
    return "\n".join(lines)


def plot_drift(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws mean and variance by place, one column for each model.

    Args:
        results: Name of a model or of its tokenizer -> what `measure_drift` returned.
        path: A file; its suffix names the format.
    """
    columns = len(results)
    figure = Figure(figsize=(4.2 * columns, 5.6), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, squeeze=False, sharey="row")
    for column, (name, result) in enumerate(results.items()):
        for row, quantity in enumerate(("mean", "variance")):
            axis = axes[row][column]
            for scale, values in result["guidance"].items():
                axis.plot(values[quantity], label=f"guidance {scale}", linewidth=1.4)
            axis.plot(result["data"][quantity], "k--", label="data", linewidth=1.2)
            axis.set_ylabel(f"{quantity} of a token" if column == 0 else "")
            axis.grid(alpha=0.3)
            # Runaway variances span decades; means change sign.
            axis.set_yscale("log" if quantity == "variance" else "linear")
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("place of the token in the image")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
