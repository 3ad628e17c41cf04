"""One of several processes with a sample hook: hook_process.py ADDRESS COUNT INDEX WORKDIR.

The parameters of the tiny model lie on a mesh over all processes. What each pipeline is given is
compared with them leaf by leaf; its pictures are functions of prompt and seed, so that nothing has
to be compiled.
"""

import pathlib
import sys
import types

import jax
import numpy as np
from PIL import Image

from nextstep_jax.evaluation.hooks import ReconstructionHook, SampleHook, sampling_params
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import VAE
from nextstep_jax.parallel import sharding
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.pipeline import NextStepPipeline
from nextstep_jax.training.metrics import MetricsWriter
from tests import tiny_model

PROMPTS = ("a red circle", "a blue square", "a cat", "nothing", "five words are enough here")
PIXELS = np.random.default_rng([4]).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)


class Pipe(NextStepPipeline):
    """Paints the seed and the length of the prompt; counts."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, seed, batch_size, guidance_scale):
        self.calls.append(list(seed))
        colours = [
            (40 * s, 7 * len(p), 20 * int(guidance_scale))
            for p, s in zip(prompts, seed, strict=True)
        ]
        return types.SimpleNamespace(images=[Image.new("RGB", (32, 32), c) for c in colours])


def shared(tree, shardings):
    """Arrays that every process knows whole, laid over all of them."""

    def place(x, target):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def main(address, count, index, workdir):
    """Runs both hooks once."""
    workdir = pathlib.Path(workdir)
    if int(count) > 1:
        jax.distributed.initialize(address, int(count), int(index))
    model = NextStep(tiny_model.CONFIG)
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = shared(tiny_model.params(), sharding.tree_shardings(boxed, mesh))
    vae = tiny_model.vae_params()
    vae = shared(vae, jax.tree.map(lambda _: sharding.replicated(mesh), vae))
    pipe = Pipe()

    def make_pipeline(params):
        gathered, local = sampling_params(model, params)
        assert local.devices.size == jax.local_device_count()
        assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(gathered))
        wanted = tiny_model.unrolled_params()
        jax.tree.map(np.testing.assert_array_equal, gathered, jax.device_get(wanted))
        return pipe

    writer = MetricsWriter(workdir, 0, 10, "test")
    hooks = [
        SampleHook(workdir, make_pipeline, prompts=PROMPTS, guidance_scales=(1.0, 3.0)),
        ReconstructionHook(workdir, VAE(tiny_model.VAE_CONFIG), PIXELS),
    ]
    for hook, tree in zip(hooks, (params, vae), strict=True):
        hook(10, types.SimpleNamespace(params=tree, ema=None), writer)
    writer.close()
    (workdir / f"calls-{index}").write_text(repr(pipe.calls))


if __name__ == "__main__":
    main(*sys.argv[1:])
