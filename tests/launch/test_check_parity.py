import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from launch.check_parity import main, parse_flags
from nextstep_jax.evaluation.recorded_run import RecordedRun
from tests.published_files import CASE

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/check_parity.py"


@pytest.fixture
def recording(tmp_path):
    """A copy to be spoilt."""
    return pathlib.Path(shutil.copytree(CASE, tmp_path / "case"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two stages of the eight: all of them run in tests/evaluation/test_recorded_run.py."""

    def compare_some(self, *, august_loss):
        assert august_loss
        yield from self.compare_head()
        yield from self.compare_decoder()

    monkeypatch.setattr(RecordedRun, "compare_all", compare_some)


def run(capsys, *flags):
    """Exit status and the lines of the table and what follows it."""
    with pytest.raises(SystemExit) as caught:
        main(parse_flags([PROGRAM, *map(str, flags)]))
    return caught.value.code, capsys.readouterr().out.splitlines()


def change(path, name, by):
    with np.load(path) as arrays:
        arrays = dict(arrays)
    arrays[name].flat[3] += by * np.abs(arrays[name]).max()
    np.savez(path, **arrays)


def test_pass(capsys):
    status, lines = run(capsys, f"--golden={CASE}")
    assert status == 0
    assert lines[-1] == "PASS 3/3"
    assert lines[0].split() == ["quantity", "shape", "max", "abs", "max", "rel", "tolerance"]
    rows = [line.split() for line in lines[1:4]]
    assert [(row[0], row[1], row[-2], row[-1]) for row in rows] == [
        ("head_v", "5x64", "1e-05", "pass"),
        ("hidden", "2x28x64", "1e-05", "pass"),
        ("logits", "2x28x512", "1e-05", "pass"),
    ]
    assert all(0 < float(row[3]) < 1e-5 for row in rows)
    # What this quick form leaves out is said.
    assert lines[4].startswith("not compared: cps_m1_plain/out, ")
    assert "vae_dec" in lines[4]


def test_a_changed_value_fails(recording, capsys):
    change(recording / "golden.npz", "hidden", 2e-5)
    status, lines = run(capsys, f"--golden={recording}")
    assert status == 1
    assert lines[-1] == "FAIL 1/3"
    assert [line.split()[0] for line in lines if line.endswith("FAIL")] == ["hidden"]
    # Within a looser tolerance, given for all.
    status, lines = run(capsys, f"--golden={recording}", "--rtol=1e-4")
    assert (status, lines[-1]) == (0, "PASS 3/3")


def test_a_tolerance_that_nothing_meets(capsys):
    status, lines = run(capsys, f"--golden={CASE}", "--rtol=1e-12")
    assert (status, lines[-1]) == (1, "FAIL 3/3")
    assert [line.split()[-2:] for line in lines[1:4]] == [["1e-12", "FAIL"]] * 3


def test_a_changed_weight_fails(recording, capsys):
    """In the file, hence through the importer."""
    path = recording / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    weight = safetensors.numpy.load_file(path)["image_head.net.input_proj.weight"]
    place = content.find(weight.tobytes())
    assert place > 0
    content[place : place + 4] = np.float32(weight.flat[0] + 1).tobytes()
    path.write_bytes(content)
    status, lines = run(capsys, f"--golden={recording}")
    assert (status, lines[-1]) == (1, "FAIL 1/3")
    assert (lines[1].split()[0], lines[1].split()[-1]) == ("head_v", "FAIL")


def edit(**changes):
    """Changes the settings of a recording."""

    def spoil(folder):
        values = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**values, **changes}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d / "model"), "config.json is not there"),
        (lambda d: shutil.rmtree(d / "vae"), "no image tokenizer (a folder with config.json) in"),
        (lambda d: (d / "golden.npz").unlink(), "golden.npz"),
        (lambda d: (d / "golden.npz").write_bytes(b"PK"), "golden.npz is no .npz file, or is cut"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json is not JSON"),
        (lambda d: (d / "samplers.json").unlink(), "samplers.json is not there"),
        (lambda d: (d / "vae" / "checkpoint.pt").write_bytes(b"PK"), "checkpoint.pt is cut off"),
        (
            lambda d: np.savez(d / "golden.npz", vae_in=np.ones(3)),
            "npz lacks vae_moments, vae_mean",
        ),
        (edit(steps=None, cfg="x"), "meta.json: cfg='x' is no number; steps=None is no count"),
        (edit(sched="cosine"), "meta.json: sched='cosine' is no schedule"),
        (edit(latent_hw=[2, 4]), "gen_tokens has 16 tokens, latent_hw is 2x4"),
    ],
)
def test_what_is_wrong_is_one_line(recording, spoil, message):
    spoil(recording)
    with pytest.raises(SystemExit) as caught:
        main(parse_flags([PROGRAM, f"--golden={recording}"]))
    assert str(caught.value.code).startswith("error: ")
    assert message in caught.value.code
    assert "\n" not in caught.value.code


def test_the_program(tmp_path):
    """As a process: one line for what is not there."""
    command = [sys.executable, PROGRAM, f"--golden={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith("none/model/config.json is not there")
    assert "Traceback" not in done.stderr


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_flags([PROGRAM, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python launch/check_parity.py --golden=recordings/case-a" in printed
    for name in ("--rtol", "--no-august_loss"):
        assert name in printed
