"""An image tokenizer for the built-in world, small enough for a laptop.

    python launch/train_tokenizer.py --config=configs/shapes_tokenizer.py:easy --workdir=runs/tok

The argument is the level of the world, easy, pairs or full, and, after a dash, the side of the
images if not the default (32 for easy, 64 for the others): full-32.
"""

import dataclasses

from ml_collections import ConfigDict

from nextstep_jax.data.shapes import level_and_size
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.training.experiment import defaults, loop_defaults, optimizer_defaults
from nextstep_jax.training.tokenizer import TokenizerConfig


def get_config(argument: str = "easy") -> ConfigDict:
    """The experiment."""
    level, image_size = level_and_size(argument)
    # Flux-shaped, f8c16, with few channels where the images are large: on a CPU the
    # full-resolution convolutions are most of the time.
    vae = VAEConfig(channels=8, channel_multipliers=(1, 2, 4, 8), num_res_blocks=1, num_groups=4)
    return ConfigDict(
        {
            "vae": dataclasses.asdict(vae),
            "tokenizer": defaults(
                TokenizerConfig,
                image_size=image_size,
                batch_size=16,
                l2_weight=1.0,
                num_threads=1,
            ),
            "sources": {"shapes": {"type": "shapes", "kind": "pair", "level": level}},
            "optimizer": optimizer_defaults(
                learning_rate=3e-3,
                schedule="cosine",
                warmup_steps=100,
                weight_decay=0.0,
                ema_decay=0.998,
            ),
            "loop": loop_defaults(
                num_steps=3000, checkpoint_every=1000, log_every=20, hook_every=1000
            ),
            "dtype": "float32",
        }
    )
