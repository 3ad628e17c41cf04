"""CLIP: images and texts as vectors of one space, and aesthetic heads on the images' vectors.

CLIP (Radford et al., arXiv 2103.00020) is two transformers with layer norm in front of every
sublayer: one over the patches of an image and a class token, read at the class token; one over
text with a causal mask, read at the end token. Each is followed by a projection, and the cosine of
two projections says how well image and text agree. The training images of NextStep-1 (arXiv
2508.10711, section 3) were filtered by such scores. The weights are a user's own files
(`interop.clip_weights`).

Words for axes: images are (batch, height, width, 3), normalised as the weights want them; tokens
are (batch, length); hidden states (batch, length, width); embeddings (batch, embed).
"""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(1.702 x), the approximation of GELU that the first CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), with Phi the normal distribution function; later CLIPs."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
}
"""The activations of the feed-forward layers, by their published names."""

AESTHETIC_WIDTHS: Mapping[str, tuple[int, ...]] = {
    "linear": (1,),
    "mlp": (1024, 128, 64, 16, 1),
}
"""The published heads: one linear layer, or five with nothing but dropout between them."""


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One transformer.

    Attributes:
        width: Of the hidden states; a multiple of `num_heads`.
        mlp_dim: Width inside the feed-forward layers.
        num_layers: How many layers.
        num_heads: Of the attention.
        activation: One of `ACTIVATIONS`.
        eps: Of the layer norms.

    Raises:
        ValueError: The heads do not divide the width, or the activation is unknown.
    """

    width: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        """Checks what does not fit together."""
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {sorted(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The shape of a CLIP.

    Attributes:
        vision: The transformer over patches.
        text: The transformer over text.
        embed_dim: Width of the space that both are projected to.
        image_size: Side of the square images, in pixels.
        patch_size: Side of a patch, in pixels.
        vocab_size: Text tokens.
        context_length: Tokens of a text, padding included.
        end_id: The token where a text is read, at its first occurrence; None reads at the largest
            id, as the first release did, whose end token was the last of its vocabulary.

    Raises:
        ValueError: The patches do not divide the image.
    """

    vision: TowerConfig
    text: TowerConfig
    embed_dim: int
    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49408
    context_length: int = 77
    end_id: int | None = None

    def __post_init__(self):
        """Checks what does not fit together."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} must divide image_size={self.image_size}"
            )


def unit_vectors(x: Float[Array, "*shape embed"]) -> Float[Array, "*shape embed"]:
    """x / |x|, in float32. A vector of zeros has no direction and becomes NaN."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def cosine(
    x: Float[Array, "*shape embed"], y: Float[Array, "*shape embed"]
) -> Float[Array, "*shape"]:
    """The cosine of the angle between two vectors: of image and text, what CLIP was trained on."""
    return jnp.sum(unit_vectors(x) * unit_vectors(y), axis=-1)


def end_index(token_ids: Int[Array, "batch length"], end_id: int | None) -> Int[Array, " batch"]:
    """Where each text is read; see `ClipConfig.end_id`."""
    # argmax takes the first of equals, so that padding with the end token does not matter.
    return jnp.argmax(token_ids if end_id is None else token_ids == end_id, axis=-1)


class Layer(nn.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x).

    Attributes:
        config: Of the transformer.
        is_causal: Whether a token sees only itself and those before it.
        dtype: Of the computation.
    """

    config: TowerConfig
    is_causal: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        """Applies the layer."""
        config = self.config
        x = _norm("norm_1", config.eps, self.dtype)(hidden)
        heads = (*x.shape[:2], config.num_heads, config.width // config.num_heads)
        q, k, v = (self._dense(f"{p}_proj", config.width)(x).reshape(heads) for p in "qkv")
        # Softmax of q k / sqrt(head_dim).
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.is_causal)
        hidden += self._dense("out_proj", config.width)(attended.reshape(x.shape))
        x = _norm("norm_2", config.eps, self.dtype)(hidden)
        x = ACTIVATIONS[config.activation](self._dense("mlp_in", config.mlp_dim)(x))
        return hidden + self._dense("mlp_out", config.width)(x)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name)


class VisionTower(nn.Module):
    """Images to hidden states of the class token, normalised.

    Attributes:
        config: Of the whole CLIP.
        dtype: Of the computation.
    """

    config: ClipConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch width_of_tower"]:
        """Runs the transformer over a class token and the patches, row by row."""
        config, tower = self.config, self.config.vision
        window, init = (config.patch_size,) * 2, nn.initializers.normal(0.02)
        patches = nn.Conv(
            tower.width,
            window,
            strides=window,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embed",
        )(images.astype(self.dtype))
        hidden = patches.reshape(patches.shape[0], -1, tower.width)
        class_token = self.param("class_embed", init, (tower.width,)).astype(self.dtype)
        first = jnp.broadcast_to(class_token, (hidden.shape[0], 1, tower.width))
        hidden = jnp.concatenate([first, hidden], axis=1)
        positions = self.param("position_embed", init, hidden.shape[1:])
        hidden = hidden + positions.astype(self.dtype)
        hidden = _norm("pre_norm", tower.eps, self.dtype)(hidden)
        for number in range(tower.num_layers):
            hidden = Layer(tower, False, self.dtype, name=f"layers_{number}")(hidden)
        return _norm("post_norm", tower.eps, self.dtype)(hidden[:, 0])


class TextTower(nn.Module):
    """Texts to hidden states of their end tokens, normalised.

    Attributes:
        config: Of the whole CLIP.
        dtype: Of the computation.
    """

    config: ClipConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, token_ids: Int[Array, "batch length"]) -> Float[Array, "batch width"]:
        """Runs the transformer; what stands behind the end token has no influence."""
        config, tower = self.config, self.config.text
        init = nn.initializers.normal(0.02)
        tokens = self.param("token_embed", init, (config.vocab_size, tower.width))
        positions = self.param("position_embed", init, (config.context_length, tower.width))
        hidden = (tokens[token_ids] + positions[: token_ids.shape[1]]).astype(self.dtype)
        for number in range(tower.num_layers):
            hidden = Layer(tower, True, self.dtype, name=f"layers_{number}")(hidden)
        ends = end_index(token_ids, config.end_id)
        hidden = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        return _norm("final_norm", tower.eps, self.dtype)(hidden)


class Clip(nn.Module):
    """Both towers and their projections; parameters from `interop.clip_weights`.

    Attributes:
        config: Its shape.
        dtype: Of the computation; parameters and embeddings are float32.
    """

    config: ClipConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Declares the towers and the projections, which have no bias."""
        self.vision = VisionTower(self.config, self.dtype)
        self.text = TextTower(self.config, self.dtype)
        options = {"use_bias": False, "dtype": self.dtype}
        self.vision_proj = nn.Dense(self.config.embed_dim, **options)
        self.text_proj = nn.Dense(self.config.embed_dim, **options)

    def __call__(
        self,
        images: Float[Array, "images height width 3"],
        token_ids: Int[Array, "texts length"],
    ) -> tuple[Float[Array, "images embed"], Float[Array, "texts embed"]]:
        """Embeddings of images and of texts."""
        return self.embed_images(images), self.embed_texts(token_ids)

    def embed_images(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch embed"]:
        """Embeddings of images, float32, of any length.

        Raises:
            ValueError: The images are not of the config's size.
        """
        side = self.config.image_size
        if images.shape[1:] != (side, side, 3):
            raise ValueError(f"images {list(images.shape)} must be [batch, {side}, {side}, 3]")
        return self.vision_proj(self.vision(images)).astype(jnp.float32)

    def embed_texts(self, token_ids: Int[Array, "batch length"]) -> Float[Array, "batch embed"]:
        """Embeddings of texts, float32, of any length.

        Raises:
            ValueError: The texts are longer than the context.
        """
        if token_ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"{token_ids.shape[1]} tokens are more than"
                f" context_length={self.config.context_length}"
            )
        return self.text_proj(self.text(token_ids)).astype(jnp.float32)


class AestheticHead(nn.Module):
    """How good an image looks to people, from about 1 to 10, out of its CLIP embedding.

    Of the published heads on ViT-L/14, `linear` is one linear layer and `mlp` a chain of five,
    without activations between them: together again a linear function.

    Attributes:
        form: One of `AESTHETIC_WIDTHS`.
    """

    form: str

    @nn.compact
    def __call__(self, embeddings: Float[Array, "batch embed"]) -> Float[Array, " batch"]:
        """Scores; embeddings of any length, which are normalised as in training."""
        x = unit_vectors(embeddings)
        for number, width in enumerate(AESTHETIC_WIDTHS[self.form]):
            x = nn.Dense(width, name=f"layers_{number}")(x)
        return x[:, 0]


def _norm(name: str, eps: float, dtype: DTypeLike) -> nn.LayerNorm:
    """A layer norm whose variance is the mean of squared deviations, not a difference of means."""
    return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)
