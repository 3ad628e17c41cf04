"""Runs of two real processes, and what may go wrong in them."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from nextstep_jax.interop.model_directory import write_vae_directory
from nextstep_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
NUM_STEPS, EVERY = 40, 8
# A dead process is noticed by its silence for as long, or earlier by its broken connections.
PEER_SECONDS = 8
# What has to agree bit for bit; time does not.
CURVE = ("step", "loss", "text_loss", "image_loss", "grad_norm", "param_norm", "batch", "samples")


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Job:
    """The same command once per process."""

    def __init__(self, command, folder, count=2, faults=None, **environment):
        port = free_port()
        self.outputs = [folder / f"process-{index}.txt" for index in range(count)]
        grid = {"NEXTSTEP_COORDINATOR": f"127.0.0.1:{port}", "NEXTSTEP_NUM_PROCESSES": str(count)}
        self.processes, self.sinks = [], []
        for index, output in enumerate(self.outputs):
            folder.mkdir(exist_ok=True)
            with output.open("w") as file:
                # A pipe: a process whose disk is full can still say so.
                sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / "tests/training/faulty_run.py"), *command],
                    env={
                        **os.environ,
                        **environment_of(2 // count),
                        **grid,
                        "NEXTSTEP_PROCESS_ID": str(index),
                        "NEXTSTEP_START_TIMEOUT": "60",
                        "NEXTSTEP_PEER_TIMEOUT": str(PEER_SECONDS),
                        "FAULTS": json.dumps(faults or {}),
                        **environment,
                    },
                    stdout=sink.stdin,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                )
            sink.stdin.close()
            self.sinks.append(sink)
            self.processes.append(process)

    def texts(self):
        """What the processes have printed, once they have ended."""
        for sink in self.sinks:
            sink.wait(10)
        return [output.read_text() for output in self.outputs]

    def codes(self, seconds=120):
        """Exit statuses of all."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail("\n=====\n".join(self.texts()))

    def kill(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def wait_for(self, workdir, num_lines, checkpoint=None):
        """Until metrics and a checkpoint are there; fails if a process ends before."""
        for _ in range(24_000):
            saved = checkpoint is None or (workdir / "checkpoints" / str(checkpoint)).exists()
            if saved and len(read_metrics(workdir)) >= num_lines:
                return
            if any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.005)
        self.kill()
        pytest.fail(f"no line {num_lines}\n" + "\n=====\n".join(self.texts()))


def environment_of(num_devices):
    """Fake devices, and programs that compile fast."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"
        " --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def tokenizer_dir(make_vae, tmp_path_factory):
    """The workdir of an image tokenizer."""
    folder, vae = tmp_path_factory.mktemp("tokenizer"), make_vae()
    write_vae_directory(folder, vae.module.config, vae.params)
    return folder


@pytest.fixture(scope="module")
def command(tokenizer_dir):
    """(workdir, mesh axes) -> launch/train.py and its flags."""

    def make(workdir, mesh="fsdp", **changes):
        return [
            str(ROOT / "launch/train.py"),
            f"--config={ROOT / 'tests/training/tiny_config.py'}:{mesh}",
            f"--tokenizer={tokenizer_dir}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in changes.items()),
        ]

    return make


def curve(workdir):
    return [tuple(line[name] for name in CURVE) for line in read_metrics(workdir)]


def close(lines, others):
    """Batches are the same bit for bit, losses within 1e-5 of each other."""
    assert len(lines) == len(others) > 0
    for one, other in zip(lines, others, strict=True):
        assert (one["step"], one["batch"]) == (other["step"], other["batch"])
        for name in ("loss", "text_loss", "image_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    return True


def steps_on_disk(workdir):
    """Names in the order of steps; half-written ones have a suffix."""
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(names, key=lambda name: (int(name.partition(".")[0]), name))


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The workdir of one process on a mesh of its own, the first steps."""
    folder = tmp_path_factory.mktemp("alone")
    first = command(folder / "run", "data", **{"loop.num_steps": EVERY})
    job = Job(first, folder, count=1)
    assert job.codes() == [0], job.texts()
    assert "process 0 of" not in job.texts()[0]  # One process meets nobody.
    return folder / "run"


@pytest.fixture(scope="module")
def continued(alone, command, tokenizer_dir, tmp_path_factory):
    """The same run, taken over by two processes that the script for SLURM has started."""
    folder = tmp_path_factory.mktemp("slurm")
    workdir = shutil.copytree(alone, folder / "run")
    arguments = command(workdir)
    environment = {
        **os.environ,
        **environment_of(1),
        "PATH": f"{ROOT / 'tests/launch/fake_cluster'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "NEXTSTEP_PLATFORM": "cpu",
        "PYTHON": sys.executable,
        "CONFIG": arguments[1].removeprefix("--config="),
        "TOKENIZER": str(tokenizer_dir),
        "WORKDIR": str(workdir),
        # The checksum of the batches; the script starts launch/train.py otherwise.
        "PROGRAM": f"{ROOT / 'tests/training/faulty_run.py'} {arguments[0]}",
        "LOGS": str(folder),
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch/slurm.sbatch")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir, done.stdout + done.stderr


def test_another_mesh_and_another_number_of_processes(alone, continued):
    """A run of one process goes on with two, under the script for SLURM, and they end together."""
    workdir, text = continued
    assert "process 0 of 2" in text and "process 1 of 2" in text
    assert text.count(f"continuing at step {EVERY}\n") == 2
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert len({line["batch"] for line in lines}) > NUM_STEPS - 3
    assert curve(workdir)[:EVERY] == curve(alone)
    assert steps_on_disk(workdir) == [str(NUM_STEPS - EVERY), str(NUM_STEPS)]
    # One of them wrote the model directory.
    names = {path.name for path in workdir.iterdir()}
    assert {"vae", "model.json", "tokenizer.json", "config.json"} <= names


def test_two_as_one_killed_continued_and_asked_to_stop(alone, continued, command, tmp_path):
    """kill -9 of one ends both; on two again, bit for bit; SIGTERM to all, status 0."""
    workdir = tmp_path / "two"
    job = Job(command(workdir), tmp_path / "first", faults={"slow": 0.1})
    job.wait_for(workdir, EVERY + 6, EVERY)
    job.processes[1].kill()
    killed = time.monotonic()
    codes = job.codes()
    seconds = time.monotonic() - killed
    print(f"the job ended {seconds:.1f} s after kill -9")
    # Silence, and at most as long again until the rest has stopped.
    assert seconds < 2 * PEER_SECONDS
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert "another process has gone" in job.texts()[0] or "another task died" in job.texts()[0]
    before, lines = curve(workdir), read_metrics(workdir)
    # Two processes from the first step as one; and as the one whose run was continued by two.
    assert close(lines[:EVERY], read_metrics(alone))
    assert close(lines[EVERY:], read_metrics(continued[0])[EVERY : len(lines)])

    job = Job(command(workdir), tmp_path / "second", faults={"slow": 0.1})
    job.wait_for(workdir, len(before) + 2)
    # To all, but not at once.
    job.processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.processes[0].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert job.codes() == [0, 0], job.texts()
    print(f"the job had saved and ended {time.monotonic() - asked:.1f} s after SIGTERM")
    assert f"continuing at step {EVERY}" in job.texts()[0]
    stopped = len(read_metrics(workdir))
    assert len(before) < stopped < NUM_STEPS
    assert all(f"stopped at step {stopped};" in text for text in job.texts())
    assert steps_on_disk(workdir)[-1] == str(stopped)
    assert curve(workdir)[: len(before)] == before
    assert close(read_metrics(workdir)[EVERY:], read_metrics(continued[0])[EVERY:stopped])


def test_full_disk_kill_in_save_and_nan(tmp_path):
    """Of one of two processes each; the other never waits for it in vain."""
    workdir = tmp_path / "toy"
    settings = {"WORKDIR": str(workdir), "SAVE_SECONDS": "3"}
    # The disk of process 1 is full when step 4 is saved: it is logged, the run goes on. Then
    # process 1 alone is asked to stop.
    faults = {"process": 1, "full_disk_at": 4, "slow": 0.1}
    job = Job(["toy"], tmp_path / "first", faults=faults, **settings)
    job.wait_for(workdir, 10)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes() == [0, 0], job.texts()
    for text in job.texts():
        assert "checkpoint of step 4 could not be written (the newest is of step 2)" in text
    assert "File too large" in job.texts()[1]
    lines = read_metrics(workdir)
    assert 10 <= len(lines) < 40
    assert all(f"stopped at step {len(lines)};" in text for text in job.texts())
    assert [line.get("failed_saves", 0) for line in lines] == [0] * 6 + [1] * (len(lines) - 6)
    assert str(len(lines)) in steps_on_disk(workdir)
    expected = [line["loss"] for line in lines]

    # Process 0 dies when all of step 8 is on disk but its name.
    shutil.rmtree(workdir)
    job = Job(["toy"], tmp_path / "second", faults={"kill_in_save_of": 8}, **settings)
    codes = job.codes()
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, -signal.SIGKILL), job.texts()
    left = steps_on_disk(workdir)
    assert left[:2] == ["4", "6"] and left[2].startswith("8.") and len(left) == 3

    # The next start is from step 6, and clears up. Then the tenth batch is bad.
    job = Job(["toy"], tmp_path / "third", faults={"nan_at": 9}, **settings)
    assert job.codes() == [1, 1], job.texts()
    assert "continuing at step 6" in job.texts()[0]
    for text in job.texts():
        assert "error: step 10:" in text and "the last good checkpoint is kept" in text
    assert steps_on_disk(workdir) == ["6", "8"]
    assert [line["loss"] for line in read_metrics(workdir)] == expected[:9]
