import itertools
import math
import textwrap

import numpy as np
import pytest

from nextstep_jax.curation import scorers
from nextstep_jax.curation.scorers import (
    SCORERS,
    EditChange,
    Scorer,
    build_scorer,
    edit_of,
    pixels_in,
    preference_of,
    rate,
    text_in,
)
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document, Image, Text


def flat(value, size=(6, 8)):
    return Image(pixels=np.full((*size, 3), value, np.uint8))


def document(*parts, id="a", kind="edit"):
    parts = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    return Document(parts, id=id, source="test", kind=kind)


def edit(before, after, id="a", **options):
    return document(flat(before), "paint it", flat(after, **options), id=id)


class Fixed:
    """Says what it is told, a value a document."""

    name, fields, batch_size, accelerator = "fixed", ("one", "two"), 3, False

    def __init__(self, values):
        self.values, self.sizes = iter(values), []

    def score(self, documents):
        self.sizes.append(len(documents))
        return [dict(zip(self.fields, next(self.values), strict=True)) for _ in documents]


def test_edit_change():
    scorer = EditChange()
    half = np.full((6, 8, 3), 40, np.uint8)
    half[:, :4] += 51
    documents = [
        edit(10, 10),
        edit(0, 255),
        edit(255, 0),
        edit(200, 149),
        document(flat(40), "paint half of it", Image(pixels=half)),
        # A source of another size is fitted first.
        edit(10, 61, size=(12, 12)),
    ]
    changes = [values["change"] for values in scorer.score(documents)]
    np.testing.assert_allclose(changes, [0, 1, 1, 0.2, 0.1, 0.2], rtol=1e-12)
    assert isinstance(scorer, Scorer)


def test_parts_of_an_edit():
    sources = flat(1), flat(2), flat(3, size=(4, 4))
    found = edit_of(document(sources[0], "make it", sources[1], "red", sources[2]))
    assert found.instruction == "make it\nred"
    assert found.source.max() == found.source.min() == 1
    assert found.result.shape == (4, 4, 3)
    assert found.result.max() == 3
    pair = document("a cat", flat(7), flat(9), kind="interleaved")
    prompt, chosen, rejected = preference_of(pair)
    assert (prompt, chosen[0, 0, 0], rejected[0, 0, 0]) == ("a cat", 7, 9)


@pytest.mark.parametrize(
    ("call", "made", "reason", "words"),
    [
        (edit_of, document("x", flat(1)), "bad_document", "is no edit: it has 1 images"),
        (edit_of, document(flat(1), flat(2)), "empty_text", "has no text to rate"),
        (preference_of, document("x", *[flat(1)] * 3), "bad_document", "3 images, not two"),
        (text_in, document(" ", flat(1)), "empty_text", "has no text"),
        (lambda d: pixels_in(d, -1), document("x"), "bad_document", "has 0 images, none of"),
        (
            lambda d: pixels_in(d, 0),
            document(Image(encoded=b"no image")),
            "bad_image",
            "cannot decode",
        ),
    ],
)
def test_documents_that_cannot_be_rated(call, made, reason, words):
    with pytest.raises(DocumentError, match=rf"document 'a' of 'test'.*{words}") as caught:
        call(made)
    assert caught.value.reason == reason


def test_latents_are_a_mistake_of_the_run():
    latents = Image(latents=np.zeros((4, 64), np.float32), grid=(2, 2))
    with pytest.raises(ValueError, match=r"document 'a' of 'test': .* latents") as caught:
        pixels_in(document(latents), 0)
    assert not isinstance(caught.value, DocumentError)


def test_rate_names_and_batches():
    scorer = Fixed((number, -number) for number in itertools.count())
    rated = rate(scorer, [edit(0, 0, id=str(n)) for n in range(7)])
    assert scorer.sizes == [3, 3, 1]
    assert rated == [{"fixed/one": float(n), "fixed/two": float(-n)} for n in range(7)]
    assert all(type(value) is float for values in rated for value in values.values())


def test_rate_finds_the_bad_document():
    documents = [edit(0, 51 * n, id=str(n)) for n in range(5)]
    documents[2] = document("no image", id="2")
    rated = rate(EditChange(batch_size=4), documents)
    assert isinstance(rated[2], DocumentError)
    assert "document '2'" in str(rated[2])
    changes = [rated[n]["edit_change/change"] for n in (0, 1, 3, 4)]
    np.testing.assert_allclose(changes, [0, 0.2, 0.6, 0.8], rtol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite(value):
    scorer = Fixed([(1, 2), (3, value)])
    with pytest.raises(ValueError, match=r"fixed: document 'b' of 'test' .* not finite: {'two'"):
        rate(scorer, [edit(0, 0), edit(0, 0, id="b")])


def test_scores_that_are_not_those_promised():
    scorer = Fixed([(1, 2)])
    scorer.score = lambda documents: [{"one": 1.0}]
    with pytest.raises(ValueError, match=r"document 'a' .* has \['one'\], expected \['one', 'two"):
        rate(scorer, [edit(0, 0)])
    scorer.score = lambda documents: []
    with pytest.raises(ValueError, match="fixed: 0 ratings of 1 documents"):
        rate(scorer, [edit(0, 0)])


def test_build_scorer():
    scorer = build_scorer({"scorer": "edit_change", "name": "pixels", "batch_size": 5})
    assert isinstance(scorer, EditChange)
    assert (scorer.name, scorer.fields, scorer.batch_size) == ("pixels", ("change",), 5)
    assert scorer.accelerator is False


def test_example_of_a_users_own(tmp_path, monkeypatch):
    """The one in the head of the file."""
    lines = scorers.__doc__.split("    # my_scorers.py\n")[1].split("    # in the config\n")
    (tmp_path / "my_scorers.py").write_text(textwrap.dedent(lines[0]))
    monkeypatch.syspath_prepend(tmp_path)
    scorer = build_scorer(eval(lines[1].split("\n")[0]))
    assert isinstance(scorer, Scorer)
    assert rate(scorer, [edit(0, 30)]) == [{"brightness/mean": 15.0}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "scorer=None must be one of .*'edit_change'.* or 'module:Class'"),
        ({"scorer": "edits"}, "scorer='edits' must be one of"),
        ({"scorer": "no_such_module:It"}, "cannot import it: No module named 'no_such_module'"),
        ({"scorer": "math:It"}, "'math:It': cannot import it: .*'It'"),
        ({"scorer": ":It"}, "':It': cannot import it"),
        (
            {"scorer": "edit_change", "size": 3},
            r"unexpected keyword argument 'size'; it takes \['name', 'batch_size'\]",
        ),
        ({"scorer": "edit_change", "batch_size": 0}, "batch_size=0 must be an integer of at least"),
        ({"scorer": "edit_change", "name": ""}, "name='' must be text"),
        ({"scorer": "collections:Counter"}, "is no Scorer: it lacks .*'fields'"),
        ({"scorer": "clip_alignment"}, "missing a required argument: 'folder'; it takes"),
        (
            {"scorer": "clip_alignment", "folder": "x", "dtype": "int8"},
            r"dtype='int8' must be one of \['float32', 'bfloat16'\]",
        ),
    ],
)
def test_scorers_that_cannot_be_built(values, words):
    with pytest.raises(ValueError, match=words):
        build_scorer(values)


@pytest.mark.parametrize("kind", SCORERS)
def test_names_in_the_table(kind):
    """Whatever it takes, no scorer takes this."""
    with pytest.raises(ValueError, match=rf"scorer='{kind}': .*'nothing'|missing"):
        build_scorer({"scorer": kind, "nothing": 0})
