"""Ray, as far as the curator needs it: a quiet session, tasks with large arguments, plain errors.

Ray Data is the extra `[curate]`; nothing here is imported by anything but the curator, and ray
itself only when a session starts.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# A pyarrow.Table. Not named in annotations, as pyarrow may be missing.
Table = Any

# A local session: blocks on their way take turns; Ray spills to the disk what is more.
_LOCAL_STORE_BYTES = 2**30
_MAX_CAUSES = 10
# Newer versions add to the message of an error how to make Ray try again.
_RAY_ADVICE = "Failed to apply UDF transform"


def import_ray() -> Any:
    """The module ray, with ray.data.

    Raises:
        ValueError: It is not installed; says how to.
    """
    # Before the import, which reads them. What fails is raised; Ray's log says it once more.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            f"curation needs Ray Data ({error}): pip install nextstep_jax[curate]"
        ) from error
    return ray


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the work is done.

    Attributes:
        address: Of a cluster, such as "auto" or "ray://host:10001"; None is this machine.
        num_tasks: Of this machine, how many tasks run at a time; None is one a CPU.
        store_bytes: Of this machine, shared memory for documents on their way.
    """

    address: str | None = None
    num_tasks: int | None = None
    store_bytes: int = _LOCAL_STORE_BYTES

    def __post_init__(self):
        """Checks the number of tasks."""
        if self.num_tasks is not None and self.num_tasks < 1:
            raise ValueError(f"num_tasks={self.num_tasks} must be at least 1")


LOCAL = Cluster()


@contextlib.contextmanager
def session(cluster: Cluster, actor_cpus: float = 0.0) -> Iterator[Any]:
    """Connects to a cluster, or starts Ray on this machine alone and stops it at the end.

    A session that runs already is used and left running.

    Args:
        cluster: Where.
        actor_cpus: CPUs that actors will reserve beside the tasks.

    Yields:
        The module ray.

    Raises:
        ValueError: Ray is not installed.
        ConnectionError: There is no such cluster.
    """
    ray = import_ray()
    if ray.is_initialized():
        with _quiet_data(ray, local=cluster.address is None):
            yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    scratch = None
    if cluster.address is None:
        # Of its own, as Ray would leave the logs of every session in /tmp/ray.
        num_tasks = cluster.num_tasks or len(os.sched_getaffinity(0))
        scratch = tempfile.mkdtemp(prefix="ray-")
        local = {
            # Numbers for the scheduler; actors share the CPUs with the tasks.
            "num_cpus": num_tasks + math.ceil(actor_cpus),
            "object_store_memory": cluster.store_bytes,
            "include_dashboard": False,
            "_temp_dir": scratch,
        }
        ray.init(**local, **quiet)
    else:
        ray.init(address=cluster.address, **quiet)
    try:
        with _quiet_data(ray, local=cluster.address is None):
            yield ray
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet_data(ray: Any, local: bool) -> Iterator[None]:
    """Ray Data without its progress bars, and with blocks that stay as they are."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    names = (
        *("enable_progress_bars", "raise_original_map_exception"),
        *("target_max_block_size", "shuffle_strategy"),
    )
    before = {name: getattr(context, name) for name in names}, logger.level
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # A block is a shard; Ray would cut large ones.
    context.target_max_block_size = None
    if local:
        # By tasks. The others start actors, each a process, which is for large clusters.
        strategies = type(context.shuffle_strategy)
        context.shuffle_strategy = strategies.SORT_SHUFFLE_PULL_BASED
    # Errors reach the caller; there is no need to log them too.
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before[0].items():
            setattr(context, name, value)
        logger.setLevel(before[1])


@functools.lru_cache(maxsize=4)
def fetch(reference: Any) -> Any:
    """The value of a `ray.put`, read once by every process."""
    import ray

    return ray.get(reference)


class Shared:
    """A large value that tasks refer to: sent to each machine once, read by each process once."""

    def __init__(self, ray: Any, value: Any):
        """Puts it into the object store."""
        self._reference = ray.put(value)

    @property
    def value(self) -> Any:
        """The value, on whatever machine."""
        return fetch(self._reference)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raises what went wrong in a task (ValueError, OSError) as if it had happened here.

    Ray wraps it in errors of its own, whose text holds the trace of the worker; that is logged for
    those who debug.
    """
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        logging.debug("where a worker raised it: %s", error)
        if _RAY_ADVICE in str(cause):
            cause.args = (str(cause).split(_RAY_ADVICE)[0].rstrip(),)
        raise cause from None


def _cause(error: BaseException | None) -> Exception | None:
    """The first ValueError or OSError behind an error of Ray, as the worker raised it."""
    for _ in range(_MAX_CAUSES):
        # Ray's errors are of the class of their cause too; theirs is the text with the trace.
        wrapped = getattr(error, "cause", None)
        if isinstance(error, (ValueError, OSError)) and wrapped is None:
            return error
        if error is None:
            return None
        error = wrapped if isinstance(wrapped, BaseException) else error.__cause__
    return None


def run_rows(dataset: Any, done: Callable[[dict[str, Any]], None]) -> None:
    """Runs a dataset and hands over its rows as they come."""
    with plain_errors():
        for row in dataset.iter_rows():
            done(row)


def collect_columns(dataset: Any) -> dict[str, np.ndarray]:
    """Runs a dataset; all rows of its small result, by column, or {} without any."""
    with plain_errors():
        batches = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    batches = [batch for batch in batches if batch and len(next(iter(batch.values())))]
    if not batches:
        return {}
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
