"""One of several processes that encode a batch together: one_of_two.py ADDRESS COUNT INDEX IN OUT.

IN is an npz of pixels (rows, images, 32, 32, 3) and the parameters of the image tokenizer.
"""

import sys

import jax
import numpy as np

from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.training import loop, reporting
from nextstep_jax.training.batch_encoding import BatchEncoder

LENGTH = 30


def local_batch(pixels, rows):
    """The batch of some rows, the tokens of image k from position 3 + 5 k on."""
    num_images = pixels.shape[1]
    places = [
        [row * LENGTH + 3 + 5 * k + np.arange(4) for k in range(num_images)]
        for row in range(len(rows))
    ]
    return {
        "token_ids": np.full((len(rows), LENGTH), 7, np.int32) + np.array(rows)[:, None],
        "images": {"32x32": np.concatenate([pixels[row] for row in rows])},
        "image_slots": {"32x32": np.concatenate(places).astype(np.int32)},
    }


def main(address, count, index, source, out):
    """Encodes the process's rows; keeps what its devices then hold."""
    count, index = int(count), int(index)
    jax.distributed.initialize(address, count, index)
    values = np.load(source)
    params = {}
    for name in values.files:
        if "/" in name:
            *path, leaf = name.split("/")
            node = params
            for key in path:
                node = node.setdefault(key, {})
            node[leaf] = values[name]
    vae = VAE(VAEConfig(channels=4, channel_multipliers=(1, 2, 2, 2), num_groups=2))
    pixels = values["pixels"]
    each = len(pixels) // count
    batch = local_batch(pixels, range(index * each, (index + 1) * each))
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    with jax.transfer_guard("disallow"):
        latents = BatchEncoder(vae, params, 2, 1)(mesh, batch)
        ids = loop.to_device(mesh, {"token_ids": batch["token_ids"]})["token_ids"]
    found = {"total": reporting.sum_over_processes(np.array([2**40 + index, 7], np.int64))}
    for name, array in (("latents", latents), ("ids", ids)):
        for shard in array.addressable_shards:
            start = shard.index[0].indices(len(pixels))[0]
            found[f"{name}-{start}-{shard.device.id}"] = np.asarray(shard.data)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
