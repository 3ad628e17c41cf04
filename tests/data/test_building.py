import collections
import dataclasses
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nextstep_jax.data import building, building_workers, source_types
from nextstep_jax.data.building import BuildConfig, build_records, estimate_num_shards
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.record_writer import shard_name, shard_range
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.data.sources import ImageFolderSource
from nextstep_jax.data.tables import JsonlSource, ParquetSource
from nextstep_jax.data.webdataset import WebDatasetSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number, size=(24, 40), kind="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb(side=60_000):
    """A PNG file of a few bytes that claims side x side pixels."""

    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def outputs(out):
    """Everything but the report, which holds times."""
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith("report.")}


def ids(source):
    return [source[i].id for i in range(len(source))]


def add(tar, name, content):
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


@dataclasses.dataclass(frozen=True)
class Words:
    """Short texts, every tenth of them damaged; `fail_at` ends the program there."""

    num: int = 60
    fail_at: int | None = dataclasses.field(default=None, repr=False)

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        if index == self.fail_at:
            raise RuntimeError("the machine dies")
        if index % 10 == 3:
            raise DocumentError("empty_text", f"words/{index}: blank")
        return Document((Text(f"text {index}"),), f"words/{index}", "words", "text")


def test_every_kind_of_source_comes_back_as_it_was(tmp_path):
    images = [picture(n, kind="JPEG") for n in range(5)]
    (tmp_path / "photos").mkdir()
    for n, image in enumerate(images):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(image)
        caption = {"caption": f"photo {n}", "short": str(n), "stars": n}
        (tmp_path / "photos" / f"{n}.json").write_text(json.dumps(caption))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            story = {"caption": f"<image_1>then {n}<image_2>", "kind": "edit"}
            add(tar, f"{n}.json", json.dumps(story).encode())
            add(tar, f"{n}-1.jpg", images[n])
            add(tar, f"{n}-2.jpg", images[n + 1])
    columns = {"image": images, "caption": [f"row {n}" for n in range(5)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {n}"}) for n in range(7))
    )
    named = {
        "folder": f"folder:{tmp_path}/photos",
        "tars": f"tars:{tmp_path}/*.tar",
        "parquet": f"parquet:{tmp_path}/a.parquet",
        "jsonl": f"jsonl:{tmp_path}/a.jsonl",
        "images": f"images:{tmp_path}/photos",
        "shapes": "shapes:easy",
        "records": f"records:{tmp_path}/out/folder",
    }
    expected = {
        "folder": [
            Document(
                (
                    Text(f"photo {n}", wordings={"caption": f"photo {n}", "short": str(n)}),
                    Image(encoded=images[n]),
                ),
                *(f"{n}.jpg", "folder", "pair", {"stars": n}),
            )
            for n in range(5)
        ],
        "tars": [
            Document(
                (
                    Image(encoded=images[n], loss=False),
                    Text(f"then {n}"),
                    Image(encoded=images[n + 1]),
                ),
                *(f"a.tar/{n}", "tars", "edit", {"kind": "edit"}),
            )
            for n in range(3)
        ],
        "parquet": [
            Document(
                (Text(f"row {n}"), Image(encoded=images[n])), f"a.parquet/{n}", "parquet", "pair"
            )
            for n in range(5)
        ],
        "jsonl": [
            Document((Text(f"line {n}"),), f"a.jsonl/{n + 1}", "jsonl", "text") for n in range(7)
        ],
        "images": [
            Document((Image(encoded=images[n]),), f"{n}.jpg", "images", "pair") for n in range(5)
        ],
    }
    expected["records"] = expected["folder"]
    world = ShapesSource("pair", level="easy", image_size=32)
    for name, text in named.items():
        source = source_types.source_from_text(text, 32)
        out, config = tmp_path / "out" / name, BuildConfig(num_documents=3, num_shards=2)
        report = build_records(source, config, out)
        written = RecordSource(out)
        assert (len(written), report.as_dict()["documents_written"]) == (3, 3)
        for i in range(3):
            if name == "shapes":
                assert written[i].parts[0] == world[i].parts[0]
                found, drawn = written[i].images[0].pixels, world[i].images[0].pixels
                np.testing.assert_array_equal(found, drawn)
            else:
                assert written[i] == expected[name][i]
        if name == "folder":
            build_records(source, dataclasses.replace(config, num_documents=None), tmp_path / "all")
    assert ids(RecordSource(tmp_path / "all")) == [f"{n}.jpg" for n in range(5)]


def damaged_set(folder):
    """Tars, a table, lines and a folder with one of each kind of damage; what is to be skipped."""
    image = picture(0)
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for n in range(40):
            text = {5: b"{broken", 9: b'{"caption": " "}', 13: b'{"caption": "x <image_7>"}'}
            add(tar, f"{n:02}.json", text.get(n, b'{"caption": "see <image_1>"}'))
            data = {17: b"garbage", 21: image[: len(image) // 2], 25: bomb(), 29: bomb(10_000)}
            if n != 33:
                add(tar, f"{n:02}-1.png", data.get(n, image))
    whole = (folder / "a.tar").read_bytes()
    with tarfile.open(folder / "a.tar") as tar:
        last = tar.getmembers()[-1]
    # The cut goes through the last image, of document 39.
    (folder / "a.tar").write_bytes(whole[: last.offset_data + 100])
    bad = {5: "unreadable", 9: "empty_text", 13: "missing_image", 17: "bad_image"}
    bad |= {21: "bad_image", 25: "decompression_bomb", 29: "decompression_bomb"}
    return bad | {33: "missing_image", 39: "unreadable"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_damaged_is_skipped_and_everything_else_arrives_once(tmp_path):
    bad = damaged_set(tmp_path / "tars")
    source = WebDatasetSource(tmp_path / "tars")
    assert len(source) == 40
    config = BuildConfig(num_shards=3)
    report = build_records(source, config, tmp_path / "out", max_bad_fraction=0.25)
    written = RecordSource(tmp_path / "out")
    assert ids(written) == [f"a.tar/{n:02}" for n in range(40) if n not in bad]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    assert {line["index"]: line["reason"] for line in lines} == bad
    assert [line["index"] for line in lines] == sorted(bad)
    assert all(line["message"].startswith(f"a.tar/{line['index']:02}: ") for line in lines)
    counts = dict(collections.Counter(bad.values()))
    assert written.index["skipped"] == counts
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values == report.as_dict()
    assert (values["documents_read"], values["documents_written"]) == (40, 31)
    assert (values["skipped"], values["kinds"]) == (counts, {"pair": 31})
    assert (values["images"], values["image_sizes"]) == (31, {"24x40": 31})
    assert values["text_characters"] == 31 * len("see ")
    assert values["tokens"] == {"text": None, "image": None}
    assert values["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "out").glob("*.arrayrecord")
    )
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "skipped    9 (22.50%): 2 bad_image, 2 decompression_bomb, 1 empty_text," in text
    # Without the check, the images are nobody's business: 17, 21, 25 and 29 pass.
    loose = dataclasses.replace(config, verify=False)
    build_records(source, loose, tmp_path / "loose", max_bad_fraction=0.25)
    assert RecordSource(tmp_path / "loose").index["skipped"] == {
        "empty_text": 1,
        "missing_image": 2,
        "unreadable": 2,
    }


@pytest.mark.parametrize("fail_at", [2, 29, 59])
def test_a_restart_gives_the_bytes_of_the_unbroken_build(tmp_path, fail_at):
    config = BuildConfig(num_shards=4)
    allowed = {"max_bad_fraction": 0.1}
    build_records(Words(), config, tmp_path / "whole", **allowed)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="the machine dies"):
        build_records(Words(fail_at=fail_at), config, out, **allowed)
    kept = [k for k in range(4) if fail_at >= shard_range(k, 4, 60).stop]
    assert sorted(p.name for p in out.glob("*.arrayrecord")) == [shard_name(k, 4) for k in kept]
    assert not (out / "index.json").exists()
    report = build_records(Words(), config, out, **allowed)
    assert (report.num_made, report.num_read) == (4 - len(kept), 60 - 15 * len(kept))
    assert outputs(out) == outputs(tmp_path / "whole")
    # Once more: nothing to do, and the report of the work stays.
    before = (out / "report.json").read_text()
    assert build_records(Words(fail_at=0), config, out, **allowed).num_made == 0
    assert (out / "report.json").read_text() == before
    # A shard is lost: the list of skipped documents of the others is not.
    (out / shard_name(2, 4)).unlink()
    assert build_records(Words(), config, out, **allowed).num_made == 1
    assert outputs(out) == outputs(tmp_path / "whole")


def test_processes_give_the_same_bytes(tmp_path):
    """Photographs by two spawned workers and by this process."""
    (tmp_path / "photos").mkdir()
    for n in range(24):
        (tmp_path / "photos" / f"{n:02}.png").write_bytes(picture(n) if n % 8 else b"no image")
        (tmp_path / "photos" / f"{n:02}.txt").write_text(f"photo {n}")
    source, config = ImageFolderSource(tmp_path / "photos"), BuildConfig(num_shards=5)
    reports = [
        build_records(source, config, tmp_path / str(n), num_workers=n, max_bad_fraction=0.2)
        for n in (1, 2)
    ]
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2")
    assert reports[0].index["skipped"] == {"bad_image": 3}
    # Too many bad ones stop the processes, too.
    with pytest.raises(ValueError, match=r"of 24 documents cannot be used, more than max_bad_f"):
        build_records(source, config, tmp_path / "out", num_workers=2, max_bad_fraction=0.1)
    assert not (tmp_path / "out" / "index.json").exists()


def test_too_many_bad_documents_end_the_build_at_once(tmp_path):
    """3, 13, 23 and 33 are bad; the fourth of them is more than 5% of 60."""
    config, out = BuildConfig(num_shards=6), tmp_path / "out"
    with pytest.raises(ValueError) as caught:
        build_records(Words(fail_at=34), config, out, max_bad_fraction=0.05)
    assert str(caught.value).startswith(
        "4 of 60 documents cannot be used, more than max_bad_fraction=0.05 allows: 4 empty_text"
        " (words/3: blank; words/13: blank; words/23: blank; ...). All that were found are in "
    )
    assert len(list(out.glob("*.arrayrecord"))) == 3
    # Those of kept shards count: the same end, now at its start.
    with pytest.raises(ValueError, match=r"^4 of 60"):
        build_records(Words(), config, out, max_bad_fraction=0.05)
    assert build_records(Words(), config, out, max_bad_fraction=0.1).num_made == 3
    with pytest.raises(ValueError, match=r"^6 of 60"):
        build_records(Words(), config, out, max_bad_fraction=0.05)
    assert build_records(Words(), config, out, max_bad_fraction=0.1).num_made == 0


def test_nothing_but_bad_documents(tmp_path):
    class Bad(Words):
        def __getitem__(self, index):
            raise DocumentError("unreadable", f"{index}: no")

    with pytest.raises(ValueError, match="none of 3 documents can be used: 3 unreadable"):
        build_records(Bad(3), BuildConfig(num_shards=1), tmp_path / "out", max_bad_fraction=1.0)
    # A shard without any document is one all the same.
    source = [Words()[0], *[Document((Text("x"),), "b", "s", "text", {"a": {1}})] * 2]
    build_records(source, BuildConfig(num_shards=3), tmp_path / "one", max_bad_fraction=1.0)
    assert ids(RecordSource(tmp_path / "one")) == ["words/0"]
    assert RecordSource(tmp_path / "one").index["skipped"] == {"bad_document": 2}


def test_the_size_of_shards(tmp_path):
    """Noise does not shrink: 100 documents of 30 kB in shards of a megabyte are three."""
    rng = np.random.default_rng(0)
    noise = [
        Document((Image(encoded=rng.bytes(30_000)), Text("x")), str(i), "s", "pair")
        for i in range(100)
    ]
    assert [estimate_num_shards(noise, n, 1.0) for n in (100, 50, 10)] == [3, 2, 1]
    assert estimate_num_shards(noise, 100, 0.001) == 100
    assert estimate_num_shards([Words()[0]], 1, 256.0) == 1
    config = BuildConfig(shard_megabytes=1.0, verify=False)
    report = build_records(noise, config, tmp_path / "out")
    assert [shard["documents"] for shard in report.index["shards"]] == [33, 33, 34]
    # The estimate is not made again.
    later = [noise[0]] * 100
    build_records(later, config, tmp_path / "out")
    with pytest.raises(ValueError, match=r"shard_megabytes: 1\.0 there, 2\.0 now"):
        build_records(noise, dataclasses.replace(config, shard_megabytes=2.0), tmp_path / "out")


def test_tokens_are_counted_where_they_are_known(tmp_path, tokenizer):
    """The byte tokenizer has a token for every byte."""
    tokenizer.save(tmp_path / "tokenizer.json")
    sizes = [(64, 64), (40, 100), (500, 400)]
    source = [
        Document((Text("ä" * n), Image(encoded=picture(n, size))), str(n), "s", "pair")
        for n, size in enumerate(sizes, 1)
    ]
    source.append(Document((Image(latents=np.zeros((6, 4), "f"), grid=(2, 3)),), "l", "s", "pair"))
    config = BuildConfig(
        num_shards=2, text_tokenizer=str(tmp_path / "tokenizer.json"), image_bases=(64, 256)
    )
    report = build_records(source, config, tmp_path / "out")
    # Grids 4 x 4 and 2 x 8 of base 64, 18 x 14 of base 256, and the latents as they are.
    image_tokens = 16 + 16 + 18 * 14 + 6
    assert report.index["tokens"] == {"text": 2 * (1 + 2 + 3), "image": image_tokens}
    assert report.index["image_tokens"] == 6
    assert f"tokens     12 of text, {image_tokens} of image" in report.as_text()
    half = dataclasses.replace(config, text_tokenizer=None, verify=False)
    report = build_records(source, half, tmp_path / "half")
    assert report.index["tokens"] == {"text": None, "image": image_tokens}


def test_mistakes(tmp_path):
    refused = [
        ({"num_shards": 0}, {}, "num_shards=0 must be at least 1"),
        ({"num_documents": 61}, {}, "num_documents=61, but the source has 60"),
        ({"num_shards": 61}, {}, "num_shards=61 is more than the 60 documents"),
        ({"shard_megabytes": 0.0}, {}, r"shard_megabytes=0\.0 must be positive"),
        ({"image_bases": (100,)}, {}, "image_bases: 100 is no positive multiple of 16"),
        ({"text_tokenizer": "none.json"}, {}, r"cannot read the tokenizer none\.json"),
        ({}, {"num_workers": 0}, "num_workers=0 must be at least 1"),
        ({}, {"max_bad_fraction": 2.0}, r"max_bad_fraction=2\.0 must lie in \[0, 1\]"),
    ]
    for values, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            build_records(Words(), BuildConfig(**values), tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
    build_records(Words(), BuildConfig(num_shards=2), tmp_path / "out", max_bad_fraction=0.1)
    before = outputs(tmp_path / "out")
    with pytest.raises(ValueError) as caught:
        build_records(Words(50), BuildConfig(num_shards=2, verify=False), tmp_path / "out")
    assert str(caught.value).endswith(
        "was begun with other settings: num_documents: 60 there, 50 now; source: 'Words(num=60)'"
        " there, 'Words(num=50)' now; verify: True there, False now"
    )
    assert outputs(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other things \(notes\.txt, \.\.\.\) and no build"):
        build_records(Words(), BuildConfig(num_shards=2), tmp_path / "mine")


def test_workers_stop_when_they_are_told(tmp_path):
    """What a worker counts, what its parent takes, and the end."""
    shared = building_workers.Shared(building.multiprocessing.get_context("spawn"), 2)
    for shard, bad in ((0, False), (1, True), (0, False)):
        shared.count(shard, bad)
    assert shared.take() == (3, 1)
    assert shared.take() == (0, 0)
    shared.count(1, True)
    assert shared.take() == (1, 1)
    shared.stop()
    with pytest.raises(building_workers.Stopped):
        shared.count(0, False)
    with pytest.raises(RuntimeError, match="no worker process"):
        building_workers.make_shard_here(0)


def test_sources_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "x"}')
    source = source_types.build_source(
        {"type": "jsonl", "root": str(tmp_path), "text_key": "words", "weight": 0.5}, 32
    )
    assert isinstance(source, JsonlSource)
    assert source_types.SOURCE_TYPES["parquet"] is ParquetSource
    assert source_types.source_from_text("shapes:easy", 48, "heldout").image_size == 48
    assert source_types.source_values("photographs") == {"type": "photographs"}
    with pytest.raises(ValueError, match=r"source type 'tar' is unknown; choose from \['shapes', "):
        source_types.source_from_text("tar:x", 32)
    with pytest.raises(ValueError, match=r"source of type 'jsonl': .*unexpected keyword"):
        source_types.build_source({"type": "jsonl", "root": "x", "kind": "text"}, 32)
