"""Asking a model behind an OpenAI-compatible endpoint: retries, a rate limit, no lost answers.

    POST {url}/chat/completions   {"model", "messages", "max_tokens", "temperature"}

What is temporary (429, 408, 5xx, time-outs, broken connections) is tried again after a wait that
doubles; what the server says in Retry-After counts, for all who ask it from this machine. What is
wrong for good stops the run (401, 403, 404) or is the fault of one document (other 4xx).
"""

import base64
import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import json
import logging
import math
import os
import pathlib
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nextstep_jax.curation.config import Recaption

_TEMPORARY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSED = frozenset({401, 403, 404, 405})
_MAX_WAIT = 120.0
_MAX_QUOTED = 200
# Bytes of an answer; captions are a thousandth of it. Ours.
_MAX_ANSWER = 2**20
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


class NoAnswerError(Exception):
    """The endpoint gave no caption for one document."""


class RateLimit:
    """Spaces requests evenly over all threads and processes of a machine.

    A small file holds when the next request may leave, on the clock that all processes share; a
    lock on it lets one after the other take its turn.

    Attributes:
        path: The file, in the folder for temporary files.
    """

    def __init__(
        self,
        name: str,
        requests_per_minute: float | None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """The limit that everything with this name on this machine shares."""
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        # That clock starts anew with the machine.
        boot = _BOOT_ID.read_text() if _BOOT_ID.is_file() else ""
        digest = hashlib.blake2b(f"{os.getuid()} {boot} {name}".encode(), digest_size=12)
        name = f"nextstep_jax-requests-{digest.hexdigest()}"
        self.path = pathlib.Path(tempfile.gettempdir()) / name
        self._sleep = sleep

    def wait(self) -> None:
        """Returns when it is this request's turn."""
        with self._next() as (now, begins, write):
            turn = max(now, begins)
            write(turn + self._interval)
        if turn > now:
            self._sleep(turn - now)

    def pause(self, seconds: float) -> None:
        """Lets no request leave for so long, from any process; for some minutes at most."""
        with self._next() as (now, begins, write):
            write(max(begins, now + _capped(seconds)))

    @contextlib.contextmanager
    def _next(self) -> Iterator[tuple[float, float, Callable[[float], None]]]:
        """(now, when the next may leave, set that), while nobody else looks."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(self.path, flags, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read().strip()

            def write(begins: float) -> None:
                file.seek(0)
                file.truncate()
                file.write(repr(begins))
                file.flush()

            begins = 0.0
            with contextlib.suppress(ValueError):
                begins = float(text or 0.0)
            # What is no time would stop everybody for good.
            yield time.monotonic(), begins if math.isfinite(begins) else 0.0, write


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the redirect to be an error."""


class Endpoint:
    """A model to be asked about images. May be used by several threads.

    Attributes:
        num_requests: Requests sent so far, retries included.
    """

    def __init__(self, options: Recaption, sleep: Callable[[float], None] = time.sleep):
        """Finds the key.

        Raises:
            ValueError: The environment variable for it is not set.
        """
        self._options, self._sleep = options, sleep
        self._headers = {"Content-Type": "application/json"}
        if options.api_key_variable is not None:
            key = os.environ.get(options.api_key_variable)
            if not key:
                raise ValueError(
                    f"recaption.api_key_variable: ${options.api_key_variable} is not set on"
                    " this machine"
                )
            self._headers["Authorization"] = f"Bearer {key}"
        self._url = options.url.rstrip("/") + "/chat/completions"
        name = f"{self._url} {options.model}"
        self._limit = RateLimit(name, options.requests_per_minute, sleep)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.num_requests = 0

    def ask(self, prompt: str, image: bytes, media_type: str) -> str:
        """The model's answer to a prompt about an image.

        Args:
            prompt: The question.
            image: The bytes of an image file.
            media_type: Of these bytes, such as "image/png".

        Raises:
            NoAnswerError: There is none after all retries, or this image or prompt is refused.
            ValueError: The endpoint refuses everybody: the key, the model or the URL is wrong.
        """
        encoded = base64.b64encode(image).decode()
        content = [
            {"type": "text", "text": prompt},
            {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{encoded}"}},
        ]
        body = {
            "model": self._options.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
        }
        data = json.dumps(body).encode()
        # Which image it is decides by how much its retries are shifted against the others'.
        seed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        rng = np.random.default_rng(seed)
        for attempt in range(self._options.max_retries + 1):
            answer, fault, retry_after = self._try(data)
            if fault is None:
                return answer
            logging.debug("attempt %d: %s", attempt + 1, fault)
            if attempt < self._options.max_retries:
                wait = min(self._options.backoff * 2**attempt, _MAX_WAIT) * rng.uniform(0.5, 1.5)
                if retry_after > 0:
                    self._limit.pause(retry_after)
                self._sleep(max(wait, retry_after))
        raise NoAnswerError(f"{self._options.max_retries + 1} attempts, the last: {fault}")

    def _try(self, data: bytes) -> tuple[str, str | None, float]:
        """(answer, None, 0), or ("", what was temporarily wrong, seconds of Retry-After)."""
        self._limit.wait()
        self.num_requests += 1
        request = urllib.request.Request(self._url, data, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._options.timeout) as response:
                return _caption_in(_body_of(response)), None, 0.0
        except urllib.error.HTTPError as error:
            text = ""
            # The connection may break now, too.
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                text = error.read(_MAX_QUOTED).decode("utf-8", "replace")
            said = f"{error.code} {error.reason}: {text}".strip(": ")
            if error.code in _TEMPORARY:
                return "", said, _seconds(error.headers.get("Retry-After"))
            if error.code in _REFUSED or 300 <= error.code < 400:
                raise ValueError(f"recaption.url={self._options.url!r} answers {said}") from error
            raise NoAnswerError(said) from error
        except (OSError, http.client.HTTPException) as error:
            return "", f"{type(error).__name__}: {error}", 0.0


def _body_of(response: http.client.HTTPResponse) -> bytes:
    """The body of a response.

    Raises:
        NoAnswerError: It is longer than any caption.
        http.client.IncompleteRead: It is cut off.
    """
    body = response.read(_MAX_ANSWER + 1)
    if len(body) > _MAX_ANSWER:
        raise NoAnswerError(f"an answer of more than {_MAX_ANSWER} bytes")
    # With a limit, the library does not check this.
    if response.length:
        raise http.client.IncompleteRead(body, response.length)
    return body


def _caption_in(response: bytes) -> str:
    """The text of the first choice.

    Raises:
        NoAnswerError: There is none, it is empty, or it is no text that UTF-8 can say.
    """
    try:
        text = json.loads(response)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise NoAnswerError(f"no chat completion: {response[:_MAX_QUOTED]!r}") from error
    if not isinstance(text, str) or not text.strip():
        raise NoAnswerError(f"an empty answer: {response[:_MAX_QUOTED]!r}")
    try:
        # JSON can name half of a surrogate pair.
        text.encode()
    except UnicodeEncodeError as error:
        raise NoAnswerError(f"an answer that is no text: {error}") from error
    return text.strip()


def _seconds(retry_after: str | None) -> float:
    """The wait that a Retry-After header asks for, by a number of seconds or a date; capped."""
    if not retry_after:
        return 0.0
    with contextlib.suppress(ValueError):
        return _capped(float(retry_after))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return _capped(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _capped(seconds: float) -> float:
    """A wait between 0 and `_MAX_WAIT`; the latter for what is no number."""
    return min(max(0.0, seconds), _MAX_WAIT) if math.isfinite(seconds) else _MAX_WAIT
