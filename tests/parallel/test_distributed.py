"""What the environment says of the processes; how they meet, agree and end is shown for real."""

import itertools
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from nextstep_jax.parallel import distributed
from nextstep_jax.parallel.distributed import Grid, find_grid
from nextstep_jax.training import stopping
from nextstep_jax.training.stopping import StopRequest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GIVEN = {
    "NEXTSTEP_COORDINATOR": "node0:9876",
    "NEXTSTEP_NUM_PROCESSES": "4",
    "NEXTSTEP_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
}


@pytest.mark.parametrize(
    ("environment", "grid"),
    [
        ({}, None),
        ({"HOME": "/root", "SLURM_JOB_ID": "1"}, None),  # In a batch script, not in a step.
        (GIVEN, Grid("node0:9876", 4, 3)),
        ({**SLURM, **GIVEN}, Grid("node0:9876", 4, 3)),  # What is given by hand wins.
        ({**GIVEN, "NEXTSTEP_NUM_PROCESSES": "1", "NEXTSTEP_PROCESS_ID": "0"}, None),
        (SLURM, Grid()),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, Grid()),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Grid()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Grid()),
        ({"NEXTSTEP_CLUSTER": "auto"}, Grid()),
        ({**SLURM, "NEXTSTEP_CLUSTER": "none"}, None),
        ({**GIVEN, "NEXTSTEP_CLUSTER": "none"}, None),
    ],
)
def test_who_is_there(environment, grid):
    assert find_grid(environment) == grid


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"NEXTSTEP_PROCESS_ID": ""}, "NUM_PROCESSES needs NEXTSTEP_PROCESS_ID too"),
        ({"NEXTSTEP_COORDINATOR": ""}, "NEXTSTEP_PROCESS_ID needs NEXTSTEP_COORDINATOR too"),
        ({"NEXTSTEP_COORDINATOR": "node0"}, "NEXTSTEP_COORDINATOR='node0' must be HOST:PORT"),
        ({"NEXTSTEP_COORDINATOR": "node0:x"}, "must be HOST:PORT"),
        ({"NEXTSTEP_PROCESS_ID": "4"}, "NEXTSTEP_PROCESS_ID=4 must be below"),
        ({"NEXTSTEP_PROCESS_ID": "-1"}, "NEXTSTEP_PROCESS_ID='-1' must be a whole number from 0"),
        ({"NEXTSTEP_NUM_PROCESSES": "0"}, "NEXTSTEP_NUM_PROCESSES='0' must be a whole number"),
        ({"NEXTSTEP_CLUSTER": "slurm"}, "NEXTSTEP_CLUSTER='slurm' must be 'auto' or 'none'"),
    ],
)
def test_half_given_settings_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        find_grid({**GIVEN, **changes})


def test_one_process_needs_nothing(monkeypatch):
    for name in [*GIVEN, *SLURM, *OPEN_MPI, "NEXTSTEP_CLUSTER", "TPU_WORKER_HOSTNAMES"]:
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    assert not distributed.is_active()
    assert distributed.num_processes() == 1
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    distributed.fail("nobody to tell")
    distributed.finish()


def run(program, index, own=None, **environment):
    """A process of two, that runs a program; `own` replaces the grid."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            **GIVEN,
            **environment,
            "NEXTSTEP_NUM_PROCESSES": "2",
            "NEXTSTEP_PROCESS_ID": str(index),
            **(own or {}),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_process_that_waits_in_vain_says_so():
    began = time.monotonic()
    program = "from nextstep_jax.parallel import distributed; distributed.initialize()"
    here = {"NEXTSTEP_COORDINATOR": address(), "NEXTSTEP_START_TIMEOUT": "2"}
    process = run(program, 0, **here)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"error: not all 2 processes came to {here['NEXTSTEP_COORDINATOR']} within 2 s" in output
    assert "says process 0 on" in output
    assert time.monotonic() - began < 30  # Two seconds, and the imports.


def test_auto_outside_of_a_cluster():
    program = "from nextstep_jax.parallel import distributed; distributed.initialize()"
    none = dict.fromkeys(GIVEN, "")
    process = run(program, 0, NEXTSTEP_CLUSTER="auto", own=none)
    output = process.communicate(timeout=60)[0]
    assert "ValueError: jax finds no cluster here (NEXTSTEP_CLUSTER=auto?)" in output
    assert process.returncode == 1


def test_an_error_in_one_ends_both_and_agreement_is_of_all():
    """Process 1 fails while process 0 would wait for ever."""
    program = """
import time
from nextstep_jax.parallel import distributed
from nextstep_jax.training.logs import run_program

def main(argv):
    distributed.initialize()
    me = distributed.process_id()
    print("agreed", distributed.all_agree(True), distributed.all_agree(me == 0), flush=True)
    if me == 1:
        raise ValueError("data/x.tar is not there")
    time.sleep(600)

run_program(main)
"""
    here = {"NEXTSTEP_COORDINATOR": address(), "NEXTSTEP_PEER_TIMEOUT": "30"}
    began = time.monotonic()
    processes = [run(program, index, **here) for index in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert all("agreed True False" in output for output in outputs)
    assert outputs[1].endswith("error: data/x.tar is not there\n")
    said = "error: process 1 failed, and process 0 ends too: error: data/x.tar is not there\n"
    assert outputs[0].endswith(said)
    # Told, not found out by silence.
    assert time.monotonic() - began < 30


class Store:
    """In place of the coordination service: processes are threads."""

    def __init__(self, count):
        self.notes, self.lock, self.count = {}, threading.Lock(), count
        self.me = threading.local()

    def post(self, name, value):
        with self.lock:
            self.notes.setdefault(name, {})[self.me.index] = value

    def read(self, name):
        with self.lock:
            return dict(self.notes.get(name, {}))


@pytest.mark.parametrize(
    ("asked", "speeds"),
    [
        ({1: 5}, (0.001, 0.001, 0.001)),
        ({0: 0}, (0.001, 0.004, 0.002)),
        ({0: 7, 1: 9, 2: 4}, (0.003, 0.001, 0.002)),  # All, at different moments.
        ({2: 299}, (0.0, 0.0, 0.0)),  # At the last boundary: then all end by themselves.
        ({}, (0.0, 0.0, 0.0)),
    ],
)
def test_processes_agree_on_the_step(monkeypatch, asked, speeds):
    """Each steps by itself, none waits for another but at the stop; all leave at one step."""
    num_steps, store = 300, Store(len(speeds))
    monkeypatch.setattr(distributed, "is_active", lambda: True)
    monkeypatch.setattr(distributed, "num_processes", lambda: len(speeds))
    monkeypatch.setattr(distributed, "post", store.post)
    monkeypatch.setattr(distributed, "read", store.read)
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(stopping, "_counter", itertools.repeat(0))  # One run in all of them.
    left = {}

    def process(index):
        store.me.index = index
        request = StopRequest()
        plain = request._listen

        def listen():
            store.me.index = index
            plain()

        request._listen = listen
        with request:
            step = 0
            while step < num_steps and not request.reached(step):
                if asked.get(index) == step:
                    request.requested = True
                time.sleep(speeds[index])
                step += 1
            meeting.wait(20)  # As a run's last save does.
        left[index] = step

    meeting = threading.Barrier(len(speeds))
    threads = [threading.Thread(target=process, args=(i,)) for i in range(len(speeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(left.values())) == 1 and len(left) == len(speeds), left
    step = left[0]
    latest = max(asked.values(), default=num_steps)
    assert (
        step == num_steps if latest in (num_steps, 299) else min(asked.values()) < step < num_steps
    )
