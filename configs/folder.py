"""NextStep on your own photographs: a folder of images with .txt captions beside them.

    python launch/train.py --config=configs/folder.py:photos --tokenizer=runs/tok --workdir=runs/me

The argument is the folder. The size is that of a workstation GPU; on a CPU make it smaller, for
example --config.model.size=tiny --config.image_size=64 --config.data.row_length=256.
"""

from ml_collections import ConfigDict

from nextstep_jax.training.experiment import (
    data_defaults,
    defaults,
    layout_defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.pretrain import LossConfig


def get_config(folder: str = "photos") -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        {
            "image_size": 256,
            # The text tokenizer is trained on the captions; its special tokens come first.
            "model": {
                "size": "tiny",
                "decoder": {
                    "embed_dim": 768,
                    "num_layers": 12,
                    "num_heads": 12,
                    "num_kv_heads": 4,
                    "head_dim": 64,
                    "mlp_dim": 2048,
                    "vocab_size": 8192,
                },
                "flow_head": {"width": 1024, "num_layers": 6},
            },
            "sources": {"photos": {"type": "folder", "root": folder, "weight": 1.0}},
            "data": data_defaults(
                row_length=4096,
                rows_per_batch=4,
                num_threads=2,
            ),
            # Every image goes to the nearest of 17 shapes unless square_only says otherwise.
            "layout": layout_defaults(),
            "loss": defaults(LossConfig),
            "optimizer": optimizer_defaults(
                learning_rate=3e-4,
                schedule="cosine",
                warmup_steps=1000,
                ema_decay=0.999,
            ),
            "loop": loop_defaults(
                num_steps=50_000,
                checkpoint_every=1000,
                log_every=20,
                hook_every=2000,
            ),
            "sampling": {"preset": "plain", "guidance_scale": 3.0},
            # Captions drawn every `loop.hook_every` steps; none: the first of the folder.
            "score": {"prompts": (), "guidance_scales": (3.0,)},
            "dtype": "float32",
            "attention": "xla",
            "remat": "none",
        }
    )
