"""Scoring and selecting, whole, on planted defects, with a Ray of this machine."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from nextstep_jax.curation import measures
from nextstep_jax.curation.cluster import Cluster, session
from nextstep_jax.curation.config import curation_config, selection_config
from nextstep_jax.curation.endpoint import RateLimit
from nextstep_jax.curation.findings import findings_of
from nextstep_jax.curation.scoring import score_source
from nextstep_jax.curation.thresholds import select_documents
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.images import pixels_of
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.data.shapes import ShapesSource
from tests.curation import planted
from tests.curation.caption_server import caption_server
from tests.curation.planted import PlantedSource

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNUSABLE = set(planted.BROKEN)
USABLE = [i for i in range(planted.NUMBER) if i not in UNUSABLE]
RULES = {"clarity": (10.0, None), "min_side": (64.0, None), "aspect": (None, 3.0)}


def stages(**more):
    return {"decode": {}, "resolution": {}, "aspect": {}, "clarity": {}, "duplicates": {}, **more}


def brightness(trace):
    return {
        "type": "scorer",
        "scorer": {"scorer": "tests.curation.counting_scorers:Brightness", "trace": trace},
    }


def records_of(folder):
    """Bytes of everything that is the result, by name."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.html"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def ray_session():
    """A running Ray of this machine, which all passes use; two tasks at a time."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            # Workers import the package, and the scorer and the source of these tests.
            before = filter(None, [os.environ.get("PYTHONPATH")])
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *before]))
            # They need no eight devices. Tests after this one do.
            patch.setenv("XLA_FLAGS", "")
            cluster = Cluster(num_tasks=2, store_bytes=100 * 2**20)
            ray = stack.enter_context(session(cluster, actor_cpus=1.0))
        yield ray


@pytest.fixture(scope="module")
def scored(ray_session, tmp_path_factory):
    """A scored folder, its summary, and the folder with a file for every rating."""
    folder = tmp_path_factory.mktemp("curation")
    trace = folder / "trace"
    trace.mkdir()
    config = curation_config(stages(light=brightness(str(trace))), documents_per_shard=13)
    out = folder / "scored"
    return out, score_source(PlantedSource(), config, out, max_tasks=2), trace, config


def test_every_document_is_scored_once_and_nothing_else_dropped(scored):
    out, summary, trace, _ = scored
    source = RecordSource(out)
    documents = [source[i] for i in range(len(source))]
    assert [d.id for d in documents] == [f"planted/{i}" for i in USABLE]
    with_image = [i for i in USABLE if i not in planted.TEXT]
    # The four of the batch with the text, which cannot be rated, are asked for one by one too.
    assert len(list(trace.iterdir())) == 58 + 4
    assert summary["documents"] == 60
    assert summary["written"] == 58
    assert summary["faults"] == {"bad_image": 1, "missing_image": 1}
    assert source.index["skipped"] == {"bad_image": 1, "missing_image": 1}
    assert summary["scores"]["brightness/mean"]["count"] == len(with_image) == 57
    for document in documents:
        scores = document.metadata["curation"]["scores"]
        if not document.images:
            assert scores == {}
            continue
        pixels = pixels_of(document.images[0])
        expected = {
            **measures.resolution(pixels),
            **measures.aspect(pixels),
            **measures.clarity(pixels, 256),
            "brightness/mean": float(pixels.mean()),
        }
        assert scores == expected
        assert document.metadata["curation"]["hash"] == f"{measures.phash(pixels):016x}"
        assert document.metadata["number"] == int(document.id.split("/")[1])
    clarity = [d.metadata["curation"]["scores"]["clarity"] for d in documents if d.images]
    found = summary["scores"]["clarity"]
    assert (found["min"], found["max"]) == (min(clarity), max(clarity))
    assert found["mean"] == pytest.approx(np.mean(clarity), rel=1e-12)
    faults = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert [(f["index"], f["reason"]) for f in faults] == list(planted.BROKEN.items())


def test_groups_of_duplicates_span_shards_and_keep_the_best(scored):
    source = RecordSource(scored[0])
    groups = {}
    for i in range(len(source)):
        document = source[i]
        if document.images:
            found = document.metadata["curation"]["duplicates"]
            assert found["quality"] == document.metadata["curation"]["scores"]["pixels"]
            members = groups.setdefault(found["group"], {})
            members[document.metadata["number"]] = found["best"]
    several = {group: members for group, members in groups.items() if len(members) > 1}
    assert several == {3: {3: True, 20: False, 33: False}, 9: {9: False, 41: True}}
    assert all(members == {group: True} for group, members in groups.items() if group not in (3, 9))


def test_the_same_bytes_at_any_number_of_tasks_and_after_a_kill(scored, tmp_path):
    out, summary, trace, config = scored
    ratings = len(list(trace.iterdir()))
    again = tmp_path / "again"
    assert score_source(PlantedSource(), config, again, max_tasks=1) == summary
    assert records_of(again) == records_of(out)
    assert len(list(trace.iterdir())) == 2 * ratings
    # As a kill leaves it: while the groups were written, and two shards never scored.
    for name in ("index.json", "scores.json", "faults.jsonl"):
        (again / name).unlink()
    (again / "scored").mkdir()
    waiting = "shard-00001-of-00005"
    for suffix in (".json", ".arrayrecord"):
        shutil.move(again / (waiting + suffix), again / "scored" / (waiting + suffix))
        for lost in ("shard-00002-of-00005", "shard-00004-of-00005"):
            (again / (lost + suffix)).unlink()
    (again / "shard-00002-of-00005.arrayrecord.unfinished").write_bytes(b"half")
    before = len(list(trace.iterdir()))
    assert score_source(PlantedSource(), config, again) == summary
    assert records_of(again) == records_of(out)
    # Only the lost shards were rated again: 12 and 8 documents, and four of these singly.
    assert len(list(trace.iterdir())) - before == 12 + 8 + 4
    # A finished folder is left alone, one of other settings refused.
    assert score_source(PlantedSource(), config, again) == summary
    with pytest.raises(ValueError, match="other settings: documents_per_shard: 13 there, 14 now"):
        score_source(PlantedSource(), dataclasses.replace(config, documents_per_shard=14), again)


def test_thresholds_are_applied_without_scoring(scored, tmp_path, monkeypatch):
    out, _, trace, _ = scored
    ratings = len(list(trace.iterdir()))
    first = tmp_path / "first"
    tally = select_documents(out, selection_config({"rules": RULES}), first)
    kept = RecordSource(first)
    ids = {kept[i].id for i in range(len(kept))}
    dropped = {*planted.BLURRED, *planted.SMALL, *planted.WIDE, 20, 33, 9}
    flat = {d for d in USABLE if f"planted/{d}" not in ids} - dropped
    # Some scenes of the built-in world are smooth grounds with little on them.
    source = RecordSource(out)
    clarity = {
        source[i].metadata.get("number"): findings_of(source[i]).scores.get("clarity", 1e9)
        for i in range(len(source))
    }
    assert all(clarity[d] < 10.0 for d in flat)
    assert tally["documents"] == 58
    assert tally["kept"] == len(ids) == 58 - len(dropped) - len(flat)
    assert tally["failed"]["duplicates"] == 3
    assert tally["failed"]["min_side"] == 2
    assert tally["failed"]["aspect"] == 1
    assert tally["failed"]["clarity"] == sum(value < 10.0 for value in clarity.values())
    assert sum(tally["first"].values()) == 58 - tally["kept"]
    assert tally["missing"]["clarity"] == 1
    _check_report(first / "report.html", {*RULES, "duplicates"})
    # Other rules: other documents, still no rating; texts without the score can go too.
    second = tmp_path / "second"
    rules = {"brightness/mean": (100.0, 200.0)}
    other = select_documents(
        out, selection_config({"rules": rules, "drop_duplicates": False, "missing": "drop"}), second
    )
    found = [findings_of(source[i]) for i in range(len(source))]
    means = [one.scores.get("brightness/mean", -1.0) for one in found]
    assert other["kept"] == sum(100.0 <= mean <= 200.0 for mean in means)
    histogram = other["histograms"]["brightness/mean"]
    assert sum(histogram["all"]) == 57
    assert sum(histogram["kept"]) == other["kept"]
    assert len(list(trace.iterdir())) == ratings


def _check_report(path, rules):
    page = path.read_text()
    for rule in rules:
        assert f"<td><code>{rule}</code></td>" in page
        assert f"Dropped by {rule}<" in page
    for score in ("min_side", "pixels", "aspect", "clarity", "brightness/mean"):
        assert f"<h3><code>{score}</code></h3>" in page
    for reason in planted.BROKEN.values():
        assert f"<code>{reason}</code>" in page
    # Nothing from elsewhere, no script, and words of documents as words.
    assert not re.search(r"https?://|<script|src=\"(?!data:)|@import", page)
    assert "picture &lt;" in page
    assert "picture <" not in page
    assert page.count("data:image/jpeg;base64,") >= 8 + 3 + 2 + 1


def test_what_cannot_be_selected_is_refused(scored, tmp_path):
    out = scored[0]
    with pytest.raises(ValueError, match=r"'sharpness'.* are no scores"):
        select_documents(out, selection_config({"rules": {"sharpness": (1.0, None)}}), tmp_path)
    with pytest.raises(ValueError, match="is the scored folder itself"):
        select_documents(out, selection_config({}), out)
    with pytest.raises(ValueError, match="is no records folder"):
        select_documents(tmp_path, selection_config({}), tmp_path / "new")


def test_captions_are_asked_for_once(ray_session, tmp_path):
    with caption_server() as server:
        recaption = {"url": server.url, "model": "m", "cache": str(tmp_path / "captions")}
        config = curation_config({"decode": {}, "recaption": recaption}, documents_per_shard=4)
        source = ShapesSource("pair", level="easy", image_size=32, num_documents=6)
        for name in ("first", "second"):
            summary = score_source(source, config, tmp_path / name)
            assert summary["without_caption"] == 0
            records = RecordSource(tmp_path / name)
            for i in range(6):
                text = records[i].parts[0]
                corner = source[i].images[0].pixels[0, 0, 0]
                assert text.text == source[i].parts[0].text
                assert text.wordings == {"recaption": f"caption {corner}"}
            assert len(server.requests) == 6
        RateLimit(f"{server.url}/chat/completions m", None).path.unlink()


def test_documents_without_images(ray_session, tmp_path):
    config = curation_config(stages())
    summary = score_source(ShapesSource("text", num_documents=5), config, tmp_path / "scored")
    assert (summary["written"], summary["scores"]["clarity"]["count"]) == (5, 0)
    tally = select_documents(
        tmp_path / "scored", selection_config({"rules": RULES}), tmp_path / "selected"
    )
    assert (tally["kept"], tally["missing"]["clarity"]) == (5, 5)


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Documents that nobody can look at."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 0:
            raise DocumentError("unreadable", "the first")
        document = PlantedSource()[0]
        latents = Image(latents=np.zeros((4, 8), np.float16), grid=(2, 2))
        return dataclasses.replace(document, parts=(latents,))


def test_an_error_of_a_worker_is_one_line(ray_session, tmp_path):
    config = curation_config({"decode": {}})
    with pytest.raises(ValueError) as caught:
        score_source(LatentSource(), config, tmp_path / "out")
    message = str(caught.value)
    assert message == "document planted/planted/0: the image is given as latents; it has no pixels"


@dataclasses.dataclass(frozen=True)
class OddSource:
    """Three copies of a picture of sides 64, 200 and 100, with metadata that look like ours, then
    documents that cannot be written."""

    METADATA = (
        {"caption": "ok", "scores": [1, 2], "duplicates": 3, "curation": 5},
        {"scores": {"min_side": "tall"}, "curation": {"scores": [3], "duplicates": {"best": 1}}},
        {"phash": 1, "curation": {"scores": {"min_side": 9999}, "hash": 7, "more": 1}},
    )
    BAD = ({"a": "\ud800"}, {"a": {1, 2}}, {"a": 2**70})

    def __len__(self):
        return 8

    def __getitem__(self, index):
        encoded = planted.as_file(PlantedSource()._picture(3).resize((self._side(index),) * 2), 60)
        document = Document((Text("x"), Image(encoded=encoded)), str(index), "odd", "pair")
        if index < 3:
            return dataclasses.replace(document, metadata=self.METADATA[index])
        if index < 6:
            return dataclasses.replace(document, metadata=self.BAD[index - 3])
        return dataclasses.replace(document, **({"id": "\udc00"} if index == 6 else {"id": 7}))

    def _side(self, index):
        return (64, 200, 100, 30, 30, 30, 30, 30)[index]


def test_odd_metadata_and_the_best_that_passes(ray_session, tmp_path):
    out = tmp_path / "scored"
    config = curation_config(stages(), documents_per_shard=1)
    summary = score_source(OddSource(), config, out)
    assert (summary["written"], summary["faults"]) == (3, {"bad_document": 5})
    source = RecordSource(out)
    for i, side in enumerate((64, 200, 100)):
        metadata = source[i].metadata
        assert {k: v for k, v in metadata.items() if k != "curation"} == {
            k: v for k, v in OddSource.METADATA[i].items() if k != "curation"
        }
        assert set(metadata["curation"]) == {"scores", "hash", "duplicates"}
        assert metadata["curation"]["scores"]["min_side"] == side
        expected = {"group": 0, "best": i == 1, "quality": side**2}
        assert metadata["curation"]["duplicates"] == expected
    # By default the largest; without it the next, wherever the shards are cut; then the last one.
    cases = {None: ["1"], 150.0: ["2"], 90.0: ["0"], 10.0: []}
    for limit, kept in cases.items():
        for shard_bytes in (1, 2**29):
            values = {"rules": {"min_side": (None, limit)}, "shard_bytes": shard_bytes}
            folder = tmp_path / f"{limit} {shard_bytes}"
            tally = select_documents(out, selection_config(values), folder)
            found = RecordSource(folder)
            assert [found[i].id for i in range(len(found))] == kept
            assert tally["failed"]["duplicates"] == 2
            assert tally["failed"].get("min_side", 0) == sum(
                s > (limit or 1e9) for s in (64, 200, 100)
            )
