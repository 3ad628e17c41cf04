"""Scorers on a user's CLIP: aesthetics, agreement with the text, edits and preferences.

What NextStep-1 (arXiv 2508.10711, section 3) calls aesthetic filtering and text-image alignment:
a published head on the embedding of an image, and the cosine of the embeddings of image and text
(arXiv 2103.00020). Images and texts go through the towers in batches of one size, so that each
tower is compiled once.

Words: the folder is what `interop.clip_weights` reads; the result is the last image of a document.
"""

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nextstep_jax.curation.scorers import Pixels, edit_of, pixels_in, preference_of, text_in
from nextstep_jax.data.schema import Document
from nextstep_jax.interop.clip_inputs import ClipTokenizer, read_preprocessing
from nextstep_jax.interop.clip_weights import (
    open_aesthetic_head,
    open_clip,
    read_aesthetic_head,
    read_clip,
)
from nextstep_jax.models.clip import Clip as ClipModel
from nextstep_jax.models.clip import cosine

DTYPES = ("float32", "bfloat16")
"""What a CLIP computes in; bfloat16 is faster on accelerators, and its cosines are rougher."""

# Pillow lets other threads run while it decodes and resizes. Ours.
_NUM_THREADS = min(8, os.cpu_count() or 1)


class ClipEmbedder:
    """A CLIP that embeds a batch of images or texts; the first one reads the weights.

    Embeddings have `batch_size` rows, of which those behind the last image or text mean nothing.
    """

    def __init__(self, folder: str, batch_size: int, dtype: str):
        """Checks everything but the weights' values.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: See `open_clip`, `read_preprocessing` and `ClipTokenizer`.
        """
        self._folder, self._batch_size = pathlib.Path(folder), batch_size
        self.config, _ = open_clip(self._folder)
        self._preprocessing = read_preprocessing(self._folder, self.config)
        self._tokenizer = ClipTokenizer(self._folder / "tokenizer.json", self.config)
        model = ClipModel(self.config, jnp.dtype(dtype))
        apply = functools.partial(model.apply, method=ClipModel.embed_images)
        self._embed_images = jax.jit(
            lambda params, images: apply(params, self._preprocessing.normalize(images))
        )
        self._embed_texts = jax.jit(functools.partial(model.apply, method=ClipModel.embed_texts))

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return {"params": read_clip(self._folder)[1]}

    def images(self, images: Sequence[Pixels]) -> Float[Array, "batch embed"]:
        """Embeddings of images of any sizes, at most `batch_size`."""
        fitted = np.stack(in_threads(self._preprocessing.fit, images))
        return self._embed(self._embed_images, fitted)

    def texts(self, texts: Sequence[str]) -> Float[Array, "batch embed"]:
        """Embeddings of texts, at most `batch_size`; what exceeds the context is cut off."""
        return self._embed(self._embed_texts, self._tokenizer.encode(texts))

    def _embed(self, embed: Callable[..., jax.Array], rows: np.ndarray) -> jax.Array:
        if len(rows) > self._batch_size:
            raise ValueError(f"{len(rows)} documents are more than batch_size={self._batch_size}")
        full = np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
        full[: len(rows)] = rows
        # Else a TPU, and a recent GPU, would round what it multiplies.
        with jax.default_matmul_precision("float32"):
            return embed(self._params, full)


@functools.lru_cache(maxsize=2)
def _shared_embedder(folder: str, batch_size: int, dtype: str) -> ClipEmbedder:
    """Scorers on one worker that have a CLIP in common hold its weights once."""
    return ClipEmbedder(folder, batch_size, dtype)


def in_threads(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """`function` of each value, in order, in some threads."""
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(function, values))


class ClipScorer:
    """What the scorers on a CLIP share; the attributes are those of `Scorer`."""

    name = "clip"
    fields: tuple[str, ...]
    accelerator = True

    def __init__(
        self, folder: str, name: str | None = None, batch_size: int = 64, dtype: str = "float32"
    ):
        """Takes the folder of the weights, the settings of `Scorer`, and one of `DTYPES`.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: A setting is none of the accepted ones, or see `ClipEmbedder`.
        """
        if not folder:
            raise ValueError(f"folder={folder!r} must be the folder of a CLIP")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {list(DTYPES)}")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
        self.name = self.name if name is None else name
        self.batch_size = batch_size
        self.clip = _shared_embedder(folder, batch_size, dtype)

    def score(self, documents: Sequence[Document]) -> list[dict[str, float]]:
        """See `Scorer`."""
        columns = {name: np.asarray(column) for name, column in self._columns(documents).items()}
        return [
            {name: float(columns[name][row]) for name in self.fields}
            for row in range(len(documents))
        ]

    def _columns(self, documents: Sequence[Document]) -> dict[str, jax.Array]:
        """The scores by field, with as many rows as an embedding has."""
        raise NotImplementedError


class ClipAlignment(ClipScorer):
    """`alignment`: the cosine of a document's text and its last image, from -1 to 1.

    Of an edit it compares the instruction with the result. LAION-5B (arXiv 2210.08402) kept
    English captions from 0.28 on, by ViT-B/32.
    """

    name = "clip_alignment"
    fields = ("alignment",)

    def _columns(self, documents: Sequence[Document]) -> dict[str, jax.Array]:
        texts = self.clip.texts([text_in(document) for document in documents])
        return {"alignment": cosine(self.clip.images(_results(documents)), texts)}


class ClipAesthetic(ClipScorer):
    """`aesthetic`: what a published head says of a document's last image, from about 1 to 10."""

    name = "clip_aesthetic"
    fields = ("aesthetic",)

    def __init__(
        self,
        folder: str,
        head: str,
        name: str | None = None,
        batch_size: int = 64,
        dtype: str = "float32",
    ):
        """Takes the file of the head besides what `ClipScorer` takes.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: See `ClipScorer` and `open_aesthetic_head`.
        """
        super().__init__(folder, name, batch_size, dtype)
        self._path = pathlib.Path(head)
        open_aesthetic_head(self._path, self.clip.config.embed_dim)

    @functools.cached_property
    def _head(self) -> Callable[[jax.Array], jax.Array]:
        head, params = read_aesthetic_head(self._path, self.clip.config.embed_dim)
        return functools.partial(jax.jit(head.apply), {"params": params})

    def _columns(self, documents: Sequence[Document]) -> dict[str, jax.Array]:
        return self._rate(self.clip.images(_results(documents)))

    def _rate(self, images: Float[Array, "batch embed"]) -> dict[str, jax.Array]:
        with jax.default_matmul_precision("float32"):
            return {"aesthetic": self._head(images)}


class Clip(ClipAesthetic):
    """`aesthetic` and `alignment` in one pass over the images."""

    name = "clip"
    fields = ("aesthetic", "alignment")

    def _columns(self, documents: Sequence[Document]) -> dict[str, jax.Array]:
        texts = self.clip.texts([text_in(document) for document in documents])
        images = self.clip.images(_results(documents))
        return {**self._rate(images), "alignment": cosine(images, texts)}


class ClipEdit(ClipScorer):
    """Edits: cosines of source and result (`similarity`), of instruction and result (`alignment`).

    A `similarity` near 1 says that little was lost, or that nothing was done; `EditChange` tells
    the two apart.
    """

    name = "clip_edit"
    fields = ("similarity", "alignment")

    def _columns(self, documents: Sequence[Document]) -> dict[str, jax.Array]:
        edits = in_threads(edit_of, documents)
        sources = self.clip.images([edit.source for edit in edits])
        results = self.clip.images([edit.result for edit in edits])
        texts = self.clip.texts([edit.instruction for edit in edits])
        return {"similarity": cosine(sources, results), "alignment": cosine(results, texts)}


class ClipPreference(ClipScorer):
    """Preferences: the cosines of the prompt with either image, and their difference (`margin`)."""

    name = "clip_preference"
    fields = ("chosen", "rejected", "margin")

    def _columns(self, documents: Sequence[Document]) -> dict[str, jax.Array]:
        pairs = in_threads(preference_of, documents)
        texts = self.clip.texts([pair.prompt for pair in pairs])
        chosen = cosine(self.clip.images([pair.chosen for pair in pairs]), texts)
        rejected = cosine(self.clip.images([pair.rejected for pair in pairs]), texts)
        return {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}


def _results(documents: Sequence[Document]) -> list[Pixels]:
    return in_threads(lambda document: pixels_in(document, -1), documents)
