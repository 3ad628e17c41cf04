"""NextStep on your own photographs: a folder of images with .txt captions beside them.

    python launch/train.py --config=configs/folder.py:photos --tokenizer=runs/tok --workdir=runs/me

The argument is the folder. The size is that of a workstation GPU; on a CPU make it smaller, for
example --config.model.size=tiny --config.image_size=64 --config.data.row_length=256.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def get_config(folder: str = "photos") -> ConfigDict:
    """The experiment."""
    image_size = FieldReference(256)
    row_length = FieldReference(4096)
    return ConfigDict(
        {
            "image_size": image_size,
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
            "data": {
                "row_length": row_length,
                "rows_per_batch": 4,
                # Every image goes to the nearest of 17 shapes unless square_only says otherwise.
                "square_only": True,
                "max_images_per_row": 16,
                "num_threads": 2,
            },
            "loss": {"text_chunk": 512},
            "optimizer": {
                "learning_rate": 3e-4,
                "schedule": "cosine",
                "warmup_steps": 1000,
                "ema_decay": 0.999,
            },
            "loop": {
                "num_steps": 50_000,
                "checkpoint_every": 1000,
                "log_every": 20,
                "hook_every": 2000,
            },
            "sampling": {"preset": "plain", "guidance_scale": 3.0},
            "dtype": "float32",
        }
    )
