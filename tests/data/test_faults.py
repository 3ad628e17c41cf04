"""Hostile files and texts: each is a DocumentError, whatever a library raised."""

import io
import pickle
import tarfile
import threading
from contextlib import closing

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.data import images, pipeline, statistics
from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.captions import image_tags
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.records import encode_document
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.sources import ImageFolderSource
from nextstep_jax.data.webdataset import WebDatasetSource


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(DocumentError("too_long", "as it is").within("here")))
    assert (error.reason, str(error)) == ("too_long", "here: as it is")


def test_no_program_is_started_for_an_image(monkeypatch):
    """PostScript, which Pillow hands to Ghostscript, and what only its other plugins read."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started"))
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    pcx = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(pcx, "PCX")
    for data in (page, pcx.getvalue()):
        with pytest.raises(DocumentError, match="no known image format") as error:
            images.decode(data)
        assert error.value.reason == "bad_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_mutated_files_are_read_or_refused(form):
    """Nothing but a DocumentError comes out, of 60 mutations of each format."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    file = io.BytesIO()
    try:
        PIL.Image.fromarray(pixels).save(file, form)
    except (KeyError, OSError):
        pytest.skip(f"this build of Pillow does not write {form}")
    rng, refused = np.random.default_rng(1), 0
    for _ in range(60):
        data = bytearray(file.getvalue())
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        data = data[: rng.integers(len(data) // 2, len(data) + 1)]
        try:
            assert images.decode(bytes(data)).dtype == np.uint8
        except DocumentError as error:
            refused += 1
            assert error.reason in ("bad_image", "decompression_bomb")
    assert refused > 5


def test_hostile_text():
    assert image_tags("<image_2><image_" + "1" * 5000 + ">") == (2,)
    deep = None
    for _ in range(5000):
        deep = [deep]
    for metadata in ({"deep": deep}, {"half": "\ud800"}):
        with pytest.raises(DocumentError, match="document s/7: ") as error:
            encode_document(Document((Text("a"),), "7", "s", "text", metadata))
        assert error.value.reason == "bad_document"


def test_absurd_sizes_in_a_tar_leave_the_rest(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, size in (("good", None), ("odd", "9" * 30), ("last", None)):
            info = tarfile.TarInfo(f"{name}.txt")
            info.size, data = 5, b"words"
            if size is not None:
                info.pax_headers = {"size": size}
            tar.addfile(info, io.BytesIO(data))
    source = WebDatasetSource(tmp_path / "a.tar")
    texts = []
    for i in range(len(source)):
        try:
            texts.append((source[i].id.split("/")[-1], source[i].parts[0].text))
        except DocumentError:
            texts.append(None)
    # A size of thirty digits is none; that of the header holds.
    assert texts == [("good", "words"), ("odd", "words"), ("last", "words")]


def test_a_link_that_leads_nowhere(tmp_path):
    for name in ("a", "b"):
        PIL.Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    source = ImageFolderSource(tmp_path)
    assert len(source) == 2 and source[0].parts[0].text == "a"
    assert source.fingerprint != ImageFolderSource(tmp_path, caption_key="other").fingerprint
    with pytest.raises(DocumentError, match=r"b\.png") as error:
        source[1]
    assert error.value.reason == "unreadable"


# How bad documents are judged


class Words:
    """Pairs of which some have no caption."""

    fingerprint = "words"

    def __init__(self, number, bad):
        self._number, self._bad = number, bad

    def __len__(self):
        return self._number

    def __getitem__(self, index):
        if index in self._bad:
            raise DocumentError("empty_text", f"number {index} is blank")
        picture = Image(pixels=np.zeros((16, 16, 3), np.uint8))
        return Document((Text(f"{index}"), picture), str(index), "words", "pair")


def start(source, tokenizer, model_config, process=(0, 1), **changes):
    rule = LayoutConfig(image_bases=(16,), square_only=True)
    values = {"row_length": 32, "rows_per_batch": 4, "layout": rule, "num_open_rows": 2}
    config = pipeline.DataConfig(**(values | changes))
    made = pipeline.make_pipeline({"s": (source, 1.0)}, tokenizer, model_config, config, *process)
    return iter(made)


def test_the_same_document_is_judged_once(tokenizer, model_config, caplog):
    """Two bad ones of 100, over ten epochs: counted every time, logged and judged once."""
    with closing(start(Words(100, {3, 70}), tokenizer, model_config)) as iterator:
        while iterator.counts()["read"]["s"] < 1000:
            next(iterator)
        counts = iterator.counts()
    assert counts["first_epoch"]["s"] == 100 and counts["first_epoch_bad"]["s"] == 2
    assert counts["skipped/s"]["empty_text"] >= 20
    assert sum("skipped" in record.message for record in caplog.records) == 2


def test_nothing_but_bad_documents_ends(tokenizer, model_config):
    """Also where all of them may be bad."""
    source = Words(5000, range(5000))
    with closing(start(source, tokenizer, model_config, max_bad_fraction=1.0)) as iterator:
        caught = []

        def take():
            try:
                next(iterator)
            except ValueError as error:
                caught.append(str(error))

        thread = threading.Thread(target=take)
        thread.start()
        thread.join(60)
    assert caught and "the last 1000 documents of stream 0 were all bad" in caught[0]


def test_several_processes_judge_together(tokenizer, model_config):
    """Neither stops by itself; the report of their sum does, in both."""
    bad = set(range(0, 3000, 40))  # 2.5%
    iterators = [start(Words(3000, bad), tokenizer, model_config, (index, 2)) for index in range(2)]
    try:
        reports = []
        for iterator in iterators:
            other = iterators[1 - iterators.index(iterator)]

            def add_up(vector, other=other):
                flat = [n for values in other.counts().values() for n in values.values()]
                return vector + np.array(flat, np.int64)

            reports.append(statistics.DataReport(iterator.counts, add_up, 0.01))
        for _ in range(150):
            for iterator in iterators:
                next(iterator)
        messages = []
        for report in reports:
            with pytest.raises(
                ValueError, match=r"source 's': \d+ of the first \d+ documents"
            ) as e:
                report()
            messages.append(str(e.value))
        assert messages[0] == messages[1]
    finally:
        for iterator in iterators:
            iterator.close()
