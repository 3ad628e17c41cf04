"""How fast checkpoints are: how long a save blocks training, bytes a second to and from the disk.

The train state of a NextStep-1 shape (arXiv 2508.10711: stacked decoder layers, flow head, both
moments of AdamW) with random values goes through `training.checkpoint.CheckpointStore` and back,
on the mesh it came from and on another. Beside it, in the same rounds, the same arrays as .npy
files, one after another: what the disk does for a plain program.

What blocks is the copy from the devices to the host, of which a CPU has none to make. A save ends
when its files are on the disk (fsync), not in the page cache. Before reading, the
cache is told to forget the files; where a machine's host keeps a copy, that cannot be helped.
"""

import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from nextstep_jax.evaluation.train_speed import first_devices
from nextstep_jax.interop.huggingface import abstract_model
from nextstep_jax.models.config import (
    DECODERS,
    FLOW_HEADS,
    DecoderConfig,
    FlowHeadConfig,
    NextStepConfig,
    nextstep_config,
)
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.training import loop
from nextstep_jax.training.checkpoint import Checkpoint, CheckpointStore, Clock
from nextstep_jax.training.pretrain import LossConfig, NextStepObjective

# Layers as wide as 0.5b's beside a small vocabulary, so that the number of layers sets the size.
_DECODER = dataclasses.replace(DECODERS["0.5b"], vocab_size=32_768, tie_embeddings=False)
# Float32 parameters and two float32 moments of each.
_BYTES_PER_PARAMETER = 12
_STEP = 1

Mesh = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        gigabytes: The least size of the state, in 1e9 bytes.
        mesh: (axis, size) pairs of the mesh that is saved from.
        other_mesh: The mesh that is restored onto besides.
        repeats: Rounds.
        directory: Where the files are made and removed again; None is the temporary folder.
        decoder: Shape of the layers, of which there are as many as make the size.
        flow_head: Shape of the flow head.
    """

    gigabytes: float = 3.0
    mesh: Mesh = (("fsdp", 8),)
    other_mesh: Mesh = (("fsdp", 4), ("tensor", 2))
    repeats: int = 3
    directory: str | None = None
    decoder: DecoderConfig = _DECODER
    flow_head: FlowHeadConfig = FLOW_HEADS["s"]

    def __post_init__(self):
        """Checks the ranges."""
        if not self.gigabytes > 0:
            raise ValueError(f"gigabytes={self.gigabytes} must be positive")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")
        if self.directory is not None and not pathlib.Path(self.directory).is_dir():
            raise ValueError(f"dir={self.directory!r} is not a folder")


def sized_config(setting: Setting) -> NextStepConfig:
    """The model with the fewest layers whose train state has the wanted size."""

    def config(num_layers):
        decoder = dataclasses.replace(setting.decoder, num_layers=num_layers)
        ids = nextstep_config("tiny")
        return dataclasses.replace(ids, decoder=decoder, flow_head=setting.flow_head)

    def size(num_layers):
        leaves = jax.tree.leaves(abstract_model(config(num_layers)))
        return _BYTES_PER_PARAMETER * sum(leaf.size for leaf in leaves)

    one, two = size(1), size(2)
    return config(1 + max(0, math.ceil((setting.gigabytes * 1e9 - one) / (two - one))))


def abstract_state(config: NextStepConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the state that the trainer would hold on a mesh.

    Raises:
        ValueError: There are not enough devices.
    """
    devices = first_devices(math.prod(size for _, size in mesh))
    objective = NextStepObjective(
        NextStep(config), LossConfig(), row_length=16, max_image_tokens=16
    )
    return loop.set_up(objective, loop.LoopConfig(mesh=mesh), devices).abstract


def random_state(abstract: Any, seed: int = 0) -> Any:
    """Normal values for every float leaf, which no compression makes smaller; zeros for others."""

    def fill(number, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(seed), leaf.sharding)

        def part(index):
            starts = [axis.indices(n)[:2] for axis, n in zip(index, leaf.shape, strict=True)]
            shape = [stop - start for start, stop in starts]
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return np.zeros(shape, leaf.dtype)
            rng = np.random.default_rng([27, seed, number, *(start for start, _ in starts)])
            return rng.standard_normal(shape, np.float32)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    leaves, treedef = jax.tree.flatten(abstract)
    return treedef.unflatten([fill(number, leaf) for number, leaf in enumerate(leaves)])


def forget(directory: pathlib.Path) -> bool:
    """Writes all files of a folder to the disk and drops them from the page cache, if that can be.

    Returns:
        Whether the cache was asked to.
    """
    able = hasattr(os, "posix_fadvise")
    for path in filter(pathlib.Path.is_file, directory.rglob("*")):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        if able:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return able


def write_plainly(directory: pathlib.Path, state: Any) -> None:
    """Every array as a file of .npy parts, one a shard, each file synchronised to the disk."""
    directory.mkdir()
    for number, leaf in enumerate(jax.tree.leaves(state)):
        with open(directory / f"{number}.npy", "wb") as file:
            for shard in _plain(leaf).addressable_shards:
                if shard.replica_id == 0:
                    # On a CPU a view: nothing is gathered, and nothing kept.
                    np.save(file, np.asarray(shard.data))
            file.flush()
            os.fsync(file.fileno())


def read_plainly(directory: pathlib.Path) -> int:
    """Reads those files again, one after another; returns the bytes of their arrays."""
    num_bytes = 0
    for path in sorted(directory.glob("*.npy")):
        with open(path, "rb") as file:
            while file.tell() < path.stat().st_size:
                num_bytes += np.load(file).nbytes
    return num_bytes


def _plain(leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Keys as their numbers."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def same(state: Any, other: Any) -> bool:
    """Whether two states hold the same values, bit for bit, on whatever meshes.

    Looks at one leaf at a time: a state may be half of what memory holds.
    """

    def equal(a, b):
        a = _plain(a)
        b = jax.device_put(_plain(b), a.sharding)
        pairs = zip(a.addressable_shards, b.addressable_shards, strict=True)
        return all(np.array_equal(x.data, y.data) for x, y in pairs)

    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(equal(a, b) for a, b in pairs)


def run(setting: Setting) -> dict[str, Any]:
    """Measures; medians over the rounds, and the rounds themselves.

    Raises:
        ValueError: There are not enough devices.
        OSError: The disk is full.
        RuntimeError: What was restored is not what was saved.
    """
    # Before anything runs: only then can a CPU still be given more devices.
    meshes = (setting.mesh, setting.other_mesh)
    first_devices(max(math.prod(size for _, size in mesh) for mesh in meshes))
    config = sized_config(setting)
    abstract, other = (abstract_state(config, mesh) for mesh in meshes)
    state = random_state(abstract)
    num_bytes = sum(_plain(leaf).nbytes for leaf in jax.tree.leaves(state))
    rounds = []
    for turn in range(setting.repeats):
        with tempfile.TemporaryDirectory(dir=setting.directory) as folder:
            rounds.append(_round(pathlib.Path(folder), state, abstract, other, check=turn == 0))
    cold = all([one.pop("cold") for one in rounds])
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    rates = {
        name.removesuffix("_s"): num_bytes / 1e9 / medians[name]
        for name in medians
        if name.endswith("_s") and name != "save_blocking_s"
    }
    return {
        "settings": {
            "gigabytes": setting.gigabytes,
            "mesh": dict(setting.mesh),
            "other_mesh": dict(setting.other_mesh),
            "repeats": setting.repeats,
            "num_layers": config.decoder.num_layers,
            "load_average": os.getloadavg()[0],
        },
        "state_bytes": num_bytes,
        "arrays": len(jax.tree.leaves(state)),
        "page_cache": "dropped before every reading" if cold else "warm",
        "medians": medians,
        "gigabytes_per_s": rates,
        "rounds": rounds,
        # Kilobytes, but bytes on macOS.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def _round(
    folder: pathlib.Path, state: Any, abstract: Any, other: Any, *, check: bool
) -> dict[str, Any]:
    """Seconds of one turn of everything."""

    def checkpoint(tree):
        iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
        return Checkpoint(tree, iterator, Clock(), {}, {})

    figures: dict[str, Any] = {}
    store = CheckpointStore(folder / "store", keep=1)
    began = time.perf_counter()
    store.save(_STEP, checkpoint(state))
    figures["save_blocking_s"] = time.perf_counter() - began
    store.finish()
    figures["cold"] = forget(folder / "store")
    figures["save_s"] = time.perf_counter() - began
    files = [path for path in (folder / "store").rglob("*") if path.is_file()]
    figures["files"] = len(files)
    figures["file_bytes"] = sum(path.stat().st_size for path in files)

    for name, target in (("restore_s", abstract), ("restore_other_mesh_s", other)):
        forget(folder / "store")
        restored, figures[name] = _timed(lambda target=target: store.restore(checkpoint(target)))
        _release()
        if check and not same(state, restored.state):
            raise RuntimeError(f"{name.removesuffix('_s')}: other values than were saved")
        del restored
        _release()
    store.close()

    _release()
    plain = folder / "plain"
    _, figures["numpy_save_s"] = _timed(lambda: write_plainly(plain, state))
    forget(plain)
    _, figures["numpy_load_s"] = _timed(lambda: read_plainly(plain))
    return figures


def _release() -> None:
    """Gives freed memory back to the system: an allocator that keeps it would need it twice."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Linux with glibc.


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = function()
    jax.block_until_ready(getattr(result, "state", None))
    return result, time.perf_counter() - began
