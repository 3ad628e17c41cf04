"""The program as a process: what it refuses before Ray starts, and (slow) both passes."""

import os
import pathlib
import subprocess
import sys

import PIL.Image
import pytest

from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.shapes import ShapesSource

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*flags, timeout=60):
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": ""}
    command = [sys.executable, "launch/curate.py", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config=configs/curate_images.py", "--config.stages.clarity.side=1"],
            "error: clarity.side=1 must be an integer of at least 3",
        ),
        (
            ["--config=configs/curate_images.py", "--select=absent", "--rule=clarity=1:2:3"],
            "error: --rule=clarity=1:2:3 must be like",
        ),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    done = run(*flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_photographs(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    source = ShapesSource("pair", image_size=128)
    for i in range(10):
        PIL.Image.fromarray(source[i].images[0].pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(source[i].parts[0].text)
    (photos / "7.png").write_bytes(b"no image")
    scored, chosen = tmp_path / "scored", tmp_path / "chosen"
    done = run(
        f"--config=configs/curate_images.py:folder:{photos}",
        *(f"--out={scored}", "--num_tasks=1", "--config.documents_per_shard=4"),
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "scored 9 of 10 documents; could not be used: bad_image 1" in done.stdout
    done = run(
        *("--config=configs/curate_images.py", f"--select={scored}", f"--out={chosen}"),
        *("--num_tasks=1", "--rule=min_side=128:", "--rule=clarity=:"),
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "kept 9 of 9 documents" in done.stdout
    assert len(RecordSource(chosen)) == 9
    assert (chosen / "report.html").stat().st_size > 10_000
