"""Peak host memory of importing a published checkpoint, on a random one that is made for it.

Each import runs in a process of its own, whose peak resident memory the kernel knows (VmHWM). On a
CPU the parameters that a process keeps lie in the same memory and are taken off; a conversion
keeps none.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from nextstep_jax.interop.huggingface import abstract_model, abstract_vae
from nextstep_jax.interop.published_config import model_to_published
from nextstep_jax.interop.published_vae_config import vae_to_published
from nextstep_jax.interop.tensor_map import Slot, nextstep_slots, vae_slots
from nextstep_jax.interop.tensor_writer import SafetensorsWriter
from nextstep_jax.interop.tensors import TensorInfo
from nextstep_jax.models.config import FLOW_HEADS, DecoderConfig, NextStepConfig, VAEConfig

# The shape of a layer, and of what stands beside the layers; ours.
_WIDTH, _MLP_DIM, _VOCAB_SIZE = 1536, 6144, 152_064
_REPORT = "PEAK "
# Runs in a fresh interpreter. VmHWM, unlike getrusage, is of this program alone.
_CHILD = """
import pathlib, sys
import jax
from nextstep_jax.interop import convert, huggingface
from nextstep_jax.parallel.mesh import make_mesh
what, folder, out = sys.argv[1:4]
devices = jax.devices()
mesh = make_mesh({"fsdp": -1}) if len(devices) > 1 else None
kept = 0
if what != "nothing":
    model = huggingface.open_model(pathlib.Path(folder))
if what == "convert":
    vae = huggingface.open_vae(pathlib.Path(folder) / "vae")
    convert.import_model(model, vae, pathlib.Path(out), mesh=mesh)
if what == "load":
    groups = list(model.stream(scan_layers=False, mesh=mesh))
    kept = sum(array.nbytes for group in groups for array in group.values())
status = pathlib.Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print("PEAK", peak * 1024, kept)
"""


def random_checkpoint(directory: pathlib.Path, config: NextStepConfig, num_shards: int = 5) -> int:
    """Writes a random float32 model with a small image tokenizer.

    Returns:
        Bytes of the largest stacked parameter.
    """
    abstract = nn.unbox(abstract_model(config))
    slots = nextstep_slots(abstract)
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract))
    _write(directory, slots, model_to_published(config), -(-total // num_shards))
    vae = VAEConfig(channels=32, num_res_blocks=1)
    _write(directory / "vae", vae_slots(abstract_vae(vae)), vae_to_published(vae), total)
    return max(4 * leaf.size for leaf in jax.tree.leaves(abstract))


def sized_config(gigabytes: float) -> NextStepConfig:
    """A model with as many layers as make about this many gigabytes of float32."""

    def size(num_layers):
        decoder = DecoderConfig(
            vocab_size=_VOCAB_SIZE,
            embed_dim=_WIDTH,
            num_layers=num_layers,
            num_heads=12,
            num_kv_heads=2,
            mlp_dim=_MLP_DIM,
        )
        return NextStepConfig(decoder=decoder, flow_head=FLOW_HEADS["tiny"])

    def num_bytes(config):
        return sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_model(config)))

    one, two = num_bytes(size(1)), num_bytes(size(2))
    return size(max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1))


def _write(
    directory: pathlib.Path, slots: list[Slot], values: dict[str, Any], max_shard_size: int
) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    infos = {slot.name: TensorInfo(slot.shape, np.dtype(np.float32)) for slot in slots}
    rng = np.random.default_rng([0])
    with SafetensorsWriter(directory, infos, max_shard_size=max_shard_size) as writer:
        for slot in slots:
            writer.write(slot.name, 0.02 * rng.standard_normal(slot.shape, np.float32))


def measure(what: str, checkpoint: pathlib.Path, out: pathlib.Path, num_devices: int) -> dict:
    """Imports in a fresh process with fake devices.

    Args:
        what: "convert" writes a model directory, "load" keeps the parameters on their devices,
            "nothing" only starts.
        checkpoint: Of `random_checkpoint`.
        out: Where to convert to.
        num_devices: CPU devices, over which parameters are sharded.

    Returns:
        Peak resident bytes and bytes of the parameters kept.

    Raises:
        RuntimeError: The process failed; holds the end of its output.
    """
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _CHILD, what, str(checkpoint), str(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith(_REPORT)]
    if ran.returncode or not lines:
        raise RuntimeError(f"{what} failed: {ran.stderr[-2000:]}")
    peak, kept = (int(number) for number in lines[0].split()[1:])
    return {"peak_bytes": peak, "kept_bytes": kept}
