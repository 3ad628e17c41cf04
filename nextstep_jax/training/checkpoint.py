"""Checkpoints: one object with everything a run is made of, through Orbax.

The only file that knows Orbax. A checkpoint holds the train state, the position of the data
iterator, the clock (time and samples so far) and the full configuration. Saving is asynchronous:
what blocks is the copy to the host.

Of several processes each writes its part, and all of them call everything here, in the same order.
A save counts when every part is on disk. One that fails, as on a full disk, is logged and does not
end the run; the one before stays, and the next is tried as ever.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from nextstep_jax.data.pipeline import check_fingerprint
from nextstep_jax.parallel import distributed

_STATE, _DATASET = "state", "dataset"
# Orbax's note on a checkpoint as a whole; a folder without it was not finished.
_METADATA_FILE = "_CHECKPOINT_METADATA"
# Replicas of an array share the writing only where a share is worth it: each is a slice that has
# to be compiled, which for a model of small arrays takes longer than all the writing. Ours.
_LEAST_BYTES_OF_A_SHARE = 2**20
# Orbax's name for a tree that is still being written in parts.
_PARTIAL_SUFFIX = ".partial_save"
# For how long the processes that have written their parts wait for the others'; more than a slow
# disk needs. As late is it known that another process's part has failed. Ours.
SAVE_SECONDS = 300
# Orbax's errors carry the history of the file system.
_LONGEST_REASON = 300
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


class SaveError(OSError):
    """The last checkpoint of a run could not be written."""


class CheckpointStore:
    """The checkpoints of one run, in a folder of their own.

    Attributes:
        num_failed: Saves that have failed since the store was opened.
        last_save: Step of the last save that is on disk, and seconds from its beginning to there.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        """Opens or makes the folder; the newest `keep` checkpoints stay, half-written ones go."""
        self._directory, self._keep = pathlib.Path(directory).absolute(), keep
        self._directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer, self._pending = self._open(), None
        self._failure: str | None = None
        self.num_failed = 0
        self.last_save: tuple[int, float] | None = None

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._directory,
            context=_saving(),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

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
        self._failure, began = None, time.monotonic()
        try:
            # The loop decides when; Orbax shall neither decline nor stumble over an unfinished
            # folder.
            response = self._checkpointer.save_checkpointables_async(
                step,
                items,
                force=True,
                overwrite=True,
                custom_metadata=json.loads(json.dumps(metadata)),
            )
        except Exception as error:
            if distributed.is_active():
                raise  # The others are in the middle of it and would wait for this process.
            self._failed(step, error)
            return
        response.on_complete(lambda _: self._saved(step, time.monotonic() - began))
        self._pending = (step, response)

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
        """Blocks until the last save is on disk, or has failed in one of the processes."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        error = None
        try:
            response.result()
        except Exception as raised:
            error = raised
        if not distributed.all_agree(error is None, 2 * SAVE_SECONDS):
            self._failed(step, error)

    def finish(self) -> None:
        """Waits for the last save of a run, which has to succeed.

        Raises:
            SaveError: It has not.
        """
        self.wait()
        if self._failure is not None:
            raise SaveError(self._failure)

    def close(self) -> None:
        """Waits and releases the folder; also in a process that ends by an error."""
        if self._pending is not None:
            (step, response), self._pending = self._pending, None
            try:
                response.result()
            except Exception as error:
                logging.error("checkpoint of step %d not written: %s", step, _reason(error))
                with contextlib.suppress(Exception):  # The same error again.
                    self._checkpointer.close()
                return
        self._checkpointer.close()

    def _saved(self, step: int, seconds: float) -> None:
        self.last_save = (step, seconds)

    def _failed(self, step: int, error: Exception | None) -> None:
        """Notes a save that has failed, here or in another process, and clears up after it."""
        self.num_failed += 1
        with contextlib.suppress(Exception):  # The same error again.
            self._checkpointer.close()
        # Afresh from what is on disk: the old one counts the lost step among its checkpoints. The
        # folder of the lost step goes, and with it the space that it took.
        self._checkpointer = self._open()
        reason = "another process could not write its part" if error is None else _reason(error)
        newest = self.latest_step()
        kept = "there is none yet" if newest is None else f"the newest is of step {newest}"
        self._failure = f"the checkpoint of step {step} could not be written ({kept}): {reason}"
        logging.error("%s", self._failure)


def _reason(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."


def _saving() -> ocp.Context:
    """How arrays are written."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_BYTES_OF_A_SHARE
    # It saves a fourteenth of random weights and holds a second copy of the state while it does.
    context.array.saving.use_compression = False
    context.asynchronous.timeout_secs = SAVE_SECONDS
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
    """Writes a tree of arrays once, replacing what was there.

    Of several processes all call it, with the same tree where it is not sharded over them:
    Orbax meets all of them even if one alone writes.
    """
    if jax.process_count() > 1:
        # A device of one process is none of the others'; what is on the host, process 0 writes.
        tree = jax.tree.map(_to_host, tree)
    with _saving():
        ocp.save(pathlib.Path(directory).absolute(), tree, overwrite=True)


def _to_host(leaf):
    return np.asarray(leaf) if getattr(leaf, "is_fully_addressable", True) else leaf


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
