"""How unlike two images look: LPIPS over the features of VGG16 or AlexNet.

LPIPS is the perceptual distance of Zhang et al. (arXiv 1801.03924), in its version 0.1: both images
go through a network that was trained to classify, the features of five layers are normalised over
their channels, and the squared differences are weighted per channel, averaged over space and
summed over the layers. It judges the image tokenizer of NextStep-1 (arXiv 2508.10711) and trains
it. The weights are a user's own files (`interop.perceptual_weights`); parameters have torchvision's
names, with underscores for dots (`features.10` is `features_10`).

Words for axes: images are (batch, height, width, 3) in [-1, 1]; features are (batch, rows, columns,
channels).
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LPIPS_NETWORKS = ("vgg", "alex")
"""The networks whose features LPIPS is defined over here."""

LPIPS_MIN_SIDES: Mapping[str, int] = {"vgg": 16, "alex": 31}
"""The smallest side of an image that leaves a pixel in the last layer, by network."""

# The scaling layer of version 0.1: mean and deviation of ImageNet, moved from [0, 1] to [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_NORM_EPS = 1e-10


class _Conv(NamedTuple):
    """A convolution with bias, before a ReLU; `index` is its place in torchvision's `features`."""

    index: int
    features: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class _Stage(NamedTuple):
    """What lies between two layers that LPIPS looks at; `pool` is a window, its stride is 2."""

    pool: int | None
    convs: tuple[_Conv, ...]


_STAGES: Mapping[str, tuple[_Stage, ...]] = {
    "vgg": (
        _Stage(None, (_Conv(0, 64), _Conv(2, 64))),
        _Stage(2, (_Conv(5, 128), _Conv(7, 128))),
        _Stage(2, (_Conv(10, 256), _Conv(12, 256), _Conv(14, 256))),
        _Stage(2, (_Conv(17, 512), _Conv(19, 512), _Conv(21, 512))),
        _Stage(2, (_Conv(24, 512), _Conv(26, 512), _Conv(28, 512))),
    ),
    "alex": (
        _Stage(None, (_Conv(0, 64, kernel=11, stride=4, padding=2),)),
        _Stage(3, (_Conv(3, 192, kernel=5, padding=2),)),
        _Stage(3, (_Conv(6, 384),)),
        _Stage(None, (_Conv(8, 256),)),
        _Stage(None, (_Conv(10, 256),)),
    ),
}


def unit_normalize(
    features: Float[Array, "*shape channels"],
) -> Float[Array, "*shape channels"]:
    """Features over their length: x / (|x| + 1e-10), as the lpips package has it.

    A vector of zeros stays so and passes no gradient on, where the formula alone gives NaN.
    """
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    is_zero = squares == 0
    # The inner `where` keeps the gradient of the root finite, the outer one makes it zero.
    length = jnp.sqrt(jnp.where(is_zero, 1.0, squares))
    return jnp.where(is_zero, 0.0, features / (length + _NORM_EPS))


def layer_distance(
    features: Float[Array, "batch rows columns channels"],
    others: Float[Array, "batch rows columns channels"],
    weights: Float[Array, " channels"],
) -> Float[Array, " batch"]:
    """One layer's part of LPIPS: sum_c w_c (x_c - y_c)^2 of unit vectors, averaged over space."""
    difference = unit_normalize(features) - unit_normalize(others)
    return jnp.mean(jnp.sum(jnp.square(difference) * weights, axis=-1), axis=(1, 2))


class FeatureStack(nn.Module):
    """The convolutions of VGG16 or AlexNet, without the classifier.

    Attributes:
        network: One of `LPIPS_NETWORKS`.
        dtype: Type of the computation; parameters are float32.
    """

    network: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, "batch _ _ _"], ...]:
        """Features after relu1_2, 2_2, 3_3, 4_3, 5_3 (VGG16) or relu1 ... relu5 (AlexNet).

        Args:
            images: Normalised as the classifier saw them, see `Lpips`.
        """
        features, taps = images, []
        for stage in _STAGES[self.network]:
            if stage.pool is not None:
                features = nn.max_pool(features, (stage.pool, stage.pool), (2, 2))
            for conv in stage.convs:
                features = nn.Conv(
                    conv.features,
                    (conv.kernel, conv.kernel),
                    strides=conv.stride,
                    padding=conv.padding,
                    dtype=self.dtype,
                    name=f"features_{conv.index}",
                )(features)
                features = nn.relu(features)
            taps.append(features)
        return tuple(taps)


class Lpips(nn.Module):
    """The perceptual distance of image pairs; parameters from `interop.perceptual_weights`.

    Attributes:
        network: One of `LPIPS_NETWORKS`.
        dtype: Type of the convolutions; distances and parameters are float32.

    Raises:
        ValueError: The network is unknown.
    """

    network: str = "vgg"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        """Refuses an unknown network before anything is traced."""
        if self.network not in LPIPS_NETWORKS:
            raise ValueError(f"network={self.network!r} must be one of {list(LPIPS_NETWORKS)}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        others: Float[Array, "_ _ _ 3"],
    ) -> Float[Array, " batch"]:
        """Distances, float32; differentiable in both arguments.

        Args:
            images: In [-1, 1], any size from `LPIPS_MIN_SIDES` on.
            others: As many of the same size.

        Raises:
            ValueError: The shapes differ, or the images are too small for the network.
        """
        _check_shapes(self.network, images.shape, others.shape)
        stack = FeatureStack(self.network, self.dtype, name="net")
        shift, scale = jnp.asarray(_SHIFT), jnp.asarray(_SCALE)
        # One pass for each: in one pass over both, a gradient for one would go through both.
        first, second = (stack((x.astype(jnp.float32) - shift) / scale) for x in (images, others))
        distance = jnp.zeros(images.shape[0], jnp.float32)
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            # Ones are the distance before its weights were learnt; published as a 1x1 convolution.
            shape = (1, 1, a.shape[-1], 1)
            weights = self.param(f"lin{number}", nn.initializers.ones, shape, jnp.float32)
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            distance += layer_distance(a, b, weights[0, 0, :, 0])
        return distance


def _check_shapes(network: str, images: tuple[int, ...], others: tuple[int, ...]) -> None:
    """Refuses pairs that have no distance."""
    if images != others:
        raise ValueError(f"images {list(images)} and others {list(others)} must have one shape")
    height, width = images[1:3]
    if min(height, width) < LPIPS_MIN_SIDES[network]:
        raise ValueError(
            f"images of {height}x{width} are too small for network={network!r}: both sides must "
            f"be at least {LPIPS_MIN_SIDES[network]}"
        )
