"""The program as a process: the page of a folder of pictures, and what it refuses."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from nextstep_jax.data.text_tokenizer import train_bpe

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/preview_data.py"
CAPTIONS = ["a <b>red</b> field", "</script><script>alert(1)</script>", "a green field", "", "grey"]


@pytest.fixture(scope="module")
def preview_data():
    """The program as a module. Its flags are those of a process and must not stay in this one."""
    before = set(flags.FLAGS)
    module = importlib.import_module("launch.preview_data")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five pictures; the caption of one is empty, and another one is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        pixels = rng.integers(0, 256, (48, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:400])
    return folder


def run(*flags):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, PROGRAM, *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


SMALL = (
    *("--config.image_size=32", "--config.data.rows_per_batch=1", "--config.data.prefetch=0"),
    *("--config.data.row_length=128", "--config.data.num_open_rows=1"),
)


def test_page_of_a_folder(photos, tmp_path):
    out = tmp_path / "preview.html"
    done = run(f"--config=configs/folder.py:{photos}", f"--out={out}", "--n=5", *SMALL)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    data = json.loads(re.search(r'id="preview-data">(.*)</script>', page)[1])
    documents, totals = data["documents"], data["totals"]
    assert len(documents) == 5 and totals["row_length"] == 128
    assert {document["kind"] for document in documents} == {"pair"}
    # The layout capitalises some.
    texts = {part["text"].lower() for one in documents for part in one["parts"] if "text" in part}
    assert texts <= {CAPTIONS[0], CAPTIONS[1], CAPTIONS[2]} and len(texts) > 1
    # 48 x 80 is nearest to 5 : 3 of the shapes that base 32 has, which is its square alone.
    assert {tuple(one["images"][0]["size"]) for one in documents} == {(32, 32)}
    (source,) = data["sources"]
    skipped = {entry["reason"]: entry["documents"] for entry in data["skipped"]}
    assert set(skipped) == {"bad_image", "empty_text"}
    assert (source["name"], source["documents"]) == ("photos", 5)
    bad = sum(skipped.values())
    assert data["problems"] == [
        f"{bad} of the {source['read']} documents read of source 'photos' are bad, more than"
        " data.max_bad_fraction=0.01 allows in the long run"
    ]
    assert f"padding {totals['padding_share']:.1%}, 1 problems: written to {out}" in done.stdout
    assert data["config"]["data"]["row_length"] == 128 and data["command_line"][-5:] == list(SMALL)
    assert page.count("<script") == 2


def test_the_tokenizer_of_a_run(preview_data, tmp_path):
    tokenizer = train_bpe(["a red circle"] * 3, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    sources = {"x": ([], 1.0)}  # Not read.
    for path, workdir in ((tmp_path / "tokenizer.json", None), (None, tmp_path)):
        paths = [path and str(path), workdir and str(workdir)]
        found = preview_data.open_text_tokenizer(*paths, sources, 512)
        assert found.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="both name a tokenizer"):
        preview_data.open_text_tokenizer("a", "b", sources, 512)
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        preview_data.open_text_tokenizer(None, str(tmp_path / "no"), sources, 512)


@pytest.mark.parametrize(
    ("out", "n", "num_batches", "message"),
    [
        ("no/preview.html", 1, 1, "no/preview.html must be a file in a folder that exists"),
        ("", 1, 1, "must be a file in a folder that exists"),
        ("preview.html", 0, 1, "--n=0 must be at least 1"),
        ("preview.html", 1, -1, "--num_batches=-1 must be at least 1"),
    ],
)
def test_refusals(preview_data, tmp_path, out, n, num_batches, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        preview_data.check_flags(tmp_path / out, n, num_batches)
    assert not list(tmp_path.iterdir())
