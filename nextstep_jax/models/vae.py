"""The image autoencoder.

NextStep-1 (arXiv 2508.10711), section on the image tokenizer: a Flux-shaped VAE with 8-fold
downsampling and 16 channels, whose latent is normalised and folded into tokens (`latents.py`). The
mathematics are free functions; the modules declare parameters under the published tensor names,
with underscores for the dots between a level and its blocks (`encoder.down.0.block.1.norm1` is
`encoder/down_0_block_1/norm1`).

Words for axes: images are (batch, height, width, channels) in [-1, 1]; latents are (batch, rows,
columns, latent); tokens are (batch, tokens, token) with token = (c, p, q), where p and q are the
row and the column inside a patch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.latents import depth_to_space, latents_of, space_to_depth

# Uniform in +-1/sqrt(fan_in), the default of the framework that the original is written in. The
# paper trains from Flux's weights, so that no initialiser is published; zero biases are ours.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# Pixels.


def to_uint8(
    images: Float[Array | np.ndarray, "... height width channels"],
) -> UInt8[Array, "... height width channels"]:
    """Pixels in 0 ... 255 from images in [-1, 1]; values outside are clamped."""
    unit = jnp.clip(jnp.asarray(images, jnp.float32) / 2 + 0.5, 0.0, 1.0)
    return jnp.round(unit * 255).astype(jnp.uint8)


def from_uint8(
    pixels: UInt8[Array | np.ndarray, "... height width channels"],
) -> Float[Array, "... height width channels"]:
    """Images in [-1, 1], float32, from pixels in 0 ... 255."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0


# Layers.


def group_norm(
    features: Float[Array, "batch height width channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    num_groups: int,
    eps: float,
) -> Float[Array, "batch height width channels"]:
    """GroupNorm (Wu and He, arXiv 1803.08494) over space and adjacent channels.

    Computed in float32, in two passes: the one-pass form E[x^2] - E[x]^2 cancels when a group's
    mean is large against its spread.

    Raises:
        ValueError: The channels do not divide into the groups.
    """
    channels = features.shape[-1]
    if channels % num_groups:
        raise ValueError(f"channels={channels} must be a multiple of num_groups={num_groups}")

    def group_mean(x):
        # Over space first: the channels stay whole, which compilers vectorise.
        mean = jnp.mean(x, axis=(1, 2)).reshape(x.shape[0], num_groups, -1).mean(axis=-1)
        return jnp.repeat(mean, channels // num_groups, axis=1)[:, None, None]

    centered = features.astype(jnp.float32)
    centered -= group_mean(centered)
    normalized = centered * jax.lax.rsqrt(group_mean(jnp.square(centered)) + eps)
    return (normalized * scale + bias).astype(features.dtype)


def spatial_attention(
    query: Float[Array, "batch height width channels"],
    key: Float[Array, "batch height width channels"],
    value: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height width channels"]:
    """Single-head attention of every pixel to every pixel, logits scaled by 1/sqrt(channels)."""
    batch, height, width, channels = query.shape
    heads = (batch, height * width, 1, channels)
    attended = jax.nn.dot_product_attention(
        query.reshape(heads), key.reshape(heads), value.reshape(heads)
    )
    return attended.reshape(query.shape)


def upsample_nearest(
    features: Float[Array, "batch height width channels"],
) -> Float[Array, "batch doubled_height doubled_width channels"]:
    """Repeats every pixel into a 2x2 block."""
    return features.repeat(2, axis=1).repeat(2, axis=2)


def _silu(features: Array) -> Array:
    """SiLU, rounded once: in bfloat16 its two factors would be rounded apart."""
    return nn.silu(features.astype(jnp.float32)).astype(features.dtype)


def _conv(features: int, kernel_size: int, dtype: DTypeLike, name: str, **more) -> nn.Conv:
    """A convolution that keeps the size, unless `more` says otherwise."""
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        padding=more.pop("padding", kernel_size // 2),
        kernel_init=_kernel_init,
        dtype=dtype,
        name=name,
        **more,
    )


class GroupNorm(nn.Module):
    """Parameters of `group_norm`.

    Attributes:
        config: The autoencoder's configuration.
    """

    config: VAEConfig

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Normalises; see `group_norm`."""
        scale = self.param("scale", nn.initializers.ones, features.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, features.shape[-1:])
        return group_norm(features, scale, bias, self.config.num_groups, self.config.norm_eps)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut.

    Attributes:
        config: The autoencoder's configuration.
        channels: Channels of the result; the shortcut is a 1x1 convolution where they change.
        dtype: Type of the computation; parameters are float32.
    """

    config: VAEConfig
    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width out"]:
        """Returns features of the same size with `channels` channels."""
        hidden = _silu(GroupNorm(self.config, name="norm1")(features))
        hidden = _conv(self.channels, 3, self.dtype, "conv1")(hidden)
        hidden = _silu(GroupNorm(self.config, name="norm2")(hidden))
        hidden = _conv(self.channels, 3, self.dtype, "conv2")(hidden)
        if features.shape[-1] != self.channels:
            features = _conv(self.channels, 1, self.dtype, "nin_shortcut")(features)
        return features + hidden


class AttentionBlock(nn.Module):
    """Residual single-head self-attention over all pixels.

    Attributes:
        config: The autoencoder's configuration.
        dtype: Type of the computation; parameters are float32.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Returns features of the same shape."""
        channels = features.shape[-1]
        hidden = GroupNorm(self.config, name="norm")(features)
        # 1x1 convolutions rather than dense layers: the published tensors are 4-dimensional.
        query, key, value = (_conv(channels, 1, self.dtype, name)(hidden) for name in "qkv")
        attended = spatial_attention(query, key, value)
        return features + _conv(channels, 1, self.dtype, "proj_out")(attended)


def _middle(config: VAEConfig, channels: int, dtype: DTypeLike, features: Array) -> Array:
    """The blocks at the lowest resolution; called inside a compact method."""
    features = ResidualBlock(config, channels, dtype, name="mid_block_1")(features)
    features = AttentionBlock(config, dtype, name="mid_attn_1")(features)
    return ResidualBlock(config, channels, dtype, name="mid_block_2")(features)


class Downsample(nn.Module):
    """Halves both sides by a convolution with stride 2.

    Attributes:
        dtype: Type of the computation; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch half_height half_width channels"]:
        """Pads on the right and below only, so that output pixel i starts at input pixel 2i."""
        conv = _conv(features.shape[-1], 3, self.dtype, "conv", strides=2, padding=((0, 1), (0, 1)))
        return conv(features)


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution.

    Attributes:
        dtype: Type of the computation; parameters are float32.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch doubled_height doubled_width channels"]:
        """Returns features of twice the size."""
        return _conv(features.shape[-1], 3, self.dtype, "conv")(upsample_nearest(features))


class Encoder(nn.Module):
    """Images to the mean and log-variance of the latent.

    Attributes:
        config: The autoencoder's configuration.
        dtype: Type of the computation; parameters are float32.
        remat: The backward pass computes each residual block again instead of keeping it.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns moments"]:
        """Returns [mean, log-variance] along the last axis."""
        config, dtype = self.config, self.dtype
        widths = [config.channels * m for m in config.channel_multipliers]
        block_cls = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        features = _conv(config.channels, 3, dtype, "conv_in")(images)
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks):
                name = f"down_{level}_block_{block}"
                features = block_cls(config, width, dtype, name=name)(features)
            if level < len(widths) - 1:
                features = Downsample(dtype, name=f"down_{level}_downsample")(features)
        features = _middle(config, widths[-1], dtype, features)
        features = _silu(GroupNorm(config, name="norm_out")(features))
        return _conv(2 * config.latent_channels, 3, dtype, "conv_out")(features)


class Decoder(nn.Module):
    """Latents to images.

    Attributes:
        config: The autoencoder's configuration.
        dtype: Type of the computation; parameters are float32.
        remat: See `Encoder`.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, latents: Float[Array, "batch rows columns latent"]
    ) -> Float[Array, "batch height width channels"]:
        """Returns images, not clamped."""
        config, dtype = self.config, self.dtype
        widths = [config.channels * m for m in config.channel_multipliers]
        block_cls = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        features = _conv(widths[-1], 3, dtype, "conv_in")(latents)
        features = _middle(config, widths[-1], dtype, features)
        # Levels are numbered by resolution, level 0 being the images', so that they run backwards.
        for level, width in reversed(list(enumerate(widths))):
            for block in range(config.num_res_blocks + 1):
                name = f"up_{level}_block_{block}"
                features = block_cls(config, width, dtype, name=name)(features)
            if level > 0:
                features = Upsample(dtype, name=f"up_{level}_upsample")(features)
        features = _silu(GroupNorm(config, name="norm_out")(features))
        return _conv(config.in_channels, 3, dtype, "conv_out")(features)


class VAE(nn.Module):
    """The autoencoder with its normalisation and its scaling constants.

    Every method takes and returns float32; `dtype` is the type of the convolutions between.

    Attributes:
        config: The configuration.
        dtype: Type of the computation; parameters are float32.
        remat: See `Encoder`.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self):
        """Declares both halves."""
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        self.decoder = Decoder(self.config, self.dtype, self.remat)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """The reconstruction from the latent's mean, not clamped."""
        return self.decode(self.encode(images))

    def encode_moments(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns moments"]:
        """The encoder's [mean, log-variance] along the last axis, before any normalisation.

        Raises:
            ValueError: The sides of the images are off the latent's grid, or off the patches of
                the normalisation.
        """
        self._check_images(images, self.config.norm_patch_size or 1)
        return self.encoder(images).astype(jnp.float32)

    def encode(
        self,
        images: Float[Array, "batch height width channels"],
        noise: Float[Array, "batch rows columns latent"] | None = None,
    ) -> Float[Array, "batch rows columns latent"]:
        """Latents, normalised as the configuration says, without shift and scale.

        Args:
            images: In [-1, 1].
            noise: Standard normal. With it the latents are a sample, unless the configuration is
                deterministic; without it they are the mean.
        """
        return latents_of(self.config, self.encode_moments(images), noise)

    def decode(
        self, latents: Float[Array, "batch rows columns latent"]
    ) -> Float[Array, "batch height width channels"]:
        """Images from latents as `encode` gives them, not clamped.

        Raises:
            ValueError: The latents have another number of channels than the configuration.
        """
        if latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels, "
                f"latent_channels={self.config.latent_channels} are needed"
            )
        return self.decoder(latents).astype(jnp.float32)

    def encode_tokens(
        self,
        images: Float[Array, "batch height width channels"],
        patch_size: int = 2,
        noise: Float[Array, "batch rows columns latent"] | None = None,
    ) -> Float[Array, "batch tokens token"]:
        """The model's image tokens: shifted and scaled latents, folded by `space_to_depth`.

        Args:
            images: In [-1, 1].
            patch_size: Latent pixels along one side of a token.
            noise: See `encode`.

        Raises:
            ValueError: The sides of the images are off the token grid.
        """
        self._check_images(images, patch_size)
        latents = self.encode(images, noise)
        latents = (latents - self.config.shift_factor) * self.config.scaling_factor
        return space_to_depth(latents, patch_size)

    def decode_tokens(
        self,
        tokens: Float[Array, "batch tokens token"],
        grid: tuple[int, int],
        patch_size: int = 2,
    ) -> Float[Array, "batch height width channels"]:
        """Images from tokens on a `grid` of (rows, columns), not clamped; undoes `encode_tokens`.

        Raises:
            ValueError: See `depth_to_space`.
        """
        latents = depth_to_space(tokens, grid, patch_size, self.config.latent_channels)
        return self.decode(latents / self.config.scaling_factor + self.config.shift_factor)

    def _check_images(self, images: Array, patch_size: int) -> None:
        _, height, width, channels = images.shape
        if channels != self.config.in_channels:
            raise ValueError(
                f"images have {channels} channels, in_channels={self.config.in_channels} are needed"
            )
        side = self.config.downsampling * patch_size
        if height % side or width % side:
            raise ValueError(
                f"image height and width must be multiples of {side} (downsampling="
                f"{self.config.downsampling} x patch_size={patch_size}), not {height}x{width}"
            )
