"""An image tokenizer for your own photographs: a folder of images with .txt captions beside them.

    python launch/train_tokenizer.py --config=configs/folder_tokenizer.py:photos --workdir=runs/tok

The argument is the folder. This is the released tokenizer's shape (f8c16, 84M parameters) and the
paper's recipe at 256x256, meant for a GPU; on a CPU make it smaller, for example
--config.vae.channels=32 --config.tokenizer.image_size=64 --config.tokenizer.batch_size=8.
"""

from ml_collections import ConfigDict

from nextstep_jax.training.experiment import defaults, loop_defaults, optimizer_defaults
from nextstep_jax.training.tokenizer import TokenizerConfig


def get_config(folder: str = "photos") -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        {
            "vae": {
                "channels": 128,
                "channel_multipliers": (1, 2, 4, 4),
                "num_res_blocks": 2,
                "num_groups": 32,
            },
            "tokenizer": defaults(
                TokenizerConfig,
                image_size=256,
                batch_size=32,
                l2_weight=1.0,
                random_crop=True,
                random_flip=True,
            ),
            "sources": {"folder": {"type": "folder", "root": folder}},
            # The paper fine-tunes Flux's weights at 1e-5; from scratch a higher rate is ours.
            "optimizer": optimizer_defaults(
                learning_rate=1e-4,
                schedule="constant",
                warmup_steps=1000,
                weight_decay=0.0,
                ema_decay=0.999,
            ),
            "loop": loop_defaults(
                num_steps=50_000,
                checkpoint_every=1000,
                log_every=20,
                hook_every=1000,
            ),
            "dtype": "float32",
        }
    )
