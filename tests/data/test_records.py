import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from nextstep_jax.data import record_writer, records
from nextstep_jax.data.record_writer import ShardWriter, create_json, shard_name, write_index
from nextstep_jax.data.records import (
    RecordSource,
    check_records,
    decode_document,
    encode_document,
    read_index,
)
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.data.sources import DocumentSource, source_fingerprint

RNG = np.random.default_rng(0)
METADATA = {"a": [1, 2.5, None, True, {"b": "ü"}], "seed": 2**63, "x": 0.1, "none": {}}


def png(height, width):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def latent_image(rows, columns, dtype=ml_dtypes.bfloat16, width=8, **more):
    tokens = RNG.standard_normal((rows * columns, width)).astype(dtype)
    return Image(latents=tokens, grid=(rows, columns), **more)


def documents():
    """All kinds of documents, all forms of images, both flags."""
    pixels = RNG.integers(0, 256, (3, 32, 48, 3)).astype(np.uint8)
    return [
        Document((Text("only words", loss=False), Text("")), "t/0", "texts", "text", METADATA),
        Document((Text("a wide picture"), Image(pixels=pixels[0])), "p/1", "a", "pair"),
        Document((Text("ein Bild"), Image(encoded=png(24, 16))), "p/2", "a", "pair", {"k": []}),
        Document(
            (Image(pixels=pixels[1], loss=False), Text("turn it"), Image(pixels=pixels[2])),
            *("e/3", "b", "edit"),
        ),
        Document(
            (Text("first"), latent_image(2, 3), Text("then"), latent_image(4, 1, loss=False)),
            *("i/4", "c", "interleaved", METADATA),
        ),
        Document((), "empty/5", "c", "text"),
    ]


def assert_same(one, other):
    """Equal in every field; arrays bit for bit, with their dtypes."""
    assert (one.id, one.source, one.kind) == (other.id, other.source, other.kind)
    assert one.metadata == other.metadata
    assert len(one.parts) == len(other.parts)
    for a, b in zip(one.parts, other.parts, strict=True):
        assert type(a) is type(b)
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, np.ndarray):
                assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
            else:
                assert x == y, field.name


def write(root, documents, num_shards=2, made_by=None):
    root.mkdir(parents=True, exist_ok=True)
    for k in range(num_shards):
        with ShardWriter(root / shard_name(k, num_shards)) as writer:
            for document in documents[k::num_shards]:
                writer.write(document)
    return write_index(root, num_shards, made_by or {"who": "test"})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "rec", documents())
    return tmp_path / "rec"


@pytest.mark.parametrize("document", documents(), ids=lambda d: d.id)
def test_round_trip(document):
    record = encode_document(document)
    assert_same(decode_document(record), document)
    assert encode_document(decode_document(record)) == record


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_round_trip_of_every_bit_of_latents(dtype):
    """All 65536 patterns of the 16-bit types, infinities and NaN among them."""
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits.view(dtype) if np.dtype(dtype).itemsize == 2 else bits.astype(np.float32)
    image = Image(latents=bits.reshape(-1, 64), grid=(32, 32), loss=False)
    document = Document((image,), "bits", "x", "interleaved")
    assert_same(decode_document(encode_document(document)), document)


@pytest.mark.parametrize("kind", ["text", "pair", "edit", "interleaved"])
def test_round_trip_of_the_built_in_world(kind):
    """Its metadata, with scenes and claims, come back as they are, floats bit for bit."""
    for document in (ShapesSource(kind, image_size=32)[i] for i in range(5)):
        assert_same(decode_document(encode_document(document)), document)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"a": [{"b": np.float32(1)}]}}, r"metadata.a\[0\].b is a float32"),
        ({"metadata": {"m": {3: 1}}}, "metadata.m has the key 3"),
        ({"metadata": {"a": 2**64}}, "Integer value out of range"),
        ({"kind": "video"}, "kind 'video' is none of text, pair"),
        ({"parts": (Image(pixels=np.zeros((4, 4), np.uint8)),)}, r"pixels must be uint8"),
        ({"parts": (Image(latents=np.zeros((4, 2)), grid=(2, 2)),)}, "latents are float64"),
        (
            {"parts": (Image(latents=np.zeros((4, 2), np.float16), grid=(2, 3)),)},
            r"latents of shape \(4, 2\) do not fill grid 2x3",
        ),
    ],
)
def test_what_cannot_be_written_names_the_document(changes, message):
    document = Document((), "d", "s", "text")
    for name, value in changes.items():
        object.__setattr__(document, name, value)  # past the check of annotations
    with pytest.raises(ValueError, match=f"document s/d: {message}"):
        encode_document(document)


def test_damaged_records_are_refused():
    """Whatever is cut off or changed: a ValueError, or another valid document; nothing else."""
    refused = 0
    for document in documents():
        record = encode_document(document)
        for end in range(len(record)):
            with pytest.raises(ValueError, match="record"):
                decode_document(record[:end])
        for _ in range(300):
            spoilt = bytearray(record)
            spoilt[RNG.integers(min(len(record), 200))] = RNG.integers(256)
            try:
                decode_document(bytes(spoilt))
            except ValueError as error:
                assert "record" in str(error)
                refused += 1
    assert refused > 300
    with pytest.raises(ValueError, match="record of format 2, this version reads 1"):
        decode_document(
            encode_document(documents()[0]).replace(b"\xa6format\x01", b"\xa6format\x02")
        )


def test_source_holds_the_documents(folder):
    source = RecordSource(folder)
    assert isinstance(source, DocumentSource)
    written = documents()  # drawn anew: only ids and texts can be compared
    order = [*range(0, 6, 2), *range(1, 6, 2)]
    assert [source[i].id for i in range(len(source))] == [written[i].id for i in order]
    assert len(source) == 6
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source[index]
    assert source_fingerprint(source) == f"RecordSource {source.fingerprint}"


def test_shards_have_one_record_a_chunk(folder):
    """Else random access would read, and keep, its neighbours."""
    reader = ArrayRecordReader(str(folder / shard_name(0, 2)))
    assert "group_size:1," in reader.writer_options_string()


def test_index_counts(folder):
    index = read_index(folder)
    assert index["documents"] == 6
    assert index["kinds"] == {"edit": 1, "interleaved": 1, "pair": 2, "text": 2}
    assert index["images"] == {
        "pixels": {"32x48": 3},
        "encoded": {"24x16": 1},
        "latents": {"2x3": 1, "4x1": 1},
    }
    assert index["image_tokens"] == 10
    assert index["text_characters"] == sum(
        len(p.text) for d in documents() for p in d.parts if isinstance(p, Text)
    )
    assert index["latents"] == {"dtype": "bfloat16", "token_dim": 8}
    assert index["made_by"] == {"who": "test"}
    assert [shard["documents"] for shard in index["shards"]] == [3, 3]
    sizes = [(folder / shard["name"]).stat().st_size for shard in index["shards"]]
    assert [shard["bytes"] for shard in index["shards"]] == sizes
    assert index["bytes"] == sum(sizes)


def test_the_same_documents_give_the_same_bytes_and_fingerprint(tmp_path):
    some, other = documents(), documents()
    for name, which in (("a", some), ("deep/b", some), ("c", other)):
        write(tmp_path / name, which)

    def files(name):
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    assert files("a") == files("deep/b")
    a, b, c = (RecordSource(tmp_path / name).fingerprint for name in ("a", "deep/b", "c"))
    assert a == b
    assert a != c  # other pixels
    write(tmp_path / "d", some, num_shards=3)
    assert RecordSource(tmp_path / "d").fingerprint != a  # another order


def test_a_file_is_created_once(tmp_path):
    path = tmp_path / "x.json"
    assert create_json(path, {"a": 1})
    assert not create_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_read_by_threads_and_after_pickling(tmp_path, monkeypatch):
    """More shards than are held open at a time, read from eight threads."""
    monkeypatch.setattr(records, "_MAX_OPEN", 2)
    some = [Document((Text(str(i)),), f"d/{i}", "s", "text") for i in range(60)]
    write(tmp_path / "rec", some, num_shards=6)
    source = RecordSource(tmp_path / "rec")
    expected = [source[i].id for i in range(60)]
    assert sorted(expected) == sorted(d.id for d in some)
    found = {}

    def read(thread):
        order = np.random.default_rng(thread).permutation(60)
        found[thread] = {int(i): source[int(i)].id for i in order}

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[n] == dict(enumerate(expected)) for n in range(8))
    assert len(source._readers) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i].id for i in range(60)] == expected
    assert copy.fingerprint == source.fingerprint


def damage(folder):
    """Flips a byte among the records of a shard."""
    path = folder / shard_name(1, 2)
    content = bytearray(path.read_bytes())
    content[30_000] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_record_names_shard_and_record(tmp_path):
    noise = RNG.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    some = [Document((Image(pixels=p),), f"d/{i}", "s", "interleaved") for i, p in enumerate(noise)]
    write(tmp_path / "rec", some)
    damage(tmp_path / "rec")
    source = RecordSource(tmp_path / "rec")
    errors = []
    for index in range(8):
        try:
            assert_same(source[index], [*some[0::2], *some[1::2]][index])
        except ValueError as error:
            errors.append((index, str(error)))
    assert 1 <= len(errors) <= 2
    index, message = errors[0]
    assert index >= 4
    assert f"{shard_name(1, 2)}, record {index - 4}: " in message


def spoil_end(path):
    content = bytearray(path.read_bytes())
    content[-(2**16) :] = bytes(2**16)
    path.write_bytes(content)


def edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "index.json").unlink(), "is unfinished: 2 whole shards, no index.json"),
        (shutil.rmtree, "is no records folder: it has no index.json"),
        (lambda d: (d / shard_name(0, 2)).unlink(), "says: shard-00000-of-00002.* is missing"),
        (lambda d: os.truncate(d / shard_name(1, 2), 70000), "has 70000 bytes instead of 1"),
        (
            lambda d: edit_index(d, lambda i: i["shards"][1].update(documents=4)),
            "has 3 documents instead of 4",
        ),
        (lambda d: spoil_end(d / shard_name(1, 2)), "has 0 documents instead of 3"),
        (lambda d: edit_index(d, lambda i: i.update(format=7)), "of format 7, this version reads"),
        (lambda d: edit_index(d, lambda i: i.pop("shards")), "is not the index of a records"),
        (lambda d: (d / "index.json").write_text("[1]"), "is not the index of a records"),
        (lambda d: (d / "index.json").write_text("{"), "is not the index of a records"),
    ],
)
def test_unfinished_and_inconsistent_folders_are_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        RecordSource(folder)


def test_all_faults_are_listed(tmp_path):
    write(tmp_path / "rec", documents() * 4, num_shards=12)
    for k in range(12):
        (tmp_path / "rec" / shard_name(k, 12)).unlink()
    with pytest.raises(ValueError, match=r"00000-of.*00009-of.* and 2 more") as caught:
        RecordSource(tmp_path / "rec")
    assert "00010-of" not in str(caught.value)


def test_an_interrupted_shard_has_no_final_name(tmp_path):
    path = tmp_path / shard_name(0, 1)
    with pytest.raises(KeyboardInterrupt), ShardWriter(path) as writer:
        writer.write(documents()[0])
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == [path.name + ".unfinished"]
    assert write_index(tmp_path, 1, {}) is None
    with pytest.raises(ValueError, match="is unfinished: 0 whole shards"):
        RecordSource(tmp_path)
    # The next writer begins anew and leaves nothing of the first.
    write(tmp_path, documents()[1:3], num_shards=1)
    assert [d.id for d in map(RecordSource(tmp_path).__getitem__, range(2))] == ["p/1", "p/2"]
    assert len(list(tmp_path.iterdir())) == 3


def test_two_writers_of_one_shard_are_refused(tmp_path):
    """Also in another process; a process that dies holds nothing."""
    path = tmp_path / shard_name(0, 1)
    code = (
        "import sys, pathlib, os; from nextstep_jax.data.record_writer import ShardWriter\n"
        "w = ShardWriter(pathlib.Path(sys.argv[1])); print('in', flush=True); sys.stdin.read()\n"
        "os._exit(9)"
    )
    command = [sys.executable, "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="is being written by another process"):
        ShardWriter(path)
    process.communicate("", timeout=30)
    write(tmp_path, documents(), num_shards=1)
    assert len(RecordSource(tmp_path)) == 6


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    """What does not come back from the disk gets no name."""
    monkeypatch.setattr(record_writer, "num_records", lambda path: 1)
    with pytest.raises(OSError, match="wrote 2 documents, found 1"):
        write(tmp_path, documents()[:2], num_shards=1)
    assert not (tmp_path / shard_name(0, 1)).exists()


def test_latents_of_a_folder_have_one_form(tmp_path):
    def document(dtype, width=8):
        return Document((latent_image(1, 1, dtype, width),), "d", "s", "interleaved")

    for other in (document(np.float32), document(np.float16, 16)):
        with pytest.raises(ValueError, match=r"document s/d: latents .* among"):
            write(tmp_path / "one", [document(np.float16), other], num_shards=1)
        with pytest.raises(ValueError, match="hold latents of different forms"):
            write(tmp_path / "two", [document(np.float16), other], num_shards=2)


def test_check_records(folder, tmp_path):
    """Everything that does not fit is said at once."""
    write(tmp_path / "ours", documents()[4:], made_by={"image_tokenizer": "abc"})
    source = RecordSource(tmp_path / "ours")
    fits = {"latents": True, "token_dim": 8, "grids": [(2, 3), (4, 1)], "image_tokenizer": "abc"}
    check_records(source, "x", **fits)
    check_records(source, "x", **{**fits, "image_tokenizer": None})
    for change, message in (
        ({"latents": False}, "they hold latents, which data.latents=True takes"),
        ({"token_dim": 64}, "token_dim=8, the model has 64"),
        ({"grids": [(2, 3)]}, r"grids \['4x1'\] are none of the run's \['2x3'\]"),
        ({"image_tokenizer": "abe"}, "made by image tokenizer abc, the run's is abe"),
    ):
        with pytest.raises(ValueError, match=f"source 'x': these records do not fit: {message}$"):
            check_records(source, "x", **{**fits, **change})
    with pytest.raises(ValueError, match=r"token_dim=8.*grids.*made by"):
        check_records(source, "x", latents=True, token_dim=4, grids=[], image_tokenizer="")
    pixels = write(tmp_path / "pixels", documents()[:2])
    assert pixels["latents"] is None
    source = RecordSource(tmp_path / "pixels")
    check_records(source, "x", **{**fits, "latents": False})
    with pytest.raises(ValueError, match=r"they hold pixels, .* takes latents"):
        check_records(source, "x", **fits)
    write(tmp_path / "texts", documents()[:1], num_shards=1)
    check_records(RecordSource(tmp_path / "texts"), "x", **fits)
