"""A real run in a process of its own: tiny_run.py SPEC WORKDIR [ADDRESS COUNT INDEX].

With an address, one of COUNT processes that train together.

SPEC is a JSON file {"config": experiment, "vae_params": path of a `save_tree`}. The metrics get a
checksum of the batch that the step has read, latents included, and the bytes-only tokenizer is
used, so that nothing is trained before.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import flags

from nextstep_jax.data import text_tokenizer
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE
from nextstep_jax.training import experiment, loop
from nextstep_jax.training.checkpoint import load_tree
from nextstep_jax.training.logs import set_up_logging


def checksum(batch):
    """24 bits of all bits of a batch and their places, exact as a float32."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(batch):
        # Narrow integers as wide ones; all others have 32 bits.
        leaf = leaf.astype(jnp.int32) if leaf.dtype.itemsize < 4 else leaf
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        total = total * jnp.uint32(31) + jnp.sum(bits * odd)
    return (total & jnp.uint32(0xFFFFFF)).astype(jnp.float32)


def main(spec_path, workdir, address=None, count=1, index=0):
    """Runs, or continues, until the configured number of steps."""
    if address is not None:
        jax.distributed.initialize(address, int(count), int(index))
    set_up_logging()
    flags.FLAGS.mark_as_parsed()
    spec = json.loads(pathlib.Path(spec_path).read_text())
    vae = VAE(experiment.build(VAEConfig, spec["vae"], "vae"))
    tokenizer = text_tokenizer.train_bpe([], len(text_tokenizer.SPECIAL_TOKENS) + 256)
    task, loop_config = experiment.build_nextstep_task(
        spec["config"], vae, load_tree(spec["vae_params"]), tokenizer
    )
    plain_loss = task.loss

    def loss(params, batch, key):
        value, metrics = plain_loss(params, batch, key)
        return value, {**metrics, "batch": checksum(batch)}

    task.loss = loss
    loop.run(task, loop_config, workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
