"""What launch/aot_report.py says, and one compilation of the 14B step for a real topology."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from nextstep_jax.evaluation.scale_report import read_options

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/aot_report.py"
TINY = "--config=configs/pretrain_stage1.py:tiny"
FULL = ("--config=configs/pretrain_stage1.py:14b", "--config.data.row_length=4096")


def run(*flags, timeout=120):
    command = [sys.executable, PROGRAM, *flags]
    env = {
        **os.environ,
        # No fake devices from the test run.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        # A third to a half of the time; the planned peak moves by a few percent.
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
    }
    # Splash attention has no such products.
    env.pop("JAX_DEFAULT_MATMUL_PRECISION", None)
    pipes = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, **pipes)


def report_of(path, *flags, timeout=120, status=0):
    result = run(*flags, f"--json={path}", timeout=timeout)
    assert result.returncode == status, result.stderr
    return json.loads(path.read_text()), result.stdout


def test_training_on_fake_devices(tmp_path):
    flags = ("--topology=cpu:4", "--mesh=data:2,fsdp:2", "--config.data.rows_per_batch=4")
    flags += ("--config.data.row_length=128", "--config.attention=xla")
    report, text = report_of(tmp_path / "report.json", TINY, *flags)
    assert report["num_devices"] == 4
    assert report["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    assert report["fits"] is True
    assert report["device_memory_bytes"] is None
    # tiny: 4 layers of 192 x (2 x 6 + 2 x 2) x 32 + 3 x 192 x 512, 128 positions of 4 rows.
    layers = 4 * (192 * 16 * 32 + 3 * 192 * 512)
    assert report["flops"]["decoder"] == 6 * 4 * 128 * layers
    # An upper bound: a document a row, all of it text.
    assert report["flops"]["attention"] == 6 * 4 * 128 * 129 * 4 * 6 * 32
    assert "model FLOPs of a step: at most" in text
    memory = report["programs"]["step"]["memory"]
    # Parameters and two moments in float32, half of them on each device; the batch is small.
    state = 3 * 4 * report["parameters"] / 2
    assert state < memory["arguments"] < 1.2 * state
    assert memory["donated"] == pytest.approx(memory["outputs"], abs=4096)
    sent = report["programs"]["step"]["collectives"]
    assert sent["unknown_loops"] == 0
    # Every gradient goes over both axes, and weights are gathered at least once.
    assert sum(sent["bytes"].values()) > 4 * report["parameters"]
    assert f"{report['parameters'] / 1e9:.3f} B parameters; 4 rows of 128" in text
    assert "mesh data:2 fsdp:2" in text


def test_sampling_on_fake_devices(tmp_path):
    flags = ("--topology=cpu:2", "--what=sample", "--mesh=tensor:2", "--tokens=4", "--steps=2")
    report, text = report_of(tmp_path / "report.json", TINY, *flags)
    assert list(report["programs"]) == ["prefill", "tokens"]
    memory = report["programs"]["tokens"]["memory"]
    # bfloat16 weights, most of them split over the two devices.
    weights = 2 * report["parameters"]
    assert weights / 2 < memory["arguments"] < weights
    # Two products of every layer are summed over the devices, for each of four tokens.
    assert report["programs"]["tokens"]["collectives"]["counts"]["all-reduce"] >= 2 * 4 * 4
    assert "a token of every image, arithmetic and each device" in text
    assert "not measured" in text


def test_bad_input_is_one_line():
    """What is wrong with topologies, meshes and configs otherwise: tests of those."""
    result = run(TINY, "--topology=cpu:2", "--mesh=fsdp:2", "--config.data.rows_per_batch=3")
    assert result.returncode == 1
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: data.rows_per_batch=3 does not divide over mesh {'data': 1")


def test_entries_of_flags():
    assert read_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(ValueError, match="must be NAME=VALUE"):
        read_options(["a"])


@pytest.mark.libtpu
@pytest.mark.slow
def test_a_slice_that_is_too_small_is_refused(tmp_path):
    flags = (*FULL, "--topology=v6e:2x4", "--mesh=fsdp:8", "--config.data.rows_per_batch=16")
    report, text = report_of(tmp_path / "report.json", *flags, timeout=600, status=3)
    assert report["fits"] is False
    refused = report["refused"]
    # Parameters and moments alone are 20.9 GiB a device, and gradients come to that.
    assert refused["available_bytes"] == pytest.approx(31.25 * 2**30, rel=1e-3)
    assert 31.25 * 2**30 < refused["needed_bytes"] < 60 * 2**30
    assert "31.25 GiB available. Try" in text
    assert "loop.accumulate" in text


@pytest.mark.libtpu
@pytest.mark.slow
def test_the_published_model_fits_a_v5p_slice(tmp_path):
    flags = (*FULL, "--topology=v5p:4x4x4", "--mesh=fsdp:64", "--config.data.rows_per_batch=64")
    report, _ = report_of(tmp_path / "report.json", *flags, timeout=900)
    assert report["parameters"] == 14_953_814_080
    memory = report["programs"]["step"]["memory"]
    # Parameters and two moments in float32 over 64 devices, and all of it donated.
    assert 12 * 14_953_814_080 / 64 < memory["arguments"] < 2.9e9
    assert memory["donated"] == pytest.approx(memory["outputs"], rel=1e-3)
    assert memory["peak"] < 12e9
    # 6 N a token, attention and the flow head: 9.4e10 a token.
    assert report["flops"]["total"] == pytest.approx(9.4e10 * 64 * 4096, rel=0.02)
    # Weights are gathered twice (forward, backward) and gradients summed, in bfloat16.
    sent = report["programs"]["step"]["collectives"]
    assert sum(sent["bytes"].values()) > 3 * 2 * 13.2e9
    assert sent["unknown_loops"] == 0
