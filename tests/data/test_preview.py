"""The page's numbers against a batch written by hand, and the page in a browser."""

import base64
import io
import json
import pathlib
import re
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.data import preview, preview_page
from nextstep_jax.data.preview_documents import image_url, norm_picture
from nextstep_jax.data.schema import KINDS

LENGTH = 48
EVIL = "<script>document.title='run'</script>&</script><img src=x onerror=alert(1)>"
STRIPES = np.arange(32 * 64 * 3, dtype=np.uint8).reshape(32, 64, 3)
GREEN = np.full((32, 32, 3), (0, 200, 0), np.uint8)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Three rows of 48 at 16 pixels a token.

    Row 0: "hi" eos | an edit: "2*4" stripes as context, "ab", "2*2" green with weight 0.5, eos
    Row 1: text that a script hides in, cut at the end of the row, with weight 1
    Row 2: a pair: green, then an umlaut of two tokens; the rest is padding
    """
    ids = lambda text: tokenizer.encode(text)  # noqa: E731
    area, boi, eoi, eos = (
        [getattr(tokenizer, f"{name}_id")] for name in ("image_area", "boi", "eoi", "eos")
    )
    image = lambda n: [tokenizer.image_placeholder_id] * n  # noqa: E731
    block = lambda size, n: area + ids(size) + boi + image(n) + eoi  # noqa: E731
    segments = [
        [("text", ids("hi") + eos), ("edit", block("2*4", 8) + ids("ab") + block("2*2", 4) + eos)],
        [("text", ids(EVIL)[:LENGTH])],
        [("pair", block("2*2", 4) + ids("\u00fc") + eos)],
    ]
    names = {"token_ids": np.int32, "segment_ids": np.int32, "positions": np.int32}
    names |= {"text_weights": np.float32, "image_weights": np.float32, "kinds": np.int8}
    made = {name: np.zeros((3, LENGTH), dtype) for name, dtype in names.items()}
    made["token_ids"][:] = tokenizer.pad_id
    for row, parts in enumerate(segments):
        start = 0
        for number, (kind, tokens) in enumerate(parts, start=1):
            here = np.s_[row, start : start + len(tokens)]
            made["token_ids"][here] = tokens
            made["segment_ids"][here] = number
            made["positions"][here] = np.arange(len(tokens))
            made["kinds"][here] = 1 + KINDS.index(kind)
            start += len(tokens)
    made["text_weights"][0, 1:3] = 1  # i eos
    made["text_weights"][1, 1:] = 1
    made["text_weights"][2, 10:13] = 1  # The two of the umlaut, eos.
    # Edit from 3: area 2 * 4 boi, 8 from 8, eoi at 16, a b, area at 19, 4 from 24.
    made["image_weights"][0, 24:28] = 0.5
    made["image_weights"][2, 5:9] = 1
    made["images"] = {"32x32": np.stack([GREEN, GREEN]), "32x64": STRIPES[None]}
    made["image_slots"] = {
        "32x32": np.array([range(24, 28), range(96 + 5, 96 + 9)], np.int32),
        "32x64": np.array([range(8, 16)], np.int32),
    }
    return made


@pytest.fixture(scope="module")
def data(batch, tokenizer):
    found = preview.read_batches([batch], tokenizer)
    sources = {"world": (range(3), 3.0), "notes": (range(50), 1.0)}
    counts = {"read": {"world": 9}, "skipped/notes": {"bad_image": 2, "too_long": 0}}
    return {
        "title": f"Data of {EVIL}",
        "command_line": ["--config=x", EVIL],
        "config": {"image_size": 32, "note": EVIL},
        "sources": preview.source_table(sources, counts),
        "skipped": preview.skipped_documents(counts),
        **found,
    }


def pixels_of(url):
    header, _, body = url.partition(",")
    image = PIL.Image.open(io.BytesIO(base64.b64decode(body)))
    assert header == f"data:image/{image.format.lower()};base64"
    return np.asarray(image.convert("RGB"))


def of_page(page):
    """The JSON block of a page."""
    found = re.findall(r'<script type="application/json" id="preview-data">(.*)</script>', page)
    assert len(found) == 1
    return json.loads(found[0])


def test_totals_against_numpy(batch, data):
    filled = batch["segment_ids"] > 0
    assert data["totals"] == {
        "batches": 1,
        "rows": 3,
        "row_length": LENGTH,
        "documents": 4,
        "images": 3,
        "tokens": (tokens := int(filled.sum())),
        "image_tokens": 8 + 4 + 4,
        "text_tokens": tokens - 16,
        "trained_text_tokens": 2 + (LENGTH - 1) + 3,
        "trained_image_tokens": 8,
        "padding": 3 * LENGTH - tokens,
        "padding_share": pytest.approx(1 - filled.mean()),
    }
    assert data["problems"] == []
    kinds = {entry.pop("kind"): entry for entry in map(dict, data["kinds"])}
    for kind, (documents, images) in {"text": (2, 0), "pair": (1, 4), "edit": (1, 12)}.items():
        of_kind = int((batch["kinds"] == 1 + KINDS.index(kind)).sum())
        assert kinds.pop(kind) == {
            "documents": documents,
            "document_share": documents / 4,
            "tokens": of_kind,
            "token_share": pytest.approx(of_kind / tokens),
            "image_tokens": images,
        }
    assert kinds == {}


def test_rows_and_charts(batch, data):
    rows = data["rows"]
    assert [row["fill"] for row in rows] == pytest.approx(
        list((batch["segment_ids"] > 0).mean(axis=1))
    )
    assert rows[0]["segments"] == [
        {"document": 0, "kind": "text", "start": 0, "length": 3, "images": []},
        {"document": 1, "kind": "edit", "start": 3, "length": 27, "images": [[8, 8], [24, 4]]},
    ]
    charts = {chart["name"]: chart for chart in data["charts"]}
    values = {
        "lengths": [3, 27, LENGTH, 13],
        "row_images": [2, 0, 1],
        "row_fill": [100 * 30 / LENGTH, 100, 100 * 13 / LENGTH],
    }
    for name, numbers in values.items():
        edges, counts = charts[name]["edges"], charts[name]["counts"]
        assert len(edges) <= 21 and sum(counts) == len(numbers)
        assert counts == np.histogram(numbers, edges)[0].tolist()
    assert charts["row_images"]["edges"] == [0, 1, 2, 3]
    sizes = charts["image_sizes"]
    assert (sizes["labels"], sizes["counts"], sizes["aspects"]) == (
        ["32x64", "32x32"],
        [1, 2],
        [2.0, 1.0],
    )


def test_chips_are_the_tokens_with_their_weights(batch, tokenizer, data):
    for document in data["documents"]:
        row, start = document["row"], document["start"]
        assert sum(chip["count"] for chip in document["chips"]) == document["length"]
        at = start
        for chip in document["chips"]:
            here = np.s_[row, at : at + chip["count"]]
            assert chip["at"] == at
            for name, of_chip in (
                ("token_ids", chip["id"]),
                ("text_weights", chip["text_weight"]),
                ("image_weights", chip["image_weight"]),
            ):
                np.testing.assert_array_equal(batch[name][here], of_chip)
            at += chip["count"]
    edit, umlaut = data["documents"][1]["chips"], data["documents"][3]["chips"]
    kinds = "special size size size special image special text text special"
    assert [chip["kind"] for chip in edit][:10] == kinds.split()
    assert [chip["text"] for chip in edit][:7] == ["area", "2", "*", "4", "boi", "image", "eoi"]
    assert [chip["text"] for chip in edit[-2:]] == ["eoi", "eos"]
    # The first byte of a character shows nothing, the last one all of it.
    assert [chip["text"] for chip in umlaut[-3:]] == ["", "\u00fc", "eos"]
    assert [document["ends"] for document in data["documents"]] == [True, True, False, True]


def test_documents_in_reading_order(data):
    edit, pair = data["documents"][1], data["documents"][3]
    assert edit["parts"] == [{"image": 0}, {"text": "ab", "loss": False}, {"image": 1}]
    assert pair["parts"] == [{"image": 0}, {"text": "\u00fc", "loss": True}]
    assert [image["grid"] for image in edit["images"]] == [[2, 4], [2, 2]]
    assert [image["loss"] for image in edit["images"]] == [False, True]
    shown = [image["url"] for one in (edit, pair) for image in one["images"]]
    for url, pixels in zip(shown, (STRIPES, GREEN, GREEN), strict=True):
        np.testing.assert_array_equal(pixels_of(url), pixels)


def test_sources_and_skipped(data):
    assert data["sources"] == [
        {"name": "world", "weight": 3.0, "share": 0.75, "documents": 3, "read": 9},
        {"name": "notes", "weight": 1.0, "share": 0.25, "documents": 50, "read": 0},
    ]
    assert data["skipped"] == [{"source": "notes", "reason": "bad_image", "documents": 2}]


def test_enough_batches_are_read_and_no_more(batch, tokenizer):
    taken = []

    def endless():
        while True:
            taken.append(None)
            yield batch

    found = preview.read_batches(endless(), tokenizer, num_documents=6)
    assert len(taken) == 2
    assert len(found["documents"]) == 6 and found["totals"]["documents"] == 8
    assert [document["row"] for document in found["documents"]] == [0, 0, 1, 2, 3, 3]
    named = [segment["document"] for row in found["rows"] for segment in row["segments"]]
    assert named == [0, 1, 2, 3, 4, 5, None, None]
    taken.clear()
    assert preview.read_batches(endless(), tokenizer, num_documents=1, num_batches=3)["rows"]
    assert len(taken) == 3
    with pytest.raises(ValueError, match="num_documents=0 must be at least 1"):
        preview.read_batches([batch], tokenizer, num_documents=0)
    with pytest.raises(ValueError, match="there is no batch"):
        preview.read_batches([], tokenizer)


def test_rows_without_boundaries_are_cut_at_the_end_of_text(batch, tokenizer, data):
    joined = {**batch, "segment_ids": (batch["segment_ids"] > 0).astype(np.int32)}
    found = preview.read_batches([joined], tokenizer, split_at_eos=True)
    assert found["rows"] == data["rows"]


def test_contradictions_are_named(batch, tokenizer):
    broken = {**batch, **{k: batch[k].copy() for k in ("token_ids", "image_weights")}}
    broken["image_weights"][0, 0] = broken["image_weights"][2, -1] = 1
    broken["token_ids"][2, 1] = tokenizer.encode("4")[0]
    broken["image_slots"] = {"32x32": batch["image_slots"]["32x32"] - [[1], [0]], "32x64": []}
    broken["image_slots"]["32x64"] = np.array([range(9, 17)], np.int32)
    assert preview.read_batches([broken], tokenizer)["problems"] == [
        "2 flow weights off image tokens",
        "2 image positions without an image",
        "1 size strings that do not give the grid of their image",
        "2 tokens of images where the text has no place for them",
        "1 weights on first tokens, which nothing predicts",
        "1 weights on padding",
    ]


def test_latents_are_shown_as_norms(batch, tokenizer):
    rng = np.random.default_rng(0)
    latents = np.zeros((3, LENGTH, 64), np.float32)
    where = batch["token_ids"] == tokenizer.image_placeholder_id
    latents[where] = rng.standard_normal((16, 64))
    given = {k: v for k, v in batch.items() if not k.startswith("image_s") and k != "images"}
    found = preview.read_batches([{**given, "latents": latents}], tokenizer)
    assert found["problems"] == []
    image = found["documents"][1]["images"][0]
    tokens = latents[0, 8:16]
    assert (image["grid"], image["tokens"]) == ([2, 4], 8)
    assert (image["mean"], image["std"]) == pytest.approx((tokens.mean(), tokens.std()), rel=1e-5)
    assert (image["min"], image["max"]) == pytest.approx((tokens.min(), tokens.max()))
    picture = pixels_of(image["url"])
    assert picture.shape == (2, 4, 3)
    norms = np.linalg.norm(tokens, axis=-1)
    # Brighter is larger: the colours go up in luminance.
    brightness = (picture @ [0.299, 0.587, 0.114]).reshape(-1)
    assert list(np.argsort(norms)) == list(np.argsort(brightness))
    charts = {chart["name"]: chart for chart in found["charts"]}
    assert charts["image_sizes"]["labels"] == ["2x4", "2x2"]
    latents[0, 9, 0] = np.nan
    found = preview.read_batches([{**given, "latents": latents}], tokenizer)
    assert found["problems"] == ["1 numbers in image tokens that are not finite"]
    assert json.dumps(found, allow_nan=False)


def test_norm_picture_of_equal_tokens():
    picture = norm_picture(np.ones((4, 8), np.float32), (2, 2))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1


def test_a_large_picture_becomes_a_small_file():
    noise = np.random.default_rng(0).integers(0, 256, (600, 1200, 3), np.uint8)
    url, exact = image_url(noise)
    assert not exact
    assert pixels_of(url).shape == (256, 512, 3)
    assert len(url) < 200_000


def test_the_page_cannot_be_escaped(data):
    page = preview_page.render_page(data)
    assert of_page(page) == json.loads(json.dumps(data))
    # The page's own two, and none that the data brought.
    assert page.count("<script") == page.count("</script") == 2
    assert "<img" not in page and "onerror=alert(1)>" not in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:)[a-z]+:", page)
    # A namespace is a name, not an address that is asked.
    assert re.findall(r"https?://[\w./]+", page) == ["http://www.w3.org/2000/svg"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        preview_page.render_page({"x": float("nan")})


# In a browser


class Browser:
    """A headless Chromium, driven over plain HTTP."""

    def __init__(self, folder: pathlib.Path):
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--no-first-run", "--disable-quic", "--disable-dev-shm-usage"),
        ]
        command = [shutil.which("chromedriver"), "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = iter(self._driver.stdout.readline, "")
        port = next(m[1] for line in lines if (m := re.search(r"successfully on port (\d+)", line)))
        self._url = f"http://127.0.0.1:{port}/session"
        options = {"args": arguments, "binary": shutil.which("chromium")}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = self.call("", {"capabilities": {"alwaysMatch": always}})
        except OSError:
            self._driver.kill()
            raise
        self._url += f"/{session['sessionId']}"

    def call(self, path, body=None, method="POST"):
        """A command of the WebDriver protocol."""
        encoded = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data=encoded, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script, *args):
        """The value of a script."""
        return self.call("/execute/sync", {"script": script, "args": args})

    def devtools(self, command, **params):
        """A command of the browser's own protocol."""
        return self.call("/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, path, width):
        """Opens a file at a width, and waits until it is drawn and its images are decoded."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.call("/url", {"url": path.as_uri()})
        for _ in range(100):
            if self.run("return [...document.images].every(i => i.complete)"):
                return
            time.sleep(0.05)
        raise TimeoutError(path)

    def click(self, selector):
        """A click of the mouse, on what is there, in the middle of the window."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        found = self.call("/element", {"using": "css selector", "value": selector})
        self.call(f"/element/{next(iter(found.values()))}/click")

    def close(self):
        """Ends browser and driver."""
        try:
            self.call("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait(20)
            self._driver.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; apt-get install chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


COUNTS = """
const count = (selector) => document.querySelectorAll(selector).length;
return {rows: count(".row[id]"), segments: count(".bar .block"), documents: count("article"),
  chips: count("article .chip"), images: [...document.images].filter(i => i.naturalWidth).length,
  tables: count("table"), charts: count("svg"), bins: count("svg rect")};
"""


@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(browser, data, tmp_path, width):
    path = tmp_path / "page.html"
    path.write_text(preview_page.render_page(data), encoding="utf-8")
    browser.open(path, width)
    documents = data["documents"]
    assert browser.run(COUNTS) == {
        "rows": len(data["rows"]),
        "segments": 4,
        "documents": len(documents),
        "chips": sum(len(document["chips"]) for document in documents),
        "images": 3,
        "tables": 3,
        "charts": 4,
        "bins": sum(len(chart["counts"]) for chart in data["charts"]),
    }
    drawn = browser.run("return {...document.documentElement.dataset}")
    assert drawn["drawn"] == "yes" and drawn["images"] == "3"
    # Nothing sticks out to the side.
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    # Text is text: shown as it is written, and it did not run.
    assert browser.run("return document.title") == f"Data of {EVIL}"
    text = browser.run("return document.querySelector('#document-2 .part').textContent")
    assert text == EVIL[:LENGTH]
    # A block leads to its document, a token tells its weights.
    top = "return document.querySelector('#document-3').getBoundingClientRect().top"
    assert browser.run(f"scrollTo(0, 0); {top}") > 800
    browser.click('.block[href="#document-3"]')
    assert 0 <= browser.run(top) < 800
    browser.click("#document-1 .chip.flow")
    tip = browser.run("return document.querySelector('#tip').innerText")
    assert "position 24 to 27 of the row" in tip and "flow loss 0.500" in tip
    faded = browser.run(
        "return ['#document-1 .text', '#document-3 .image'].map(s =>"
        " getComputedStyle(document.querySelector(s)).opacity)"
    )
    assert faded == ["0.5", "1"]
    log = browser.call("/se/log", {"type": "browser"})
    assert [entry for entry in log if entry["level"] != "INFO"] == []


def test_the_policy_stops_a_script_that_got_in(browser, data, tmp_path):
    path = tmp_path / "page.html"
    page = preview_page.render_page(data)
    path.write_text(page.replace("</body>", "<script>window.ran = 1</script></body>"))
    browser.open(path, 400)
    assert browser.run("return [typeof ran, document.documentElement.dataset.drawn]") == [
        "undefined",
        "yes",
    ]
    log = browser.call("/se/log", {"type": "browser"})
    assert len(log) == 1 and "Content Security Policy" in log[0]["message"]


def test_long_documents_are_cut_until_asked(browser, data, tmp_path):
    path = tmp_path / "page.html"
    first, *others = data["documents"]
    long = {**first, "chips": first["chips"] * 300}
    path.write_text(preview_page.render_page({**data, "documents": [long, *others]}))
    browser.open(path, 400)
    height = "return document.querySelector('#document-0').offsetHeight"
    before = browser.run(height)
    assert browser.run("return document.querySelectorAll('button').length") == 1
    browser.click("#document-0 button")
    assert browser.run(height) > 3 * before
    browser.click("#document-0 button")
    assert browser.run(height) == before
