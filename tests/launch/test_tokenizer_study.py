"""The study's program at the smallest size: one cell from nothing to its report, and again."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from nextstep_jax.interop.model_directory import read_vae, read_vae_config

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def study(workdir, *arguments):
    sizes = {"tokenizer_steps": 2, "model_steps": 2, "num_documents": 24}
    sizes |= {"num_images": 8, "num_prompts": 3}
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/tokenizer_study.py"), f"--workdir={workdir}"]
        + [f"--{name}={value}" for name, value in sizes.items()]
        + list(arguments),
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow  # minutes: every program of a cell is compiled
def test_a_cell_from_nothing_to_the_report(tmp_path):
    done = study(tmp_path, "--cells=plain-0.5")
    assert done.returncode == 0, done.stderr
    row = re.search(r"^\| plain-0\.5 \| (.*) \|$", done.stdout, re.MULTILINE)
    assert len(row[1].split("|")) == 12
    # Without a norm the tokens are brought to mean 0 and variance 1; the parameters stay.
    first = read_vae_config(tmp_path / "plain-0.5" / "tokenizer")
    second, params = read_vae(tmp_path / "plain-0.5" / "calibrated")
    assert (first.scaling_factor, first.shift_factor) == (1.0, 0.0)
    quality = json.loads((tmp_path / "plain-0.5" / "quality.json").read_text())
    assert quality["scaling_factor"] == second.scaling_factor != 1.0
    assert quality["shapes"]["latents"]["all"]["variance"] == pytest.approx(1, rel=0.1)
    assert quality["shapes"]["latents"]["all"]["mean"] == pytest.approx(0, abs=0.1)
    assert set(params) == {"encoder", "decoder"}
    generation = json.loads((tmp_path / "plain-0.5" / "generation.json").read_text())
    assert 0.5 < generation["loss"] < 4
    assert generation["scores"]["1"]["all"]["total"] == 3
    assert list(generation["drift"]["guidance"]) == ["1.5", "3", "7", "15"]
    assert len(generation["drift"]["data"]["variance"]) == 16

    # Finished cells are kept as they are; another size is another study.
    before = (tmp_path / "plain-0.5" / "generation.json").stat().st_mtime_ns
    assert study(tmp_path, "--cells=plain-0.5").returncode == 0
    assert (tmp_path / "plain-0.5" / "generation.json").stat().st_mtime_ns == before
    other = study(tmp_path, "--cells=plain-0.5", "--model_steps=3")
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "model_steps" in other.stderr
    wrong = study(tmp_path, "--cells=layer-0.5")
    assert wrong.returncode == 1
    assert "layer-0.5" in wrong.stderr.strip().splitlines()[-1]
