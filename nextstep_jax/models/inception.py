"""Inception v3 up to its pooled features, over which FID is computed.

The reconstruction FID of NextStep-1's image tokenizer (arXiv 2508.10711) compares statistics of
these 2048 features (Szegedy et al., arXiv 1512.00567; Heusel et al., arXiv 1706.08500). There are
two networks of that name: "fid", the TensorFlow graph that published FIDs are computed with, in
pytorch-fid's form, and "torchvision", trained anew there. They differ in their weights and in three
kinds of pooling. The weights are a user's own file (`interop.perceptual_weights`); parameters have
the published names of modules, with one level for a convolution and its normalisation.

Words for axes: images are (batch, height, width, 3) in [-1, 1]; features are (batch, rows, columns,
channels).
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

INCEPTION_VARIANTS = ("fid", "torchvision")
"""The networks called Inception v3, see the head of the file."""

INPUT_SIDE = 299
"""Side of the square that every image is resized to."""

_NORM_EPS = 1e-3


class _Conv(NamedTuple):
    """A convolution without bias, batch normalisation and ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class _Pool(NamedTuple):
    """A 3x3 pool: "average" keeps the size and is the variant's own, "max" too, "halve" is max."""

    kind: str


# One after another; a tuple inside a branch are convolutions side by side.
_Branch = tuple[_Conv | _Pool | tuple[_Conv, ...], ...]
_Block = tuple[_Branch, ...]


def _block_a(pool_features: int) -> _Block:
    """Mixed_5: 35x35."""
    return (
        (_Conv("branch1x1", 64),),
        (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5))),
        (
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, (3, 3)),
            _Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (_Pool("average"), _Conv("branch_pool", pool_features)),
    )


def _block_b() -> _Block:
    """Mixed_6a: 35x35 to 17x17."""
    return (
        (_Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, (3, 3)),
            _Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
        (_Pool("halve"),),
    )


def _block_c(inner: int) -> _Block:
    """Mixed_6b ... e: 17x17, 7x7 convolutions as pairs of a row and a column."""
    return (
        (_Conv("branch1x1", 192),),
        (
            _Conv("branch7x7_1", inner),
            _Conv("branch7x7_2", inner, (1, 7)),
            _Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            _Conv("branch7x7dbl_1", inner),
            _Conv("branch7x7dbl_2", inner, (7, 1)),
            _Conv("branch7x7dbl_3", inner, (1, 7)),
            _Conv("branch7x7dbl_4", inner, (7, 1)),
            _Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (_Pool("average"), _Conv("branch_pool", 192)),
    )


def _block_d() -> _Block:
    """Mixed_7a: 17x17 to 8x8."""
    return (
        (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            _Conv("branch7x7x3_1", 192),
            _Conv("branch7x7x3_2", 192, (1, 7)),
            _Conv("branch7x7x3_3", 192, (7, 1)),
            _Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
        (_Pool("halve"),),
    )


def _block_e(pool: str) -> _Block:
    """Mixed_7b and c: 8x8."""
    return (
        (_Conv("branch1x1", 320),),
        (
            _Conv("branch3x3_1", 384),
            (_Conv("branch3x3_2a", 384, (1, 3)), _Conv("branch3x3_2b", 384, (3, 1))),
        ),
        (
            _Conv("branch3x3dbl_1", 448),
            _Conv("branch3x3dbl_2", 384, (3, 3)),
            (_Conv("branch3x3dbl_3a", 384, (1, 3)), _Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (_Pool(pool), _Conv("branch_pool", 192)),
    )


_STEM: _Branch = (
    _Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    _Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _Pool("halve"),
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    _Pool("halve"),
)


def _blocks(variant: str) -> Mapping[str, _Block]:
    """The blocks after the stem, by their published names."""
    return {
        "Mixed_5b": _block_a(32),
        "Mixed_5c": _block_a(64),
        "Mixed_5d": _block_a(64),
        "Mixed_6a": _block_b(),
        "Mixed_6b": _block_c(128),
        "Mixed_6c": _block_c(160),
        "Mixed_6d": _block_c(160),
        "Mixed_6e": _block_c(192),
        "Mixed_7a": _block_d(),
        "Mixed_7b": _block_e("average"),
        # The graph behind published FIDs has a maximum here, alone among all copies.
        "Mixed_7c": _block_e("max" if variant == "fid" else "average"),
    }


def resize_bilinear(
    images: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch {side} {side} channels"]:
    """Images as squares: bilinear between pixel centres, clamped at the edges, no antialiasing.

    That is what pytorch-fid does to its input, although it aliases when it shrinks.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        # In float64: an error in the position times the slope of the image is one in the value.
        position = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
        lower = np.floor(position).astype(int)
        weight = (position - lower).reshape(-1, *[1] * (3 - axis))
        below = jnp.take(images, lower, axis)
        above = jnp.take(images, np.minimum(lower + 1, size - 1), axis)
        images = below + (above - below) * weight.astype(images.dtype)
    return images


def batch_norm(
    features: Float[Array, "*shape channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    mean: Float[Array, " channels"],
    variance: Float[Array, " channels"],
) -> Float[Array, "*shape channels"]:
    """Batch normalisation with the statistics of training (arXiv 1502.03167, algorithm 2)."""
    return (features - mean) * (scale / jnp.sqrt(variance + _NORM_EPS)) + bias


class ConvBlock(nn.Module):
    """Parameters of a convolution and the normalisation after it; all are float32.

    Attributes:
        conv: Its features, window, stride and padding.
    """

    conv: _Conv

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns out"]:
        """Convolution, normalisation, ReLU."""
        conv, (ones, zeros) = self.conv, (nn.initializers.ones, nn.initializers.zeros)
        shape = (*conv.kernel, features.shape[-1], conv.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        hidden = jax.lax.conv_general_dilated(
            features,
            kernel,
            (conv.stride, conv.stride),
            conv.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        scale = self.param("scale", ones, (conv.features,))
        bias = self.param("bias", zeros, (conv.features,))
        mean = self.param("mean", zeros, (conv.features,))
        variance = self.param("var", ones, (conv.features,))
        return nn.relu(batch_norm(hidden, scale, bias, mean, variance))


class InceptionBlock(nn.Module):
    """Branches side by side, concatenated over the channels.

    Attributes:
        branches: What each does.
        count_padding: Whether an average at the edge is over nine pixels, zeros outside.
    """

    branches: _Block
    count_padding: bool

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns out"]:
        """Returns the features of all branches."""
        return jnp.concatenate(
            [_run(branch, features, self.count_padding) for branch in self.branches], axis=-1
        )


class Inception(nn.Module):
    """The network of FID, up to the mean over the last features.

    Attributes:
        variant: One of `INCEPTION_VARIANTS`; which one fits a file, `read_inception` says.

    Raises:
        ValueError: The variant is unknown.
    """

    variant: str = "fid"

    def __post_init__(self):
        """Refuses an unknown variant before anything is traced."""
        if self.variant not in INCEPTION_VARIANTS:
            raise ValueError(f"variant={self.variant!r} must be one of {list(INCEPTION_VARIANTS)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch 2048"]:
        """Features of images of any size, in [-1, 1], which are resized to 299x299.

        Both variants see the resized images as they are. "fid" scales its input from [0, 1] to
        [-1, 1]; "torchvision" expects ImageNet's mean and deviation taken out, and with its
        weights (`transform_input`) begins by putting them back and scaling to [-1, 1], which
        comes to the same. The usual crop of torchvision's classifiers is not made.
        """
        features = resize_bilinear(images.astype(jnp.float32), INPUT_SIDE)
        count_padding = self.variant == "torchvision"
        features = _run(_STEM, features, count_padding)
        for name, branches in _blocks(self.variant).items():
            features = InceptionBlock(branches, count_padding, name=name)(features)
        return jnp.mean(features, axis=(1, 2))


def _run(branch: _Branch, features: Array, count_padding: bool) -> Array:
    """One layer after another; called inside a compact method."""
    for layer in branch:
        match layer:
            case _Conv():
                features = ConvBlock(layer, name=layer.name)(features)
            case _Pool("average"):
                features = nn.avg_pool(
                    features, (3, 3), padding="SAME", count_include_pad=count_padding
                )
            case _Pool("max"):
                features = nn.max_pool(features, (3, 3), padding="SAME")
            case _Pool("halve"):
                features = nn.max_pool(features, (3, 3), (2, 2))
            case _:
                features = jnp.concatenate(
                    [ConvBlock(conv, name=conv.name)(features) for conv in layer], axis=-1
                )
    return features
