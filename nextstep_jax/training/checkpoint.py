"""Checkpoints: one object with everything a run is made of, through Orbax.

The only file that knows Orbax. A checkpoint holds the train state, the position of the data
iterator, the clock (time and samples so far) and the full configuration. Saving is asynchronous:
what blocks is the copy to the host.
"""

import dataclasses
import gc
import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nextstep_jax.data.pipeline import check_fingerprint

_STATE, _DATASET = "state", "dataset"
# Orbax's note on a checkpoint as a whole; a folder without it was not finished.
_METADATA_FILE = "_CHECKPOINT_METADATA"
# Replicas of an array share the writing only where a share is worth it: each is a slice that has
# to be compiled, which for a model of small arrays takes longer than all the writing. Ours.
_LEAST_BYTES_OF_A_SHARE = 2**20
# Orbax's name for a tree that is still being written in parts.
_PARTIAL_SUFFIX = ".partial_save"
# Long lists in an error message help nobody.
_MAX_LISTED = 10


@dataclasses.dataclass
class Clock:
    """How far a run has come.

    Attributes:
        seconds: Wall time spent training, over all restarts.
        samples: Documents or images trained on.
    """

    seconds: float = 0.0
    samples: int = 0


@dataclasses.dataclass
class Checkpoint:
    """Everything a run is made of.

    Attributes:
        state: The train state; to restore, an abstract one with shardings.
        dataset: A Grain iterator; restored in place.
        clock: See `Clock`.
        config: The experiment as plain values.
        fingerprint: What the order of the data depends on; a resume with another is refused.
    """

    state: Any
    dataset: Any
    clock: Clock
    config: dict[str, Any]
    fingerprint: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        """Opens or makes the folder; the newest `keep` checkpoints stay."""
        directory = pathlib.Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            context=_saving(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._pending = None

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        latest = _latest(self._checkpointer)
        return None if latest is None else latest.step

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Starts writing; returns once the state is copied, so that it may be donated."""
        self.wait()
        metadata = {
            "clock": dataclasses.asdict(checkpoint.clock),
            "config": checkpoint.config,
            "fingerprint": checkpoint.fingerprint,
        }
        items = {_STATE: checkpoint.state, _DATASET: checkpoint.dataset}
        # The loop decides when; Orbax shall neither decline nor stumble over an unfinished folder.
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            items,
            force=True,
            overwrite=True,
            custom_metadata=json.loads(json.dumps(metadata)),
        )

    def restore(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The newest checkpoint on the shardings of `checkpoint.state`, or None if there is none.

        Raises:
            ValueError: The data pipeline would not continue where it stopped, or the parameters
                have other names or shapes; the message lists what differs.
        """
        latest = _latest(self._checkpointer)
        if latest is None:
            return None
        found = ocp.metadata(latest.path, _STATE)
        metadata = found.custom_metadata
        check_fingerprint(metadata["fingerprint"], json.loads(json.dumps(checkpoint.fingerprint)))
        _check_shapes(found.metadata, checkpoint.state, latest.path)
        items = {_STATE: checkpoint.state, _DATASET: checkpoint.dataset}
        loaded = self._checkpointer.load_checkpointables(latest.step, items)
        clock = Clock(**metadata["clock"])
        return dataclasses.replace(checkpoint, state=loaded[_STATE], clock=clock)

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Waits and releases the folder."""
        self.wait()
        self._checkpointer.close()


def _saving() -> ocp.Context:
    """How arrays are written."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_BYTES_OF_A_SHARE
    return context


def _latest(checkpointer: ocp.training.Checkpointer) -> Any:
    """The newest finished checkpoint, or None; Orbax also lists a copy that broke off."""
    finished = [c for c in checkpointer.checkpoints if (c.path / _METADATA_FILE).exists()]
    return finished[-1] if finished else None


def _check_shapes(saved: Any, state: Any, path: Any) -> None:
    """Compares names and shapes of parameters and average before Orbax reads any of them."""

    def shapes(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
        return dict(zip(names, (tuple(leaf.shape) for _, leaf in leaves), strict=True))

    before = shapes({name: saved.get(name) for name in ("params", "ema")})
    now = shapes({"params": state.params, "ema": state.ema})
    differing = [
        f"{name}: saved {before.get(name, 'nothing')}, now {now.get(name, 'nothing')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if differing:
        more = f" and {len(differing) - _MAX_LISTED} more" if len(differing) > _MAX_LISTED else ""
        listed = "; ".join(differing[:_MAX_LISTED]) + more
        raise ValueError(f"checkpoint {path} does not fit the configuration: {listed}")


class StoredParams:
    """Parameters on disk, to be read whole or in parts.

    Attributes:
        abstract: A tree of `jax.ShapeDtypeStruct`.
        step: The training step they are of, if known.
    """

    def __init__(self, path: Any, prefix: tuple[str, ...] = (), step: int | None = None):
        """Opens a tree that `save_tree` wrote, or with a prefix a part of a checkpoint."""
        self._path, self._prefix, self.step = path, prefix, step
        # Of the state alone: an iterator has no metadata, and Orbax would warn of that.
        tree = ocp.metadata(self._path, _STATE).metadata
        for key in prefix:
            tree = tree[key]
        self.abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def load(self, abstract: Any = None) -> Any:
        """Reads parameters.

        Args:
            abstract: The tree or a part of it, as leaves with the dtype and the sharding that they
                shall have, where they have one; by default all, as it is on disk. Without a
                sharding a leaf goes to the default device.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device),
            self.abstract if abstract is None else abstract,
        )
        for key in reversed(self._prefix):
            tree = {key: tree}
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            tree = ocp.load_checkpointables(self._path, {_STATE: tree})[_STATE]
        for key in self._prefix:
            tree = tree[key]
        return tree


def stored_params(directory: pathlib.Path, *, ema: bool = True) -> StoredParams:
    """The parameters of the newest checkpoint of a run.

    Args:
        directory: The folder given to `CheckpointStore`.
        ema: Prefer the moving average where the run kept one.

    Raises:
        FileNotFoundError: There is no finished checkpoint.
    """
    directory = pathlib.Path(directory).absolute()
    checkpointer = ocp.training.Checkpointer(directory) if directory.is_dir() else None
    latest = None if checkpointer is None else _latest(checkpointer)
    if latest is None:
        raise FileNotFoundError(f"no finished checkpoint in {directory}")
    with checkpointer:
        average = ocp.metadata(latest.path, _STATE).metadata.get("ema")
        name = "ema" if ema and average else "params"
        return StoredParams(latest.path, (name,), latest.step)


def load_params(directory: pathlib.Path, *, ema: bool = True) -> tuple[Any, int]:
    """The parameters of the newest checkpoint, on the default device, and its step.

    Args:
        directory: The folder given to `CheckpointStore`.
        ema: Prefer the moving average where the run kept one.

    Raises:
        FileNotFoundError: There is no finished checkpoint.
    """
    stored = stored_params(directory, ema=ema)
    return stored.load(), stored.step


def save_tree(directory: pathlib.Path, tree: Any) -> None:
    """Writes a tree of arrays once, replacing what was there."""
    with _saving():
        ocp.save(pathlib.Path(directory).absolute(), tree, overwrite=True)


def save_tree_in_parts(directory: pathlib.Path, parts: Iterable[Any]) -> None:
    """Writes a tree of which only a part is in memory at a time; what `save_tree` would write.

    Args:
        directory: Must not be there yet, and is not until the last part is written.
        parts: Trees whose union is the tree.
    """
    directory = pathlib.Path(directory).absolute()
    # Orbax would go on with what a killed run left, and keep its parts.
    shutil.rmtree(directory.with_name(directory.name + _PARTIAL_SUFFIX), ignore_errors=True)
    for part in parts:
        with _saving():
            ocp.partial.save(directory, part)
        # Else it would stay until the next one is there; Orbax leaves it in reference cycles.
        del part
        gc.collect()
    ocp.partial.finalize(directory)


def load_tree(directory: pathlib.Path) -> Any:
    """Reads what `save_tree` wrote, on the default device."""
    return StoredParams(pathlib.Path(directory).absolute()).load()
