"""The program as processes: killed, shared and refused."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.interop.model_directory import write_vae_directory
from nextstep_jax.interop.pretrained import open_image_tokenizer
from nextstep_jax.models.config import VAEConfig
from nextstep_jax.models.vae import VAE
from nextstep_jax.training.encoding import image_tokenizer_digest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/encode_latents.py"
SHARDS = 6
VAE_CONFIG = VAEConfig(channels=4, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with an untrained image tokenizer of two levels, 4 pixels a token."""
    import jax
    import jax.numpy as jnp

    folder = tmp_path_factory.mktemp("tokenizer")
    shapes = jax.eval_shape(VAE(VAE_CONFIG).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.float32(0.3 * rng.standard_normal(x.shape)), shapes["params"]
    )
    write_vae_directory(folder, VAE_CONFIG, params)
    return folder


@pytest.fixture(scope="module")
def start(tokenizer):
    """(out, flags) -> the program, started."""
    env = {
        **os.environ,
        "XLA_FLAGS": (
            "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        ),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }

    def start(out, *flags):
        given = [
            *("--source=shapes:easy", f"--tokenizer={tokenizer}", f"--out={out}"),
            *("--image_bases=32", "--square_only", f"--num_shards={SHARDS}"),
            *("--num_documents=300", "--batch_size=4", "--num_threads=1"),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, PROGRAM, *given, *flags]
        return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)

    return start


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "unbroken"
    return out, finish(start(out))


def finish(process, code=0):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_of_the_built_in_world(unbroken, tokenizer):
    out, output = unbroken
    assert output.endswith(f"written to {out}\n")
    assert "6 shards made, 0 kept: 300 documents with 300 images at " in output
    # 50 squares a shard in batches of 4 on 2 devices: 12 and a half groups, 14 places.
    assert "padding 10.7%" in output
    source, expected = RecordSource(out), ShapesSource("pair", level="easy", image_size=32)
    assert len(source) == 300
    assert [source[i].parts[0] for i in (0, 77, 299)] == [
        expected[i].parts[0] for i in (0, 77, 299)
    ]
    assert source[299].metadata == expected[299].metadata
    assert source[299].images[0].latents.shape == (64, 64)
    config, load = open_image_tokenizer(tokenizer)
    digest = image_tokenizer_digest(config, load())
    assert source.index["made_by"]["image_tokenizer"] == digest


def test_killed_and_started_again(start, unbroken, tmp_path):
    """kill -9 inside a shard that is not the first: the bytes are those of the unbroken run."""
    out = tmp_path / "out"
    process = start(out)
    for _ in range(60_000):
        whole = list(out.glob("*.arrayrecord"))
        if whole and list(out.glob("*.arrayrecord.unfinished")):
            break
        if process.poll() is not None:
            pytest.fail(f"ended before the first shard: {process.stdout.read()}")
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(list(out.glob("*.arrayrecord")))
    assert 1 <= kept < SHARDS
    assert not (out / "index.json").exists()
    assert f"{SHARDS - kept} shards made, {kept} kept" in finish(start(out))
    assert files(out) == files(unbroken[0])


def test_two_processes_at_once(start, unbroken, tmp_path):
    out = tmp_path / "out"
    processes = [start(out, f"--process_index={k}", "--process_count=2") for k in range(2)]
    outputs = [finish(process) for process in processes]
    assert all("3 shards made, 0 kept: 150 documents" in output for output in outputs)
    # At least the last one finds all shards.
    endings = {output.splitlines()[-1] for output in outputs}
    assert endings <= {f"written to {out}", f"other processes have shards to make for {out}"}
    assert f"written to {out}" in endings
    assert files(out) == files(unbroken[0])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--dtype=float16",
            "was begun with other settings: dtype: 'bfloat16' there, 'float16' now",
        ),
        ("--image_bases=32,x", "error: --image_bases=32,x must be numbers such as 256,512"),
    ],
)
def test_a_refusal_is_one_line(start, unbroken, flag, message):
    before = files(unbroken[0])
    line = finish(start(unbroken[0], flag), code=1).splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert files(unbroken[0]) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer={tmp}"], "error: {tmp} holds no image tokenizer"),
        (["--out={tmp}/file", "--num_documents=12"], "error: out={tmp}/file is not a folder"),
        (
            ["--source=images:{tmp}", "--split=heldout"],
            "error: --split=heldout: only shapes and photographs have splits, not "
            "--source=images:{tmp}",
        ),
    ],
)
def test_a_refusal_makes_nothing(start, tmp_path, flags, message):
    (tmp_path / "file").write_text("mine")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    line = finish(start(tmp_path / "out", *flags), code=1).splitlines()[-1]
    assert line.startswith(message.format(tmp=tmp_path))
    assert files(tmp_path) == {"file": b"mine"}


def test_help_says_what_sources_there_are_and_what_damaged_files_do():
    command = [sys.executable, PROGRAM, "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout
    words = " ".join(text.split())
    assert "images:PATH (without: documents are images alone)" in words
    assert "A document that cannot be used is skipped, counted by reason and logged" in words
