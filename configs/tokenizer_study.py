"""The study of noise and normalisation of the latent at small size: docs/tokenizer.md.

    python launch/tokenizer_study.py --workdir=runs/study

A cell of the study is a name such as norm-0.5 or plain-0.5: with the token norm or without, and
the gamma of equation 3. This is the tokenizer's experiment; `get_model_config` is that of the
model on its latents.
"""

import dataclasses

from ml_collections import ConfigDict

from nextstep_jax.models.config import VAEConfig
from nextstep_jax.training.experiment import (
    data_defaults,
    defaults,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig
from nextstep_jax.training.tokenizer import TokenizerConfig

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0)
NORMS = ("plain", "norm")
# f4c4 at 32x32: as many values a pixel as f8c16, and 16 tokens an image, enough for a drift along
# the sequence to show.
IMAGE_SIZE = 32
_ROW_LENGTH = 256


def cells() -> list[str]:
    """Every cell, those of one gamma side by side."""
    return [f"{norm}-{gamma:g}" for gamma in GAMMAS for norm in NORMS]


def get_config(cell: str = "norm-0.5") -> ConfigDict:
    """The tokenizer of a cell.

    Raises:
        ValueError: Another norm than "norm" or "plain", or gamma is no number.
    """
    norm, _, gamma = cell.partition("-")
    if norm not in NORMS:
        raise ValueError(f"cell {cell!r} must be one of {cells()}, or another gamma")
    vae = VAEConfig(
        channels=8,
        channel_multipliers=(1, 2, 4),
        num_res_blocks=1,
        num_groups=1,
        latent_channels=4,
        norm_patch_size=2 if norm == "norm" else None,
    )
    return ConfigDict(
        {
            "vae": dataclasses.asdict(vae),
            "tokenizer": defaults(
                TokenizerConfig,
                image_size=IMAGE_SIZE,
                batch_size=16,
                noise_gamma=float(gamma),
                l2_weight=1.0,
                num_threads=1,
            ),
            "sources": {
                "shapes": {"type": "shapes", "kind": "pair", "level": "easy", "weight": 3.0},
                "photographs": {"type": "photographs", "weight": 1.0},
            },
            "optimizer": optimizer_defaults(
                name="muon",
                learning_rate=6e-3,
                schedule="cosine",
                warmup_steps=50,
                weight_decay=0.0,
                ema_decay=0.995,
            ),
            "loop": loop_defaults(
                num_steps=600, checkpoint_every=300, log_every=20, hook_every=600
            ),
            "dtype": "float32",
        }
    )


def get_model_config(records: str) -> ConfigDict:
    """The model on the latents in a folder of records."""
    return ConfigDict(
        {
            "image_size": IMAGE_SIZE,
            "model": {
                "size": "tiny",
                "latent_channels": 4,
                "downsampling": 4,
                "flow_head": {"draws_per_token": 2},
            },
            "sources": {"shapes": {"type": "records", "root": records}},
            "data": data_defaults(
                row_length=_ROW_LENGTH, rows_per_batch=2, latents=True, num_threads=1
            ),
            "layout": layout_defaults(square_only=True, capitalize_prob=0.0),
            "loss": defaults(LossConfig, text_chunk=_ROW_LENGTH),
            "optimizer": optimizer_defaults(
                learning_rate=2e-3, schedule="cosine", warmup_steps=100, ema_decay=0.998
            ),
            "loop": loop_defaults(num_steps=900, checkpoint_every=450, log_every=20),
            "sampling": {"preset": "plain", "guidance_scale": 2.0},
            "score": {"level": "easy"},
            "dtype": "float32",
        }
    )
