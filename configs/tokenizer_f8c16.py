r"""The published recipe: Flux's VAE fine-tuned into the tokenizer of NextStep-1 (84M parameters).

    python launch/train_tokenizer.py --config=configs/tokenizer_f8c16.py:images:photos \
        --config.init_from=FLUX.1-dev/vae --workdir=runs/f8c16 \
        --config.tokenizer.perceptual_backbone=vgg16-397923af.pth \
        --config.tokenizer.perceptual_linear=lpips/weights/v0.1/vgg.pth

The argument names the source: images:PATH (no captions needed), folder:PATH, records:PATH (with
pixels), shapes:LEVEL or photographs. Paper (arXiv 2508.10711): initial weights, both losses,
optimizer, schedule, batch, steps, gamma. Ours, as nothing is published: the weights of the
losses, the network of the perceptual term, the crops, the moving average, weight decay.

To train the decoder alone, as the released standalone tokenizer was:
--config.optimizer.frozen='("encoder/*",)'. Without LPIPS' files:
--config.tokenizer.perceptual=gradient. From scratch: leave init_from empty, and expect to need a
higher rate (3e-4) and more steps.
"""

import dataclasses

from ml_collections import ConfigDict

from nextstep_jax.data.source_types import source_values
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.training.experiment import (
    defaults,
    loop_defaults,
    optimizer_defaults,
)
from nextstep_jax.training.tokenizer import TokenizerConfig


def get_config(source: str = "images:photos") -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        {
            # Flux's shape; scale 1, shift 0, deterministic, normalised over 2x2 tokens.
            "vae": dataclasses.asdict(VAEConfig()),
            "init_from": "",
            "tokenizer": defaults(
                TokenizerConfig,
                image_size=256,
                batch_size=512,
                random_crop=True,
                random_flip=True,
                noise_gamma=0.5,
                perceptual="vgg",
                num_threads=16,
            ),
            "sources": {"images": source_values(source)},
            "optimizer": optimizer_defaults(
                learning_rate=1e-5,
                schedule="constant",
                warmup_steps=1000,
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.0,
                ema_decay=0.999,
                frozen=(),
            ),
            "loop": loop_defaults(
                num_steps=50_000, checkpoint_every=1000, log_every=20, hook_every=1000
            ),
            "dtype": "bfloat16",
            # A batch of 512 keeps its activations on few devices only if they are computed twice.
            "remat": True,
        }
    )
