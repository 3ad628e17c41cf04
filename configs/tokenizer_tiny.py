"""An image tokenizer from scratch in twenty minutes on two CPU cores: f8c16, 0.7M parameters.

    export JAX_NUM_CPU_DEVICES=2  # half a batch a core: a quarter faster than one device
    python launch/train_tokenizer.py --config=configs/tokenizer_tiny.py --workdir=runs/tiny
    python launch/evaluate.py --task=tokenizer --tokenizer=runs/tiny

It learns the built-in world at its full level and, so that it knows more than flat colours, crops
of photographs (pip install nextstep_jax[photographs]). No weights of a perceptual network are
needed: the gradients of the image at two scales stand in for them.
"""

import dataclasses

from ml_collections import ConfigDict

from nextstep_jax.models.config import VAEConfig
from nextstep_jax.training.experiment import defaults, loop_defaults, optimizer_defaults
from nextstep_jax.training.tokenizer import TokenizerConfig


def get_config() -> ConfigDict:
    """The experiment."""
    # Few channels where the images are large: there the convolutions take most of the time. One
    # group, because two channels a group forget an image's mean colour in every norm.
    vae = VAEConfig(channels=8, channel_multipliers=(1, 2, 4, 8), num_res_blocks=1, num_groups=1)
    return ConfigDict(
        {
            "vae": dataclasses.asdict(vae),
            "tokenizer": defaults(
                TokenizerConfig, image_size=64, batch_size=16, l2_weight=1.0, num_threads=1
            ),
            "sources": {
                "shapes": {"type": "shapes", "kind": "pair", "level": "full", "weight": 1.0},
                # Harder than the world, which is learned on the way.
                "photographs": {"type": "photographs", "weight": 2.0},
            },
            "optimizer": optimizer_defaults(
                name="muon",
                learning_rate=6e-3,
                schedule="cosine",
                warmup_steps=50,
                weight_decay=0.0,
                ema_decay=0.998,
            ),
            "loop": loop_defaults(
                num_steps=3000, checkpoint_every=600, log_every=20, hook_every=600
            ),
            "dtype": "float32",
        }
    )
