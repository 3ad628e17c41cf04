"""A data set with one per cent of each kind of damage: the good documents all arrive, once."""

import io
import json
import tarfile
import zlib
from contextlib import closing

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.data import pipeline
from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.record_writer import ShardWriter, shard_name, write_index
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.webdataset import WebDatasetSource
from tests.data.epochs import first_epoch

N, EACH, NUM_STREAMS = 600, 6, 2


def picture(size, seed, form="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def bomb():
    """A PNG of 60000 x 60000 pixels in a few hundred bytes."""
    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    body = b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def garbage(seed):
    return np.random.default_rng(seed).bytes(300)


# Reason -> caption and file of a document that is damaged so, by its number.
DAMAGE = {
    "cut": lambda i: ("a picture", picture((32, 32), i)[:400]),
    "garbage": lambda i: ("a picture", garbage(i)),
    "missing": lambda i: ("<image_1> a picture", None),
    "absurd": lambda i: ("a picture", picture((16, 16 * 40), i)),
    "blank": lambda i: (" \n ", picture((32, 32), i)),
    "bomb": lambda i: ("a picture", bomb()),
}
EXPECTED = {
    "bad_image": 2 * EACH,
    "missing_image": EACH,
    "image_size": EACH,
    "empty_text": EACH,
    "decompression_bomb": EACH,
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The tar, and the keys of its good documents."""
    path = tmp_path_factory.mktemp("damaged") / "part-0.tar"
    bad = np.random.default_rng(0).permutation(N)[: EACH * len(DAMAGE)].tolist()
    kinds = dict(zip(bad, [kind for kind in DAMAGE for _ in range(EACH)], strict=True))
    good = set()
    with tarfile.open(path, "w") as tar:
        for i in range(N):
            key = f"{i:05d}"
            caption, file = f"number {i}", None
            if i in kinds:
                caption, file = DAMAGE[kinds[i]](i)
            else:
                good.add(key)
                file = picture((32, 32 + i % 30), i)
            members = [(f"{key}.json", json.dumps({"caption": caption}).encode())]
            members += [] if file is None else [(f"{key}-1.jpg", file)]
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path, good


def make(source, tokenizer, model_config, **changes):
    rule = LayoutConfig(image_bases=(32,), square_only=True)
    values = {"row_length": 256, "rows_per_batch": 2, "num_streams": NUM_STREAMS, "layout": rule}
    config = pipeline.DataConfig(**(values | {"num_open_rows": 4} | changes))
    return iter(pipeline.make_pipeline({"tar": (source, 1.0)}, tokenizer, model_config, config))


def test_the_good_documents_all_arrive_once(damaged, tokenizer, model_config, caplog):
    path, good = damaged
    source = WebDatasetSource(path)
    assert len(source) == N
    with closing(make(source, tokenizer, model_config, max_bad_fraction=0.1)) as iterator:
        seen = first_epoch(iterator, N, NUM_STREAMS)
        assert set(seen.values()) == {1}
        # An id is the source's name, then the document's.
        assert {name.rsplit("/", 1)[-1] for name in seen} == good and len(good) == N - 36
        counts = pipeline.add_counts([s.counts for s in iterator._streams.values()])
        # The second epoch has begun: what it has skipped so far comes on top.
        read, skipped = counts["read"]["tar"], counts["skipped/tar"]
        assert N <= read < 2 * N
        assert set(skipped) == set(EXPECTED)
        for reason, number in EXPECTED.items():
            assert number <= skipped[reason] <= 2 * number
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == N - len(good)  # Once each, not again in the second epoch.
    # Each names its reason, its source and its key.
    keys = {f"{i:05d}" for i in range(N)} - good
    assert {key for key in keys if any(key in line for line in lines)} == keys


def test_too_many_stop_the_run(damaged, tokenizer, model_config):
    path, _ = damaged
    message = r"source 'tar': 11 of the first \d+ documents are bad, .*max_bad_fraction=0\.01"
    with (
        closing(make(WebDatasetSource(path), tokenizer, model_config)) as iterator,
        pytest.raises(ValueError, match=message),
    ):
        for _ in range(300):
            next(iterator)


def test_a_damaged_record_is_skipped(damaged, tokenizer, model_config, tmp_path):
    """Bytes that change on the disk after the folder was made."""
    source = WebDatasetSource(damaged[0])
    good = [i for i in range(N) if f"{i:05d}" in damaged[1]][:40]
    path = tmp_path / shard_name(0, 1)
    with ShardWriter(path) as writer:
        for i in good:
            writer.write(source[i])
    write_index(tmp_path, 1, {})
    data = bytearray(path.read_bytes())
    # In the middle of one record, whose noise cannot be compressed.
    middle = data.index(source[good[20]].images[0].encoded[300:340])
    data[middle : middle + 8] = bytes(255 - byte for byte in data[middle : middle + 8])
    path.write_bytes(data)
    records = RecordSource(tmp_path)
    with closing(make(records, tokenizer, model_config, max_bad_fraction=0.1)) as iterator:
        seen = first_epoch(iterator, len(records), NUM_STREAMS)
        counts = pipeline.add_counts([s.counts for s in iterator._streams.values()])
    assert set(seen.values()) == {1} and len(seen) == len(good) - 1
    assert set(counts["skipped/tar"]) == {"unreadable"}
