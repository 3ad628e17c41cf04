import dataclasses
import io
import json
import os
import pydoc_data.topics

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.data import images, text_tokenizer
from nextstep_jax.evaluation import data_speed

TINY = data_speed.Setting(
    sizes=(32,),
    source_size=48,
    num_images=6,
    threads=(),
    repeats=2,
    row_length=512,
    num_open_rows=1,
    documents_per_round=16,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, data_speed.write_data(folder, TINY), data_speed.measure(folder, TINY)


def test_every_format_holds_the_same_documents(measured):
    folder, data, _ = measured
    names = ("folder", "tars", "parquet", "records")
    sources = {name: data_speed.open_source(folder, name, 32) for name in names}
    assert {len(source) for source in sources.values()} == {6}
    sizes = []
    for i in range(6):
        documents = [source[i] for source in sources.values()]
        files = [document.images[0].encoded for document in documents]
        texts = [document.parts[0].text for document in documents]
        assert len(set(files)) == len(set(texts)) == 1
        with PIL.Image.open(io.BytesIO(files[0])) as image:
            assert (image.format, image.size) == ("JPEG", (48, 48))
        assert 200 < len(texts[0]) <= 300
        sizes.append(len(files[0]))
    assert data["mean_file_bytes"] == pytest.approx(np.mean(sizes))


def test_counts(measured):
    """Rows hold whole documents of images; how long each is follows from its caption."""
    folder, _, figures = measured
    tokenizer = text_tokenizer.TextTokenizer.from_file(folder / "tokenizer.json")
    # Area token, "2*2", begin of image, four tokens, end of image, eos.
    around = 1 + len(tokenizer.encode("2*2")) + 1 + 4 + 1 + 1
    source = data_speed.open_source(folder, "records", 32)
    lengths = [len(tokenizer.encode(source[i].parts[0].text)) + around for i in range(6)]
    assert min(lengths) < max(lengths) < 512
    for name in ("folder 32", "tars 32", "parquet 32", "records 32", "latents 32"):
        found = figures["per_core"][name]
        counted = found["counted"]
        assert counted["images"] == (0 if name == "latents 32" else counted["documents"])
        # Two rounds of at least 16 read; the open row and a group that was read hold back a few.
        assert found["read"] >= 32
        assert abs(counted["documents"] - found["read"]) <= 512 // min(lengths) + 8
        each = counted["tokens"] / counted["documents"]
        assert min(lengths) <= each <= max(lengths)
        assert each == pytest.approx(np.mean(lengths), rel=0.1)
        # Full rows: no more than a document is missing at the end of one.
        rows = counted["tokens"] / (512 - np.mean(lengths) / 2)
        assert rows == pytest.approx(4 * round(rows / 4), rel=0.15)


def test_counts_of_text(measured):
    _, _, figures = measured
    counted = figures["per_core"]["text"]["counted"]
    # Plain text leaves no gap: whole batches of four rows.
    assert counted["tokens"] % (4 * 512) == 0
    assert counted["images"] == 0


def test_rates_belong_together(measured):
    _, _, figures = measured
    for name, found in figures["per_core"].items():
        assert found["documents_per_s"] > 0 and found["tokens_per_s"] > 0
        assert ("overhead" in found) == (name != "latents 32")
        if name.startswith(("folder", "tars", "parquet", "records")):
            assert found["images_per_s"] == found["documents_per_s"]
            assert found["overhead"] > -0.5
    assert figures["all_cores"] == {}


def test_threads(measured):
    setting = dataclasses.replace(TINY, formats=("latents",), threads=(1, 2))
    rates = data_speed.measure(measured[0], setting)["all_cores"]
    assert list(rates) == ["latents 32"]
    assert list(rates["latents 32"]) == ["1 threads", "2 threads"]
    for found in rates["latents 32"].values():
        # Captions of at most 300 bytes, and ten tokens around; at least one of every 20 bytes.
        assert 10 < found["tokens_per_s"] / found["documents_per_s"] < 310


def test_the_core_is_given_back(measured):
    before = os.sched_getaffinity(0)
    with data_speed.pinned() as core:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_alone_makes_the_pixels_that_the_pipeline_makes():
    encoded = data_speed.encode_jpeg(data_speed.fractal(48, seed=3))
    for size in (16, 48):
        expected = images.resize_cover(images.decode(encoded), size, size)
        np.testing.assert_array_equal(data_speed.decode_and_resize(encoded, size), expected)


def test_fractals_cost_what_photographs_do():
    """Bits a pixel; scikit-image's photographs have 2 at this quality (65 kB)."""
    encoded = data_speed.encode_jpeg(data_speed.fractal(512, seed=1))
    assert 1.5 < 8 * len(encoded) / 512**2 < 2.7


def test_excerpts_are_those_of_the_manual():
    texts = data_speed.excerpts(3, 50)
    manual = " ".join(" ".join(t.split()) for _, t in sorted(pydoc_data.topics.topics.items()))
    assert texts == [manual[50 * i : 50 * i + 50].strip() for i in range(3)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("formats", ("folder", "zip"), r"formats=\['folder', 'zip'\]; choose from"),
        ("sizes", (100,), r"sizes=\[100\] must be multiples of 16"),
        ("threads", (0,), r"threads=\[0\] must be at least 1"),
        ("repeats", 0, "repeats=0 must be at least 1"),
    ],
)
def test_bad_settings(field, value, message):
    with pytest.raises(ValueError, match=message):
        data_speed.Setting(**{field: value})


def test_figures_are_json(measured):
    assert json.loads(json.dumps(measured[2]))["core"] == max(os.sched_getaffinity(0))
