"""Many processes: how they meet, tell each other of an end, and leave together.

One process is the default and needs nothing. Several meet through `jax.distributed` when the
environment says that there are several; the same command is then started once per process.

    NEXTSTEP_COORDINATOR      HOST:PORT of process 0; given by hand, the next two go with it
    NEXTSTEP_NUM_PROCESSES    how many there are
    NEXTSTEP_PROCESS_ID       which of them this one is, from 0
    NEXTSTEP_CLUSTER          auto: jax finds out where it runs (TPU VMs need this word);
                              none: one process, whatever the cluster's variables say;
                              not set: auto under SLURM, Open MPI and GKE, for more than one task
    NEXTSTEP_START_TIMEOUT    seconds for all to come, 300
    NEXTSTEP_PEER_TIMEOUT     seconds without a sign of life after which a process counts as dead
                              and the job ends, 30

Notes between processes go through the store of the coordination service: host to host, without the
devices. An error in one process is such a note, and ends all.
"""

import dataclasses
import itertools
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping

import jax
from jax._src import distributed as _runtime  # The store has no public name; only used here.

COORDINATOR, NUM_PROCESSES, PROCESS_ID = GRID = (
    "NEXTSTEP_COORDINATOR",
    "NEXTSTEP_NUM_PROCESSES",
    "NEXTSTEP_PROCESS_ID",
)
CLUSTER = "NEXTSTEP_CLUSTER"
START_TIMEOUT = "NEXTSTEP_START_TIMEOUT"
PEER_TIMEOUT = "NEXTSTEP_PEER_TIMEOUT"
_DEFAULT_SECONDS = {START_TIMEOUT: 300, PEER_TIMEOUT: 30}

# What jax itself needs before it takes a cluster for one. (A TPU VM knows by its metadata server,
# which a laptop would be asked for in vain: hence the word "auto".)
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_GKE_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")

# How often a process looks for the notes of others; one small request each.
_LOOK_SECONDS = 0.5
# From the note of an error to the end of a process that is about to end by itself, too; and how
# long process 0, on which the notes lie, stays for the others to read them.
_GRACE_SECONDS = 3.0
# A day: whoever dies in the meantime is noticed by his heartbeat.
_LEAVE_SECONDS = 24 * 3600
_FAILED, _MEETINGS = "nextstep/failed", "nextstep/meeting"
_counter = itertools.count()


@dataclasses.dataclass(frozen=True)
class Grid:
    """The processes of a job.

    Attributes:
        coordinator: HOST:PORT of process 0, or None where jax finds it.
        num_processes: How many, or None where jax finds out.
        process_id: Which one this is, or None where jax finds out.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_grid(environment: Mapping[str, str]) -> Grid | None:
    """What the environment says of the processes; None is one process.

    Raises:
        ValueError: Only a part of the three values is given, or one is not what it should be.
    """
    cluster = environment.get(CLUSTER, "")
    if cluster not in ("", "auto", "none"):
        raise ValueError(f"{CLUSTER}={cluster!r} must be 'auto' or 'none', or not be set")
    given = [name for name in GRID if environment.get(name)]
    if cluster == "none":
        return None
    if given:
        return _given_grid(environment, given)
    return Grid() if cluster == "auto" or _num_cluster_tasks(environment) > 1 else None


def _given_grid(environment, given) -> Grid | None:
    missing = [name for name in GRID if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} needs {', '.join(missing)} too: give all or none")
    host, _, port = environment[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{COORDINATOR}={environment[COORDINATOR]!r} must be HOST:PORT")
    count = _number(environment, NUM_PROCESSES, 1)
    index = _number(environment, PROCESS_ID, 0)
    if index >= count:
        raise ValueError(f"{PROCESS_ID}={index} must be below {NUM_PROCESSES}={count}")
    return Grid(environment[COORDINATOR], count, index) if count > 1 else None


def _num_cluster_tasks(environment) -> int:
    """Tasks of the cluster that jax would find, or 1 outside of one."""
    if all(name in environment for name in _SLURM):
        return _number(environment, "SLURM_NTASKS", 1)
    if all(name in environment for name in _OPEN_MPI):
        return _number(environment, "OMPI_COMM_WORLD_SIZE", 1)
    hosts = next((environment[name] for name in _GKE_HOSTS if environment.get(name)), "")
    slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
    return len(hosts.split(",")) * int(slices) if hosts else 1


def _number(environment, name, least) -> int:
    text = environment.get(name) or str(_DEFAULT_SECONDS.get(name, ""))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text!r} must be a whole number from {least}")
    return int(text)


def initialize() -> None:
    """Meets the other processes if there are any; before anything touches a device.

    From then on a process that dies, or ends by an error, ends the others, too.

    Raises:
        ValueError: The environment's values are incomplete or wrong, or jax finds no cluster.
    """
    grid = find_grid(os.environ)
    if grid is None or is_active():
        return
    start = _number(os.environ, START_TIMEOUT, 1)
    peer = _number(os.environ, PEER_TIMEOUT, 1)
    # It would swallow a SIGTERM that comes before the loop listens.
    jax.config.update("jax_enable_preemption_service", False)
    alarm = threading.Timer(start, _nobody_came, (grid, start))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            grid.coordinator,
            grid.num_processes,
            grid.process_id,
            # All visible devices where the grid is given by hand; else as the cluster has it.
            cluster_detection_method="deactivate" if grid.coordinator else None,
            # Later than the alarm, whose message says more.
            initialization_timeout=start + 60,
            heartbeat_timeout_seconds=peer,
            shutdown_timeout_seconds=peer,
        )
    except ValueError as error:
        raise ValueError(f"jax finds no cluster here ({CLUSTER}=auto?): {error}") from error
    finally:
        alarm.cancel()
    state = _runtime.global_state
    logging.info("process %d of %d on %s", state.process_id, state.num_processes, _host())
    threading.Thread(target=_watch, name="watch", daemon=True).start()


def _nobody_came(grid: Grid, seconds: int) -> None:
    me = "a process" if grid.process_id is None else f"process {grid.process_id}"
    count = "all" if grid.num_processes is None else f"all {grid.num_processes}"
    where = grid.coordinator or "the coordinator that jax found"
    print(
        f"error: not {count} processes came to {where} within {seconds} s ({START_TIMEOUT}), says"
        f" {me} on {_host()}: was each of them started, and can each reach that address?",
        file=sys.stderr,
        flush=True,
    )
    _leave(1)


def is_active() -> bool:
    """Whether this is one of several processes that have met."""
    return jax.distributed.is_initialized() and _runtime.global_state.num_processes > 1


# ----- Notes -----


def post(name: str, value: str) -> None:
    """Leaves a note of this process for all, under `name`; a second one replaces the first."""
    state = _runtime.global_state
    state.client.key_value_set(f"{name}/{state.process_id}", value, allow_overwrite=True)


def read(name: str) -> dict[int, str]:
    """The notes under `name`, by process."""
    notes = _runtime.global_state.client.key_value_dir_get(f"{name}/")
    return {int(key.rpartition("/")[2]): value for key, value in notes}


def process_id() -> int:
    """Which process this is, without asking the devices."""
    return _runtime.global_state.process_id if is_active() else 0


def num_processes() -> int:
    """How many there are, without asking the devices."""
    return _runtime.global_state.num_processes if is_active() else 1


def all_agree(is_well: bool, timeout: int = 600) -> bool:
    """Whether `is_well` holds in every process; all have to call this, in the same order.

    Host to host: no device waits. Takes milliseconds, or as long as the last process.

    Args:
        is_well: What this process says.
        timeout: Seconds to wait for the others.
    """
    if not is_active():
        return is_well
    name = f"{_MEETINGS}-{next(_counter)}"
    post(name, str(int(is_well)))
    _runtime.global_state.client.wait_at_barrier(f"{name}-all", timeout * 1000)
    return all(value == "1" for value in read(name).values())


# ----- The end -----


def _watch() -> None:
    """Ends this process soon after another has left the note that it failed."""
    me = _runtime.global_state.process_id
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            notes = read(_FAILED)
        except Exception:  # The service is gone: a normal end, or jax ends the process.
            return
        if notes and me not in notes:
            # A process that has failed itself is putting its affairs in order.
            time.sleep(_GRACE_SECONDS)
            first = min(notes)
            _end(f"error: process {first} failed, and process {me} ends too: {notes[first]}")


def fail(message: str) -> None:
    """Of several processes: prints the message, ends all and does not return. Of one: nothing."""
    if is_active():
        _end(message)


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    state = _runtime.global_state
    try:
        post(_FAILED, message)
        end = time.monotonic() + 2 * _GRACE_SECONDS
        # The notes lie on process 0.
        while state.process_id == 0 and len(read(_FAILED)) < state.num_processes:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
    except Exception as error:
        logging.debug("nobody could be told: %s", error)
    # At a normal exit jax would wait for processes that may never come.
    _leave(1)


def _leave(status: int) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def finish() -> None:
    """Waits until all processes have come this far, and parts from them."""
    if is_active():
        _runtime.global_state.client.wait_at_barrier("nextstep/end", _LEAVE_SECONDS * 1000)
        jax.distributed.shutdown()


def _host() -> str:
    return socket.gethostname()
