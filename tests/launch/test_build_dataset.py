"""The program as processes: a folder of photographs, killed, started again, refused."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nextstep_jax.data.building import BuildConfig, build_records
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.sources import ImageFolderSource

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "launch/build_dataset.py"
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
NUM = 120
NUM_SHARDS = 8


def start(*flags):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, PROGRAM, *flags], cwd=ROOT, env=ENV, **pipes)


def finish(process, code=0):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, output + errors
    assert "Traceback" not in errors, errors
    return output if code == 0 else errors.splitlines()[-1]


def outputs(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith("report.")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """120 captioned photographs of a megapixel, a few milliseconds each; two are damaged."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    large = PIL.Image.fromarray(pixels).resize((1200, 900))
    file = io.BytesIO()
    large.save(file, "JPEG")
    (folder / "000.jpg").write_bytes(file.getvalue())
    for n in range(NUM):
        if n:
            os.link(folder / "000.jpg", folder / f"{n:03}.jpg")
        (folder / f"{n:03}.txt").write_text(f"photo {n}")
    (folder / "050.jpg").unlink()
    (folder / "050.jpg").write_bytes(file.getvalue()[:5000])
    (folder / "070.txt").write_text("\n")
    return folder


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("records") / "unbroken"
    config = BuildConfig(num_shards=NUM_SHARDS)
    build_records(ImageFolderSource(photos), config, out, max_bad_fraction=0.02)
    return out


def test_a_folder_of_photographs_in_one_command(photos, tmp_path):
    out = tmp_path / "photos.rec"
    # --num_documents keeps the damaged ones out.
    output = finish(start(f"--source=folder:{photos}", f"--out={out}", "--num_documents=30"))
    lines = output.splitlines()
    assert lines[:5] == [
        "read       30 documents",
        "written    30: 30 pair",
        "skipped    0 (0.00%)",
        "images     30: 30 900x1200",
        f"text       {sum(len(f'photo {n}') for n in range(30))} characters",
    ]
    assert lines[-1] == f"written to {out}"
    source = RecordSource(out)
    assert len(source) == 30
    assert source[29].images[0].encoded == (photos / "029.jpg").read_bytes()
    assert (out / "report.txt").read_text() + lines[-1] + "\n" == output
    assert (out / "skipped.jsonl").read_text() == ""
    assert source.index["made_by"]["program"] == "build_dataset"


def children(pid):
    """The processes that one has started."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_alive(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # A zombie that nobody has waited for yet.
    return status.rpartition(")")[2].split()[0] != "Z"


def test_killed_and_started_again(photos, unbroken, tmp_path):
    """kill -9 in the middle: the workers end, too, and the bytes are those of an unbroken build."""
    out = tmp_path / "out"
    flags = [f"--source=folder:{photos}", f"--out={out}", f"--num_shards={NUM_SHARDS}"]
    flags += ["--max_bad_fraction=0.02"]
    process = start(*flags, "--num_workers=2")
    for _ in range(60_000):
        if list(out.glob("*.arrayrecord")) and list(out.glob("*.arrayrecord.unfinished")):
            break
        if process.poll() is not None:
            pytest.fail(f"ended before it could be killed: {process.communicate()}")
        time.sleep(0.001)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(1000):
        if not any(is_alive(pid) for pid in workers):
            break
        time.sleep(0.01)
    else:
        pytest.fail("workers outlive the program")
    process.communicate()
    kept = len(list(out.glob("*.arrayrecord")))
    assert 1 <= kept < NUM_SHARDS
    assert not (out / "index.json").exists()
    output = finish(start(*flags, "--num_workers=1"))
    assert f"this run   {NUM_SHARDS - kept} shards in " in output
    assert "skipped    2 (1.67%): 1 bad_image, 1 empty_text" in output
    assert outputs(out) == outputs(unbroken)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").open()]
    assert [(line["index"], line["reason"]) for line in lines] == [
        (50, "bad_image"),
        (70, "empty_text"),
    ]


def test_too_many_damaged_files_are_one_clear_line(photos, tmp_path):
    flags = [f"--source=folder:{photos}", f"--out={tmp_path}/out", "--num_shards=2"]
    line = finish(start(*flags, "--num_workers=1"), code=1)
    assert line.startswith(
        "error: 2 of 120 documents cannot be used, more than max_bad_fraction=0.01 allows:"
        " 1 bad_image, 1 empty_text (050.jpg: cannot decode the image: "
    )
    # The first shard, with its 60 documents, is there.
    assert len(list((tmp_path / "out").glob("*.arrayrecord"))) == 1


def test_a_refusal_is_one_line_and_makes_nothing(tmp_path):
    line = finish(start("--source=jsonl:x", "--kind=edit", f"--out={tmp_path}/out"), code=1)
    assert line == "error: --kind is for tars and shapes, not for --source=jsonl:x"
    assert not (tmp_path / "out").exists()


def test_workers_need_no_jax():
    """What a spawned worker imports: the program as a module, and no more."""
    program = (
        "import sys; sys.path.insert(0, 'launch'); import build_dataset;"
        "print([n for n in ('jax', 'flax', 'grain', 'pyarrow', 'ray') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_flags_reach_the_sources_that_have_such_arguments(tmp_path):
    """In a process of its own: the programs' flags have names in common."""
    columns = {"body": ["words"], "alt": ["more"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    program = f"""
import sys
sys.path.insert(0, 'launch')
from build_dataset import read_bases, read_source
edits = read_source('shapes:easy', {{'kind': 'edit', 'image_size': 48}})
print(edits.kind, edits.image_size, read_source('shapes:easy', {{}}).image_size)
columns = {{'image_column': '', 'caption_column': 'body', 'wording_columns': ['alt']}}
document = read_source('parquet:{tmp_path}', columns)[0]
print(document.kind, document.parts[0].text, dict(document.parts[0].wordings))
print(read_bases(['256', ' 512']))
try:
    read_bases(['256', 'x'])
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "edit 48 64",
        "text words {'body': 'words', 'alt': 'more'}",
        "(256, 512)",
        "--image_bases=256,x must be numbers such as 256,512",
    ], done.stderr
