import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from nextstep_jax.curation.scorers import Scorer, build_scorer, rate
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document, Image, Text
from nextstep_jax.interop.clip_inputs import ClipPreprocessing, ClipTokenizer
from nextstep_jax.interop.clip_weights import read_clip
from nextstep_jax.models.clip import Clip
from tests import tiny_clip

CAPTIONS = ("A red cat", "the blue square", "the circle is on the square", "10 cats", "in the red")
IMAGES = [*tiny_clip.images_of(1, (40, 60)), *tiny_clip.images_of(2, (33, 32), count=2)]
HEAD = {"weight": tiny_clip.tensor_of("weight", (1, 16)), "bias": np.array([5], np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_clip.write_folder(tmp_path_factory.mktemp("curation") / "clip", "later")
    save_file(HEAD, folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def build(folder):
    """A scorer on the folder, one batch of which is smaller than what it is given below."""

    def build(kind, **values):
        if kind in ("clip", "clip_aesthetic"):
            values["head"] = str(folder / "head.safetensors")
        return build_scorer({"scorer": kind, "folder": str(folder), "batch_size": 3} | values)

    return build


@pytest.fixture(scope="module")
def embeddings(folder):
    """Unit vectors of the images and of the captions, without scorer or padding."""
    config, params = read_clip(folder)
    preprocessing = ClipPreprocessing(tiny_clip.IMAGE_SIZE, tiny_clip.IMAGE_SIZE)
    images = preprocessing.normalize(jnp.asarray([preprocessing.fit(pixels) for pixels in IMAGES]))
    token_ids = jnp.asarray(ClipTokenizer(folder / "tokenizer.json", config).encode(CAPTIONS))
    both = jax.jit(Clip(config).apply)({"params": params}, images, token_ids)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.asarray, both)]


def png(pixels):
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "png")
    return Image(encoded=stream.getvalue())


def pairs():
    """Captioned images, some as files."""
    return [
        Document(
            (Text(caption), png(pixels) if number % 2 else Image(pixels=pixels)),
            id=str(number),
            source="test",
            kind="pair",
        )
        for number, (caption, pixels) in enumerate(zip(CAPTIONS, IMAGES, strict=True))
    ]


def with_two_images(order, kind):
    """The images i and i + 1 with the caption i; the text is where `order` says."""
    made = []
    for number in range(4):
        images = [Image(pixels=IMAGES[number]), Image(pixels=IMAGES[number + 1])]
        images.insert(order, Text(CAPTIONS[number]))
        made.append(Document(tuple(images), id=str(number), source="test", kind=kind))
    return made


def column(rated, name):
    return [values[name] for values in rated]


def test_alignment_and_aesthetic(build, embeddings):
    images, texts = embeddings
    alignment = (images * texts).sum(axis=1)
    # The captions differ, and so do the images: a mistaken order would show.
    assert np.ptp(alignment) > 0.05
    aesthetic = images @ HEAD["weight"][0] + 5
    rated = rate(build("clip"), pairs())
    np.testing.assert_allclose(column(rated, "clip/alignment"), alignment, atol=2e-6)
    np.testing.assert_allclose(column(rated, "clip/aesthetic"), aesthetic, atol=1e-5)
    for kind, field in (("clip_alignment", "alignment"), ("clip_aesthetic", "aesthetic")):
        scorer = build(kind, name="other")
        assert isinstance(scorer, Scorer)
        assert (scorer.fields, scorer.batch_size, scorer.accelerator) == ((field,), 3, True)
        alone = column(rate(scorer, pairs()), f"other/{field}")
        np.testing.assert_allclose(alone, column(rated, f"clip/{field}"), atol=1e-6)


def test_edits(build, embeddings):
    images, texts = embeddings
    scorer = build("clip_edit")
    rated = rate(scorer, with_two_images(1, "edit"))
    similarity = (images[:-1] * images[1:]).sum(axis=1)
    alignment = (images[1:] * texts[:-1]).sum(axis=1)
    np.testing.assert_allclose(column(rated, "clip_edit/similarity"), similarity, atol=2e-6)
    np.testing.assert_allclose(column(rated, "clip_edit/alignment"), alignment, atol=2e-6)


def test_preferences(build, embeddings):
    images, texts = embeddings
    rated = rate(build("clip_preference"), with_two_images(0, "interleaved"))
    chosen = (images[:-1] * texts[:-1]).sum(axis=1)
    rejected = (images[1:] * texts[:-1]).sum(axis=1)
    np.testing.assert_allclose(column(rated, "clip_preference/chosen"), chosen, atol=2e-6)
    np.testing.assert_allclose(column(rated, "clip_preference/rejected"), rejected, atol=2e-6)
    margin = column(rated, "clip_preference/margin")
    np.testing.assert_allclose(margin, chosen - rejected, atol=4e-6)


def test_one_compilation(build):
    """Whatever the number and the sizes of the images, and whoever asks."""
    scorer = build("clip_alignment")
    assert build("clip_edit").clip is scorer.clip
    for count in (3, 1, 2):
        scorer.score(pairs()[-count:])
    assert scorer.clip._embed_images._cache_size() == 1
    assert scorer.clip._embed_texts._cache_size() == 1
    with pytest.raises(ValueError, match="4 documents are more than batch_size=3"):
        scorer.score(pairs()[:4])


def test_building_reads_no_weights(build, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("nextstep_jax.interop.streaming.load_params", refuse)
    scorer = build("clip", batch_size=1)
    with pytest.raises(AssertionError, match="weights were read"):
        scorer.score(pairs()[:1])


def test_bad_documents(build):
    documents = pairs()[:3]
    documents[1] = Document((Text("x"), Image(encoded=b"no")), id="1", source="test", kind="pair")
    rated = rate(build("clip_aesthetic"), documents)
    assert [isinstance(one, DocumentError) for one in rated] == [False, True, False]
    assert (rated[1].reason, "document '1' of 'test'" in str(rated[1])) == ("bad_image", True)


def test_embeddings_without_a_direction(tmp_path):
    """Zeros have no cosine; the error names the document."""
    tensors = tiny_clip.tensors_of("later")
    tensors["visual_projection.weight"] *= 0
    folder = tiny_clip.write_folder(tmp_path, "later", tensors)
    scorer = build_scorer({"scorer": "clip_alignment", "folder": str(folder), "batch_size": 1})
    with pytest.raises(ValueError, match=r"clip_alignment: document '0' .* not finite.*alignment"):
        rate(scorer, pairs()[:1])


def test_faults_are_seen_at_once(folder, tmp_path):
    for values, error, words in (
        ({"folder": str(tmp_path)}, FileNotFoundError, "config.json is not there"),
        ({"folder": ""}, ValueError, "folder='' must be the folder of a CLIP"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be an integer of at least 1"),
    ):
        with pytest.raises(error, match=words):
            build_scorer({"scorer": "clip_alignment", "folder": str(folder), **values})
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file"):
        build_scorer({"scorer": "clip", "folder": str(folder), "head": str(tmp_path / "none.pth")})
