"""Checkpoints: one object with everything a run is made of, through Orbax.

The only file that knows Orbax. A checkpoint holds the train state, the position of the data
iterator, the clock (time and samples so far) and the full configuration. Saving is asynchronous:
what blocks is the copy to the host.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nextstep_jax.data.pipeline import check_fingerprint

_STATE, _DATASET = "state", "dataset"


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
            # The loop decides when; Orbax shall not decline.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._pending = None

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        latest = self._checkpointer.latest
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
        self._pending = self._checkpointer.save_checkpointables_async(
            step, items, custom_metadata=json.loads(json.dumps(metadata))
        )

    def restore(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The newest checkpoint on the shardings of `checkpoint.state`, or None if there is none.

        Raises:
            ValueError: The data pipeline would not continue where it stopped; the message lists
                what differs.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        metadata = self._checkpointer.checkpointables_metadata(latest.step).custom_metadata
        check_fingerprint(metadata["fingerprint"], json.loads(json.dumps(checkpoint.fingerprint)))
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


def load_params(directory: pathlib.Path, *, ema: bool = True) -> tuple[Any, int]:
    """The parameters of the newest checkpoint, on the default device, and its step.

    Args:
        directory: The folder given to `CheckpointStore`.
        ema: Prefer the moving average where the run kept one.

    Raises:
        FileNotFoundError: There is no finished checkpoint.
    """
    directory = pathlib.Path(directory).absolute()
    checkpointer = ocp.training.Checkpointer(directory) if directory.is_dir() else None
    if checkpointer is None or checkpointer.latest is None:
        raise FileNotFoundError(f"no finished checkpoint in {directory}")
    with checkpointer:
        step = checkpointer.latest.step
        tree = checkpointer.checkpointables_metadata(step).metadata[_STATE]
        name = "ema" if ema and tree.get("ema") else "params"
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree[name]
        )
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            state = checkpointer.load_checkpointables(step, {_STATE: {name: abstract}})[_STATE]
    return state[name], step


def save_tree(directory: pathlib.Path, tree: Any) -> None:
    """Writes a tree of arrays once, replacing what was there."""
    ocp.save(pathlib.Path(directory).absolute(), tree, overwrite=True)


def load_tree(directory: pathlib.Path) -> Any:
    """Reads what `save_tree` wrote, on the default device."""
    directory = pathlib.Path(directory).absolute()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        ocp.metadata(directory).metadata,
    )
    return ocp.load(directory, abstract)
