"""An image tokenizer for the built-in world, small enough for a laptop.

    python launch/train_tokenizer.py --config=configs/shapes_tokenizer.py:easy --workdir=runs/tok

The argument is the level of the world, easy, pairs or full, and, after a dash, the side of the
images if not the default (32 for easy, 64 for the others): full-32.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "easy") -> ConfigDict:
    """The experiment."""
    level, _, size = argument.partition("-")
    image_size = int(size or (32 if level == "easy" else 64))
    return ConfigDict(
        {
            # Flux-shaped, f8c16, with few channels where the images are large: on a CPU the
            # full-resolution convolutions are most of the time.
            "vae": {
                "channels": 8,
                "channel_multipliers": (1, 2, 4, 8),
                "num_res_blocks": 1,
                "num_groups": 4,
            },
            "tokenizer": {"image_size": image_size, "batch_size": 16, "num_threads": 1},
            "source": {"type": "shapes", "kind": "pair", "level": level},
            "optimizer": {
                "learning_rate": 3e-3,
                "schedule": "cosine",
                "warmup_steps": 100,
                "weight_decay": 0.0,
                "ema_decay": 0.998,
            },
            "loop": {
                "num_steps": 3000,
                "checkpoint_every": 1000,
                "log_every": 20,
                "hook_every": 1000,
            },
            "dtype": "float32",
        }
    )
