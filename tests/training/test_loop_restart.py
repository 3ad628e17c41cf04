"""Runs that are killed: whole processes, the real task, the real data."""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from nextstep_jax.training import experiment
from nextstep_jax.training.checkpoint import save_tree
from nextstep_jax.training.metrics import JSONL, read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
NUM_STEPS, EVERY = 60, 4
# What has to agree bit for bit; time does not.
CURVE = ("step", "loss", "text_loss", "image_loss", "grad_norm", "param_norm", "batch", "samples")


@pytest.fixture(scope="module")
def start(make_config, vae, tmp_path_factory):
    """(workdir) -> a started process of the run, which goes on from what the workdir holds."""
    folder = tmp_path_factory.mktemp("spec")
    changes = {"num_steps": NUM_STEPS, "checkpoint_every": EVERY, "mesh": {"fsdp": -1}}
    config = make_config(loop=changes, data={"rows_per_batch": 2})
    save_tree(folder / "vae", vae.params)
    vae_config = experiment.plain(dataclasses.asdict(vae.module.config))
    spec = {"config": config, "vae": vae_config, "vae_params": str(folder / "vae")}
    (folder / "spec.json").write_text(json.dumps(spec))
    env = {
        **os.environ,
        # Two devices, and programs that compile fast.
        "XLA_FLAGS": (
            "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        ),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }

    def start(workdir):
        command = [sys.executable, str(ROOT / "tests/training/tiny_run.py")]
        return subprocess.Popen(
            [*command, str(folder / "spec.json"), str(workdir)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def wait_for_lines(process, workdir, num_lines):
    """Until the metrics have so many lines; fails if the process ends before."""
    path = workdir / JSONL
    for _ in range(60_000):
        if path.exists() and path.read_bytes().count(b"\n") >= num_lines:
            return
        if process.poll() is not None:
            pytest.fail(f"ended before line {num_lines}: {process.stdout.read()}")
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no line {num_lines} in two minutes")


def finish(process, code=0):
    output = process.communicate(timeout=180)[0]
    assert process.returncode == code, output
    # Nor the complaints of a data iterator that nobody closed.
    assert "Exception ignored" not in output, output
    assert "Traceback" not in output, output
    return output


def continued_at(output):
    (step,) = re.findall(r"continuing at step (\d+)", output)
    return int(step)


def curve(workdir):
    return [tuple(line[name] for name in CURVE) for line in read_metrics(workdir)]


def test_killed_and_continued_is_not_interrupted(start, tmp_path):
    """kill -9 anywhere, then SIGTERM: the curve and the batches are those of one run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    moments = types.SimpleNamespace(kill=random.randint(0, 15))
    print(moments)

    process = start(broken)
    # The first checkpoint is written while the steps go on; without it there is none to kill for.
    while not (broken / "checkpoints" / str(EVERY)).exists() and process.poll() is None:
        time.sleep(0.002)
    wait_for_lines(process, broken, len(read_metrics(broken)) + moments.kill)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    reached = len(read_metrics(broken))

    process = start(broken)
    # It restarts from a checkpoint, so some lines are cut and come again.
    moments.term = reached + random.randint(2, 12)
    wait_for_lines(process, broken, moments.term)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    first = continued_at(output)
    assert first % EVERY == 0
    assert 0 < first <= reached
    # At most what has happened since the last checkpoint but one is lost: one may be in flight.
    assert reached - first <= 2 * EVERY
    assert "stopped at step" in output
    stopped = len(read_metrics(broken))
    assert moments.term <= stopped < NUM_STEPS

    output = finish(start(broken))
    assert continued_at(output) == stopped  # the very step: SIGTERM loses nothing
    finish(start(whole))

    assert [line["step"] for line in read_metrics(whole)] == list(range(NUM_STEPS))
    assert curve(broken) == curve(whole)
    checksums = {line["batch"] for line in read_metrics(whole)}
    assert len(checksums) > NUM_STEPS - 3  # batches differ, and the checksum sees it
    assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == [
        str(NUM_STEPS - EVERY),
        str(NUM_STEPS),
    ]
