import io
import json
import pickle
import sys
import threading

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nextstep_jax.data import files, tables
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Image, Text
from nextstep_jax.data.tables import JsonlSource, ParquetSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, columns, rows_per_group=4, types=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {k: pa.array(v, (types or {}).get(k)) for k, v in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=rows_per_group)


def pairs(numbers, form="bytes"):
    images = [picture(n) for n in numbers]
    if form == "struct":
        images = [
            {"bytes": image, "path": f"{n}.png"} for n, image in zip(numbers, images, strict=True)
        ]
    return {
        "id": list(numbers),
        "image": images,
        "caption": [f"no. {n}" for n in numbers],
        "short": [None if n % 3 else str(n) for n in numbers],
    }


def outcomes(source):
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].id)
        except DocumentError as error:
            found.append(error.reason)
    return found


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_pairs_of_parquet(tmp_path, form):
    """Two files, with row groups of 4 and one file without rows between them."""
    write(tmp_path / "p/a.parquet", pairs(range(10), form))
    write(tmp_path / "p/b.parquet", pairs([], form))
    write(tmp_path / "p/c/d.parquet", pairs(range(10, 15), form), rows_per_group=2)
    source = ParquetSource(tmp_path / "p", wording_columns=["short"])
    assert len(source) == 15
    order = np.random.default_rng(0).permutation(15)
    documents = {int(i): source[int(i)] for i in order}
    for i in range(15):
        name = f"a.parquet/{i}" if i < 10 else f"c/d.parquet/{i - 10}"
        document = documents[i]
        wordings = {} if i % 3 else {"caption": f"no. {i}", "short": str(i)}
        assert document.parts == (Text(f"no. {i}", wordings=wordings), Image(encoded=picture(i)))
        assert (document.id, document.kind, document.source) == (name, "pair", "parquet")
    for index in (-1, 15):
        with pytest.raises(IndexError):
            source[index]


def test_text_of_parquet(tmp_path):
    texts = ["first", " kept as it is\n", "third"]
    write(tmp_path / "a.parquet", {"body": texts}, types={"body": pa.large_string()})
    source = ParquetSource(tmp_path / "a.parquet", image_column=None, caption_column="body")
    assert [source[i].parts for i in range(3)] == [(Text(text),) for text in texts]
    assert {source[i].kind for i in range(3)} == {"text"}
    encoded = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"body": encoded}), tmp_path / "b.parquet")
    other = ParquetSource(tmp_path / "b.parquet", image_column=None, caption_column="body")
    assert [other[i].parts[0].text for i in range(3)] == texts


def test_only_the_columns_that_are_needed_are_read(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", pairs(range(12)))
    reads = []
    read = pq.ParquetFile.read_row_group

    def spy(self, group, columns, **options):
        reads.append((group, columns))
        return read(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    source = ParquetSource(tmp_path / "a.parquet")
    for i in (0, 3, 5, 1, 11, 4, 8):
        assert source[i].parts[0].text == f"no. {i}"
    # Three row groups fit into memory: each was decoded once.
    assert reads == [
        (0, ["caption", "image"]),
        (1, ["caption", "image"]),
        (2, ["caption", "image"]),
    ]
    monkeypatch.setattr(tables, "_NUM_GROUPS", 1)
    reads.clear()
    source = ParquetSource(tmp_path / "a.parquet")
    for i in (0, 4, 0):
        assert source[i].parts[0].text == f"no. {i}"
    assert [group for group, _ in reads] == [0, 1, 0]


def test_parquet_by_threads_and_after_pickling(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_NUM_GROUPS", 2)
    write(tmp_path / "a.parquet", pairs(range(30)))
    source = ParquetSource(tmp_path)
    found = {}

    def read(thread):
        order = np.random.default_rng(thread).permutation(30)
        found[thread] = {int(i): source[int(i)].parts[0].text for i in order}

    threads = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {i: f"no. {i}" for i in range(30)}
    assert all(found[n] == expected for n in range(6))
    copy = pickle.loads(pickle.dumps(source))
    assert {i: copy[i].parts[0].text for i in range(30)} == expected
    assert copy.fingerprint == source.fingerprint


def test_faults_of_rows(tmp_path):
    columns = pairs(range(8), "struct")
    columns["caption"][1], columns["caption"][2] = None, "  "
    columns["image"][3], columns["image"][4]["bytes"] = None, None
    columns["image"][5]["bytes"] = b""
    write(tmp_path / "b.parquet", columns)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet PAR1")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    source = ParquetSource(tmp_path)
    missing, empty = "missing_image", "empty_text"
    assert outcomes(source) == [
        *("unreadable", "b.parquet/0", empty, empty, missing, missing, missing),
        *("b.parquet/6", "b.parquet/7", "unreadable"),
    ]
    with pytest.raises(DocumentError, match=r"^b\.parquet/1: the column 'caption' is missing$"):
        source[2]
    # A row group whose bytes are damaged takes its rows with it and no others.
    offset = pq.ParquetFile(tmp_path / "b.parquet").metadata.row_group(1).column(1)
    start = offset.dictionary_page_offset or offset.data_page_offset
    damaged = bytearray(whole)
    damaged[start : start + 40] = b"\xff" * 40
    (tmp_path / "b.parquet").write_bytes(damaged)
    (tmp_path / "a.parquet").unlink()
    source = ParquetSource(tmp_path / "b.parquet")
    assert outcomes(source) == ["b.parquet/0", empty, empty, missing, *["unreadable"] * 4]


def test_mistakes_with_parquet(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", {**pairs(range(3)), "tags": [["a"], [], ["b"]]})
    refused = [
        ({"image_column": "jpg"}, "has no column 'jpg'; it has id, image, caption, short, tags"),
        ({"caption_column": "text"}, "has no column 'text'"),
        ({"wording_columns": ["alt"]}, "has no column 'alt'"),
        ({"caption_column": "tags"}, r"column 'tags' is list<.*>; needed are strings"),
        ({"image_column": "short"}, "'short' is string; needed are bytes, or structs with bytes"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            ParquetSource(tmp_path, **arguments)
    fingerprints = {
        ParquetSource(tmp_path, **a).fingerprint for a in ({}, {"caption_column": "short"})
    }
    assert len(fingerprints) == 2
    write(tmp_path / "none/a.parquet", {"caption": []}, types={"caption": pa.string()})
    with pytest.raises(ValueError, match="the parquet files have no rows"):
        ParquetSource(tmp_path / "none", image_column=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="broken: no parquet file can be read: "):
        ParquetSource(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"holds no file of the kind \*\.parquet"):
        ParquetSource(tmp_path / "*.txt")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"need pyarrow: pip install nextstep_jax\[parquet\]"):
        ParquetSource(tmp_path / "a.parquet")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines(tmp_path, end, last, monkeypatch):
    """Blocks of a few bytes: lines lie across their borders."""
    monkeypatch.setattr(tables, "_SCAN_BYTES", 7)
    texts = ["first", " schön\n", "third"]
    lines = [json.dumps({"n": i, "text": text, "id": "x"}) for i, text in enumerate(texts)]
    lines[1:1] = [""] * 2
    content = end.join(lines) + (end if last else "")
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "fourth"}')
    source = JsonlSource(tmp_path)
    documents = [source[i] for i in range(len(source))]
    assert [d.parts for d in documents] == [(Text(text),) for text in (*texts, "fourth")]
    assert [d.id for d in documents] == ["a.jsonl/1", "a.jsonl/4", "a.jsonl/5", "c.jsonl/1"]
    assert documents[1].metadata == {"n": 1, "id": "x"}
    assert {(d.kind, d.source) for d in documents} == {("text", "jsonl")}
    with pytest.raises(IndexError):
        source[4]


def test_lines_against_a_plain_reading(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(tables, "_SCAN_BYTES", 101)
    lines = [b"" if rng.random() < 0.3 else b"x" * int(rng.integers(1, 60)) for _ in range(300)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    scan = tables.scan_lines(str(tmp_path / "a.jsonl"))
    data = (tmp_path / "a.jsonl").read_bytes()
    found = [data[a:b] for a, b in zip(scan["start"], scan["stop"], strict=True)]
    assert found == [line for line in lines if line]
    assert scan["line"].tolist() == [i + 1 for i, line in enumerate(lines) if line]


def test_faults_of_lines(tmp_path):
    good = '{"text": "words"}'
    lines = [good, "{", '["a"]', '{"text": ""}', '{"text": 3}', '{"other": "x"}', "\x00\x00", good]
    lines += ['{"text": "\\ud800"}', " ", good[:-4]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = JsonlSource(tmp_path / "a.jsonl")
    assert outcomes(source) == [
        *("a.jsonl/1", "unreadable", "unreadable", "empty_text", "unreadable", "empty_text"),
        *("unreadable", "a.jsonl/8", "unreadable", "unreadable", "unreadable"),
    ]
    with pytest.raises(DocumentError, match=r"^a\.jsonl/4: the key 'text' is blank$"):
        source[3]
    with pytest.raises(DocumentError, match=r"^a\.jsonl/2: not JSON: "):
        source[1]
    # The file has become shorter since.
    (tmp_path / "a.jsonl").write_text(good)
    assert outcomes(source)[0] == "a.jsonl/1"
    assert set(outcomes(source)[1:]) == {"unreadable"}


def test_mistakes_with_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n{"title": "y"}\n')
    with pytest.raises(ValueError, match=r"have no key 'text'; they have body, id, title$"):
        JsonlSource(tmp_path)
    source = JsonlSource(tmp_path, text_key="body")
    assert outcomes(source) == ["a.jsonl/1", "empty_text"]
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"the \.jsonl files have no lines"):
        JsonlSource(tmp_path)


def test_lines_are_scanned_once_and_pickled(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SMALLEST_CACHED", 0)
    lines = "\n".join(json.dumps({"text": str(i)}) for i in range(50))
    (tmp_path / "a.jsonl").write_text(lines)
    first = JsonlSource(tmp_path)

    def refuse(path):
        raise AssertionError(f"{path} is scanned again")

    monkeypatch.setattr(tables, "scan_lines", refuse)
    for source in (JsonlSource(tmp_path), pickle.loads(pickle.dumps(first))):
        assert [source[i].parts[0].text for i in range(50)] == [str(i) for i in range(50)]
        assert source.fingerprint == first.fingerprint
