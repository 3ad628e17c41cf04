import dataclasses

import numpy as np
import pytest

from nextstep_jax.data.arrangement import Draws, LayoutConfig, arrange_parts, strip_opening
from nextstep_jax.data.schema import Document, Image, Text

N = 400


def picture(value):
    return Image(pixels=np.full((32, 32, 3), value, np.uint8))


def names(parts):
    """Texts as they are, images by their colour, in brackets where they are not trained."""
    found = []
    for part in parts:
        if isinstance(part, Text):
            found.append(part.text)
        else:
            value = str(part.pixels[0, 0, 0])
            found.append(value if part.loss else f"({value})")
    return " ".join(found)


def outcomes(kind, parts, n=N, **changes):
    """How often which arrangement is drawn."""
    document = Document(tuple(parts), "7", "toy", kind)
    config = LayoutConfig(image_bases=(32,), **changes)
    found = {}
    for i in range(n):
        name = names(arrange_parts(document, config, Draws.of(np.random.default_rng([5, i]))))
        found[name] = found.get(name, 0) + 1
    return found


def assert_shares(found, expected):
    """Every outcome within four standard deviations of its binomial, and no other."""
    assert set(found) == set(expected), found
    n = sum(found.values())
    for name, share in expected.items():
        deviation = 4 * (n * share * (1 - share)) ** 0.5
        assert abs(found[name] - share * n) <= deviation, (name, found[name], share * n)


def test_pairs():
    # Independent: 0.3 for the image in front, 0.5 for a capital.
    found = outcomes("pair", [Text("a dog"), picture(1)])
    assert_shares(found, {"a dog 1": 0.35, "A dog 1": 0.35, "1 a dog": 0.15, "1 A dog": 0.15})
    assert outcomes(
        "pair", [Text("a dog"), picture(1)], image_first_prob=0.0, capitalize_prob=1.0
    ) == {"A dog 1": N}


def test_wordings_by_their_ratios():
    text = Text("main", wordings={"long": "the image shows x", "short": "s", "zh": "z"})
    fixed = {"image_first_prob": 0.0, "capitalize_prob": 0.0}
    ratios = {"long": 0.5, "short": 0.3, "zh": 0.2}
    found = outcomes("pair", [text, picture(1)], caption_ratios=ratios, **fixed)
    assert_shares(found, {"the image shows x 1": 0.5, "s 1": 0.3, "z 1": 0.2})
    # Keys that the document lacks leave their share to the others.
    lacking = dataclasses.replace(text, wordings={"short": "s", "zh": "z"})
    found = outcomes("pair", [lacking, picture(1)], caption_ratios=ratios, **fixed)
    assert_shares(found, {"s 1": 0.6, "z 1": 0.4})
    assert outcomes("pair", [text, picture(1)], caption_ratios={"de": 1.0}, **fixed) == {
        "main 1": N
    }
    stripped = outcomes(
        "pair",
        [text, picture(1)],
        caption_ratios={"long": 1.0},
        strip_openings_of=("long",),
        **fixed,
    )
    assert stripped == {"X 1": N}


def test_edits_of_two_images():
    # 0.1 all images last, and independent of it 0.2 without the source or the text, half each.
    found = outcomes("edit", [picture(1), Text("make it red"), picture(2)])
    assert_shares(
        found,
        {
            "(1) make it red 2": 0.9 * 0.8,
            "make it red (1) 2": 0.1 * 0.8,
            "make it red 2": 0.1,
            "(1) 2": 0.1,
        },
    )


def test_edits_of_three_images():
    parts = [picture(1), picture(2), Text("join"), picture(3)]
    found = outcomes("edit", parts, edit_images_last_prob=0.0)
    assert_shares(found, {"(1) (2) join 3": 0.7, "(2) join 3": 0.3 * 0.3, "(1) join 3": 0.3 * 0.7})
    # More images than the rules speak of stay.
    parts = [picture(1), picture(2), picture(3), Text("join"), picture(4)]
    assert outcomes("edit", parts, edit_images_last_prob=0.0) == {"(1) (2) (3) join 4": N}


def test_stories_keep_a_run_of_neighbours():
    parts = [Text("a"), picture(1), Text("b"), picture(2), Text("c"), picture(3), Text("d")]
    found = outcomes("interleaved", parts, max_interleaved_images=2, drop_text_prob=0.0)
    assert_shares(found, {"a 1 b 2 c": 0.5, "b 2 c 3 d": 0.5})
    found = outcomes("interleaved", parts, max_interleaved_images=1, drop_text_prob=0.0)
    assert_shares(found, {"a 1 b": 1 / 3, "b 2 c": 1 / 3, "c 3 d": 1 / 3})
    found = outcomes("interleaved", parts, max_interleaved_images=3)
    assert_shares(found, {"a 1 b 2 c 3 d": 0.9, "1 2 3": 0.1})
    # Of a story without images nothing is dropped: it would be gone.
    assert outcomes("interleaved", [Text("a"), Text("b")]) == {"a b": N}


def test_one_probability_leaves_the_other_choices_alone():
    document = Document((Text("a dog"), picture(1)), "7", "toy", "pair")

    def capitals(**changes):
        config = LayoutConfig(image_bases=(32,), **changes)
        draws = [Draws.of(np.random.default_rng(i)) for i in range(200)]
        return ["A dog" in names(arrange_parts(document, config, one)) for one in draws]

    assert capitals(image_first_prob=0.0) == capitals(image_first_prob=0.9)
    assert 60 < sum(capitals()) < 140


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image shows a dog.", "A dog."),
        ("this picture clearly depicts two cats", "Two cats"),
        ("In the image, we see a house", "A house"),
        ("A photograph of an owl", "An owl"),
        ("A black and white photograph of an owl", "A black and white photograph of an owl"),
        ("Show the image to a dog", "Show the image to a dog"),
        ("The image shows ", "The image shows "),
        ("", ""),
    ],
)
def test_openings(text, expected):
    assert strip_opening(text) == expected
