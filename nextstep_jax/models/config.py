"""Configurations of the networks, and the tables of sizes.

Frozen dataclasses, hashable, so that a module and a jitted function can hold them as static
values. The published values are those of NextStep-1 (arXiv 2508.10711): a Qwen2.5-14B shaped
decoder and the flow head of the paper's Table 6. The other decoder sizes are the Qwen2.5 family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The causal transformer, Qwen2.5 shape.

    Attributes:
        vocab_size: Rows of the embedding and of the LM head.
        embed_dim: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; query head h reads kv head h // (heads / kv_heads).
        head_dim: Width of a head; it need not be embed_dim / num_heads.
        mlp_dim: Hidden width of the gated MLP.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Added to the mean square inside RMSNorm.
        qkv_bias: Biases on the query, key and value projections.
        out_bias: Bias on the attention output projection.
        mlp_bias: Biases on the three MLP projections.
        tie_embeddings: The LM head is the embedding transposed.
        initializer_range: Standard deviation of the initial weights.
    """

    vocab_size: int = 152_064
    embed_dim: int = 5120
    num_layers: int = 48
    num_heads: int = 40
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 13_824
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = True
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        """Checks what the attention needs."""
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for RoPE")


@dataclasses.dataclass(frozen=True)
class FlowHeadConfig:
    """The velocity network that turns a hidden state into an image token (Table 6).

    Attributes:
        width: Width of the residual stream.
        num_layers: Number of AdaLN blocks.
        mlp_ratio: Hidden width of a block's MLP over `width`.
        frequency_dim: Width of the sinusoid of the time.
        max_period: Longest period of the sinusoid; the time is in [0, 1] and not scaled.
        norm_eps: Epsilon of the LayerNorms.
        draws_per_token: Times and noises drawn for a token in a training step (fm_head_batch_mul).
    """

    width: int = 1536
    num_layers: int = 12
    mlp_ratio: float = 1.0
    frequency_dim: int = 256
    max_period: float = 10_000.0
    norm_eps: float = 1e-6
    draws_per_token: int = 4


LATENT_NORMS = ("token", "channel")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The image autoencoder, Flux shape.

    Attributes:
        in_channels: Channels of an image.
        channels: Width at full resolution.
        channel_multipliers: Width of each resolution level over `channels`.
        num_res_blocks: Residual blocks of an encoder level; a decoder level has one more.
        latent_channels: Channels of the latent.
        num_groups: Groups of the GroupNorms; every level's width must be a multiple.
        norm_eps: Epsilon of the GroupNorms.
        scaling_factor: Tokens are (latent - shift_factor) * scaling_factor.
        shift_factor: See `scaling_factor`.
        deterministic: The encoder yields its mean; otherwise a sample is drawn.
        norm_patch_size: The latent is normalised, without gain or bias, over the values of each
            patch of this side: 2 is the published token norm, 1 normalises the channels of each
            latent pixel, None leaves the latent alone.
        norm_over: What one mean and one variance are taken over: "token", the values of a patch
            (what was released), or "channel", each channel over all pixels of the image (a
            wording of the paper; for comparison).
        latent_norm_eps: Epsilon of that normalisation.
    """

    in_channels: int = 3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    num_groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    deterministic: bool = True
    norm_patch_size: int | None = 2
    norm_over: str = "token"
    latent_norm_eps: float = 1e-6

    def __post_init__(self):
        """Checks the groups and the norm."""
        _require(
            self.norm_over in LATENT_NORMS,
            f"norm_over={self.norm_over!r} is unknown; choose from {list(LATENT_NORMS)}",
        )
        _require(
            self.norm_over == "token" or self.norm_patch_size is not None,
            f"norm_over={self.norm_over!r} with norm_patch_size=None, which is no norm at all",
        )
        _require(
            self.channels % self.num_groups == 0,
            f"channels={self.channels} must be a multiple of num_groups={self.num_groups}",
        )

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class NextStepConfig:
    """The unified model: decoder, flow head, projectors and the ids that join them.

    Attributes:
        decoder: The causal transformer.
        flow_head: The velocity network.
        latent_channels: Channels of the image tokenizer's latent.
        patch_size: Latent pixels along one side of an image token.
        downsampling: Pixels along one side of a latent pixel.
        bos_id: Begin of text; the same id as `eos_id` in the released tokenizer.
        eos_id: End of text.
        pad_id: Padding.
        image_area_id: Opens the size string ("rows*cols") in front of an image.
        boi_id: Begin of image.
        eoi_id: End of image.
        image_placeholder_id: Stands where an image token is.
        use_gen_pos_embed: Adds a fixed 2D sincos to the hidden states that image tokens are
            sampled from.
        base_image_grid_size: Side of the grid of that 2D sincos.
    """

    decoder: DecoderConfig = DecoderConfig()
    flow_head: FlowHeadConfig = FlowHeadConfig()
    latent_channels: int = 16
    patch_size: int = 2
    downsampling: int = 8
    bos_id: int = 151_643
    eos_id: int = 151_643
    pad_id: int = 151_665
    image_area_id: int = 151_666
    boi_id: int = 151_667
    eoi_id: int = 151_668
    image_placeholder_id: int = 151_669
    use_gen_pos_embed: bool = False
    base_image_grid_size: int = 32

    def __post_init__(self):
        """Checks that every special id has a row in the embedding."""
        for name in ("bos_id", "eos_id", "pad_id", "image_area_id", "boi_id", "eoi_id"):
            self._check_id(name)
        self._check_id("image_placeholder_id")

    def _check_id(self, name: str) -> None:
        value, size = getattr(self, name), self.decoder.vocab_size
        _require(0 <= value < size, f"{name}={value} must lie in [0, vocab_size={size})")

    @property
    def token_dim(self) -> int:
        """Values of an image token."""
        return self.latent_channels * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Pixels along one side of an image token."""
        return self.downsampling * self.patch_size


def _qwen(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more) -> DecoderConfig:
    return DecoderConfig(
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        **more,
    )


# Qwen2.5 shapes; `tiny` is ours, for laptops and tests.
DECODERS: dict[str, DecoderConfig] = {
    "tiny": _qwen(192, 4, 6, 2, 512, head_dim=32, vocab_size=512),
    "0.5b": _qwen(896, 24, 14, 2, 4864, head_dim=64, vocab_size=151_936, tie_embeddings=True),
    "1.5b": _qwen(1536, 28, 12, 2, 8960, vocab_size=151_936, tie_embeddings=True),
    "3b": _qwen(2048, 36, 16, 2, 11_008, vocab_size=151_936, tie_embeddings=True),
    "7b": _qwen(3584, 28, 28, 4, 18_944),
    "14b": _qwen(5120, 48, 40, 8, 13_824),
}

# Table 6 of the paper; `tiny` is ours.
FLOW_HEADS: dict[str, FlowHeadConfig] = {
    "tiny": FlowHeadConfig(width=256, num_layers=3),
    "s": FlowHeadConfig(width=1024, num_layers=6),
    "b": FlowHeadConfig(width=1536, num_layers=12),
    "l": FlowHeadConfig(width=2048, num_layers=24),
}

# The released model pairs 14b with b; the other pairs are ours.
_HEAD_OF_SIZE = {"tiny": "tiny", "0.5b": "s", "1.5b": "s", "3b": "s", "7b": "b", "14b": "b"}

# The text tokenizers that we train (data/text_tokenizer.py) put the special tokens first.
_TINY_IDS = dict(
    bos_id=0, eos_id=0, pad_id=1, image_area_id=2, boi_id=3, eoi_id=4, image_placeholder_id=5
)


def nextstep_config(size: str = "14b", head: str | None = None) -> NextStepConfig:
    """The configuration of a named size.

    Args:
        size: A key of `DECODERS`.
        head: A key of `FLOW_HEADS`; by default the one that goes with the size.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
    """
    _require(size in DECODERS, f"size={size!r} is unknown; choose from {list(DECODERS)}")
    head = head or _HEAD_OF_SIZE[size]
    _require(head in FLOW_HEADS, f"head={head!r} is unknown; choose from {list(FLOW_HEADS)}")
    ids = _TINY_IDS if size == "tiny" else {}
    return NextStepConfig(decoder=DECODERS[size], flow_head=FLOW_HEADS[head], **ids)


def to_dict(config: NextStepConfig | VAEConfig) -> dict[str, Any]:
    """A configuration as plain values, for JSON."""
    return dataclasses.asdict(config)


def nextstep_from_dict(values: Mapping[str, Any]) -> NextStepConfig:
    """The inverse of `to_dict` for a `NextStepConfig`; unknown keys raise a TypeError."""
    values = dict(values)
    values["decoder"] = DecoderConfig(**values["decoder"])
    values["flow_head"] = FlowHeadConfig(**values["flow_head"])
    return NextStepConfig(**values)


def vae_from_dict(values: Mapping[str, Any]) -> VAEConfig:
    """The inverse of `to_dict` for a `VAEConfig`; unknown keys raise a TypeError."""
    values = dict(values)
    # JSON knows lists only, and a config has to be hashable.
    values["channel_multipliers"] = tuple(values["channel_multipliers"])
    return VAEConfig(**values)
