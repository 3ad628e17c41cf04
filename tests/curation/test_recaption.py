"""Recaptioning against a server of our own on 127.0.0.1."""

import email.utils
import io
import threading
import time

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.curation.config import Recaption
from nextstep_jax.curation.endpoint import NoAnswerError, RateLimit
from nextstep_jax.curation.recaption import CaptionCache, Recaptioner, file_of, with_wording
from nextstep_jax.data.schema import Document, Image, Text
from tests.curation.caption_server import caption_server


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where rate limits keep their turns."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def server():
    with caption_server() as found:
        yield found


def pair(value, **changes):
    image = Image(pixels=np.full((40, 48, 3), value, np.uint8))
    document = Document((Text(f"old {value}"), image), f"d{value}", "test", "pair")
    return Document(**{**document.__dict__, **changes})


def recaptioner(server, tmp_path, sleep=time.sleep, **changes):
    options = {"model": "m", "concurrency": 1, "backoff": 0.01, "max_failed_fraction": 0.0}
    options = Recaption(url=server.url, **{**options, **changes})
    return Recaptioner(options, CaptionCache(tmp_path / "captions"), sleep)


def test_a_caption_becomes_a_wording_and_is_asked_once(server, tmp_path):
    documents = [pair(10), pair(20), pair(10, id="the same image"), pair(30, kind="edit")]
    first = recaptioner(server, tmp_path, concurrency=4)
    found, failed = first.recaption(documents)
    texts = [document.parts[0] for document in found]
    assert [text.text for text in texts] == ["old 10", "old 20", "old 10", "old 30"]
    assert [dict(text.wordings) for text in texts] == [
        *({"recaption": "caption 10"}, {"recaption": "caption 20"}, {"recaption": "caption 10"}),
        {},
    ]
    assert (failed, len(server.requests), first.endpoint.num_requests) == (0, 2, 2)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 300, 0.0)
    second = recaptioner(server, tmp_path)
    again, _ = second.recaption(documents)
    assert [d.parts[0] for d in again] == texts
    assert (len(server.requests), second.endpoint.num_requests) == (2, 0)
    # Another prompt, model or image is another question.
    recaptioner(server, tmp_path, prompt="What?").recaption(documents[:1])
    recaptioner(server, tmp_path, model="n").recaption(documents[:1])
    recaptioner(server, tmp_path, temperature=0.5).recaption(documents[:1])
    assert len(server.requests) == 5


def test_what_is_temporary_is_tried_again(server, tmp_path):
    waits = []
    server.script = [(429, {"Retry-After": "30"}), (500, {}), ("hang up", {}), (503, {})]
    found, _ = recaptioner(server, tmp_path, waits.append, backoff=0.5).recaption([pair(10)])
    assert found[0].parts[0].wordings == {"recaption": "caption 10"}
    assert len(server.requests) == 5
    # The limit waits what is left of the pause; time does not pass in this test.
    retries = [wait for wait in waits if not 25 < wait < 30]
    assert retries[0] == 30.0
    for attempt, wait in enumerate(retries[1:], start=1):
        assert 0.5 * 0.5 * 2**attempt <= wait <= 1.5 * 0.5 * 2**attempt, retries
    assert len(retries) == 4


def test_retry_after_may_be_a_date(server, tmp_path):
    waits = []
    date = email.utils.format_datetime(email.utils.localtime(), usegmt=False)
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    server.script = [(429, {"Retry-After": later}), (429, {"Retry-After": date})]
    recaptioner(server, tmp_path, waits.append).recaption([pair(10)])
    assert 28 <= max(waits) <= 30
    assert len(server.requests) == 3


def test_failures_stop_the_run_unless_they_are_few(server, tmp_path):
    server.script = [(500, {})] * 3 + [(400, {})]
    strict = recaptioner(server, tmp_path, max_retries=2)
    with pytest.raises(
        OSError, match=r"1 of 1 documents got no caption.*3 attempts, the last: 500"
    ):
        strict.recaption([pair(10)])
    assert len(server.requests) == 3
    # A 400 is the fault of the document: it is not asked again.
    found, failed = recaptioner(server, tmp_path, max_failed_fraction=0.5).recaption(
        [pair(20), pair(30)]
    )
    assert (failed, len(server.requests)) == (1, 5)
    assert [dict(d.parts[0].wordings) for d in found] == [{}, {"recaption": "caption 30"}]


def test_a_refused_key_stops_at_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPTION_KEY", "not-the-right-one")
    server.script = [(401, {})]
    asked = recaptioner(server, tmp_path, api_key_variable="CAPTION_KEY")
    with pytest.raises(ValueError, match="answers 401"):
        asked.recaption([pair(10)])
    assert server.requests[0][1]["Authorization"] == "Bearer not-the-right-one"
    assert len(server.requests) == 1
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any("not-the-right-one" in text for text in written)
    monkeypatch.delenv("CAPTION_KEY")
    with pytest.raises(ValueError, match=r"\$CAPTION_KEY is not set"):
        recaptioner(server, tmp_path, api_key_variable="CAPTION_KEY")


def test_no_redirect_carries_the_key_away(server, tmp_path):
    server.script = [(302, {"Location": server.url + "/elsewhere"})]
    with pytest.raises(ValueError, match="answers 302"):
        recaptioner(server, tmp_path).recaption([pair(10)])
    assert len(server.requests) == 1


def test_requests_keep_their_distance_over_threads_and_callers(server, tmp_path):
    per_minute = 1200.0  # One every 50 ms.
    callers = [
        recaptioner(server, tmp_path, concurrency=3, requests_per_minute=per_minute)
        for _ in range(2)
    ]
    documents = [pair(value) for value in range(10, 80, 10)]
    threads = [
        threading.Thread(target=caller.recaption, args=(part,))
        for caller, part in zip(callers, (documents[:4], documents[4:]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.times) == 7
    # Six intervals; the way to the server adds or takes a little.
    assert max(server.times) - min(server.times) >= 6 * 0.05 - 0.03


def test_a_rate_limit_counts_turns():
    slept = []
    limits = [RateLimit(f"test {time.time()}", 60.0, slept.append)] * 2
    for limit in [*limits, *limits]:
        limit.wait()
    # The first leaves at once, the others wait for their turns; no time passes.
    np.testing.assert_allclose(slept, [1.0, 2.0, 3.0], atol=0.2)
    limits[0].pause(10.0)
    limits[1].wait()
    assert slept[-1] == pytest.approx(10.0, abs=0.2)


def test_answers_that_are_none(server, tmp_path):
    endpoint = recaptioner(server, tmp_path).endpoint
    image, media_type = file_of(pair(10).images[0], None)
    assert endpoint.ask("?", image, media_type) == "caption 10"
    endpoint._url = server.url + "/chat/completions"
    server.script = [(422, {})]
    with pytest.raises(NoAnswerError, match="422"):
        endpoint.ask("?", image, media_type)


def test_files_are_sent_as_they_are_or_smaller():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "WEBP")
    assert file_of(Image(encoded=file.getvalue()), 200) == (file.getvalue(), "image/webp")
    data, media_type = file_of(Image(encoded=file.getvalue()), 100)
    assert (media_type, PIL.Image.open(io.BytesIO(data)).size) == ("image/jpeg", (100, 45))
    data, media_type = file_of(Image(pixels=pixels), None)
    assert media_type == "image/png"
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), pixels)


def test_a_pair_without_words_gets_some():
    document = with_wording(Document((pair(1).images[0],), "i", "s", "pair"), "new", "a caption")
    assert document.parts[0] == Text("a caption", wordings={"new": "a caption"})
    assert len(document.parts) == 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [{"message": {"content": "half \\ud800"}}]}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        b"[" * 200_000,
        b'{"choices": [{"message": {"content": "long"}}]}' + b" " * 2**20,
    ],
)
def test_answers_that_are_no_text(server, tmp_path, body):
    server.bodies = [body]
    asked = recaptioner(server, tmp_path, max_failed_fraction=1.0)
    found, failed = asked.recaption([pair(10)])
    assert (failed, dict(found[0].parts[0].wordings), len(server.requests)) == (1, {}, 1)
    # Nothing was kept.
    found, failed = asked.recaption([pair(10)])
    assert (failed, found[0].parts[0].wordings["recaption"]) == (0, "caption 10")


def test_a_cached_answer_that_is_no_text_is_asked_again(tmp_path):
    cache = CaptionCache(tmp_path)
    cache.put("aa1", "fine")
    cache.put("aa2", "half \ud800")
    assert (cache.get("aa1"), cache.get("aa2"), cache.get("aa3")) == ("fine", None, None)


def test_an_answer_that_is_cut_off_is_asked_again(server, tmp_path):
    server.script = [(200, {"Content-Length": "4000", "Connection": "close"})]
    found, _ = recaptioner(server, tmp_path, timeout=5.0).recaption([pair(10)])
    assert found[0].parts[0].wordings == {"recaption": "caption 10"}
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        *(("nan", 120), ("inf", 120), ("1e400", 120), ("99999", 120), ("-3", 0), ("7.5", 7.5)),
        *(("Fri, 31 Dec 9999 23:59:59 GMT", 120), ("soon", 0)),
    ],
)
def test_retry_after_is_capped(server, tmp_path, said, seconds):
    waits = []
    server.script = [(429, {"Retry-After": said})]
    asked = recaptioner(server, tmp_path, waits.append)
    asked.recaption([pair(10)])
    assert waits[0] == pytest.approx(seconds, abs=0.02)
    left = float(asked.endpoint._limit.path.read_text()) - time.monotonic()
    assert left == pytest.approx(seconds, abs=1) or seconds == 0


@pytest.mark.parametrize("text", ["inf", "nan", "-inf", "tomorrow"])
def test_a_turn_that_is_no_time_is_ignored(text):
    slept = []
    limit = RateLimit(f"test {text} {time.time()}", 60.0, slept.append)
    limit.path.write_text(text)
    limit.wait()
    assert slept == []
    limit.wait()
    assert slept == [pytest.approx(1.0, abs=0.2)]
