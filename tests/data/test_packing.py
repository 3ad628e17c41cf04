import collections
import itertools
import json

import numpy as np
import pytest

from nextstep_jax.data import collate, layout, packing
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.packing import Packer, PackingConfig, Piece
from nextstep_jax.data.schema import Document, Image, Sequence, Text

EOS, PAD, AREA, BOI, EOI, X = 0, 1, 2, 3, 4, 5
LAYOUT = layout.LayoutConfig(image_first_prob=0.5, image_bases=(32, 64), square_only=True)
STRIDE = 16


def form(row_length=100, **changes):
    return collate.CollateConfig(row_length, PAD, **changes)


def sequence_of(token_ids, name="s/0", image=False):
    """Plain text, or with `image` an image of one token at the end."""
    length = len(token_ids)
    at_image = np.arange(length) == length - 1 if image else np.zeros(length, bool)
    return Sequence(
        token_ids=np.array(token_ids, np.int32),
        text_weights=np.ones(length, np.float32),
        image_weights=np.zeros(length, np.float32),
        image_ref=np.where(at_image, 0, -1).astype(np.int32),
        images=(np.full((16, 16, 3), token_ids[0], np.uint8),) if image else (),
        grids=((1, 1),) if image else (),
        document_id=name,
        kind="pair" if image else "text",
    )


def pack(sequences, config):
    """All rows of some sequences: those that were closed, then those left open, then the text."""
    packer, rows = Packer(config), []
    for position, sequence in enumerate(sequences):
        packing.check_fits(sequence, config)
        rows += packer.add(Piece.whole(sequence, "s", position))
    state = json.loads(json.dumps(packer.get_state()))

    def resolve(reference):
        source, position, start, end = reference
        return Piece(sequences[position], source, position, start, end)

    left = [packing.row_of(references, resolve) for references in state["open"]]
    rest = packing.row_of(state["texts"], resolve)
    return rows, left, rest


def ids(row):
    return [[int(i) for i in p.sequence.token_ids[p.start : p.end]] for p in row.pieces]


def random_documents(n, seed=0):
    """Documents of all kinds with random noise for images of two sizes."""
    rng = np.random.default_rng(seed)

    def picture(loss=True):
        side = int(rng.choice([32, 64]))
        return Image(pixels=rng.integers(0, 256, (side, side, 3), np.uint8), loss=loss)

    def text():
        return Text("x" + "".join(rng.choice(list("abcdef "), rng.integers(1, 20))))

    makers = {
        "text": lambda: (text(),),
        "pair": lambda: (text(), picture()),
        "edit": lambda: (picture(loss=False), text(), picture()),
        "interleaved": lambda: (picture(), text(), picture(), picture(), text()),
    }
    documents = []
    for i in range(n):
        kind = str(rng.choice(list(makers)))
        documents.append(Document(makers[kind](), id=str(i), source="random", kind=kind))
    return documents


def lay_out_all(documents, tokenizer):
    return [
        layout.lay_out(doc, tokenizer, LAYOUT, np.random.default_rng([1, i]))
        for i, doc in enumerate(documents)
    ]


def encode(pixels):
    """A toy encoder: the pixels of each 16 x 16 patch, row by row. (..., h, w, 3) -> (..., n, d)"""
    *lead, height, width, _ = pixels.shape
    rows, columns = height // STRIDE, width // STRIDE
    patches = pixels.reshape(*lead, rows, STRIDE, columns, STRIDE, 3)
    return np.moveaxis(patches, -4, -3).reshape(*lead, rows * columns, STRIDE * STRIDE * 3)


# Packing


def test_plain_text_is_concatenated_and_cut():
    sequences = [
        sequence_of(list(range(10 * k, 10 * k + n))) for k, n in enumerate((5, 3, 9, 4), 1)
    ]
    rows, left, rest = pack(sequences, PackingConfig(8))
    assert [ids(row) for row in [*rows, *left]] == [
        [[10, 11, 12, 13, 14], [20, 21, 22]],
        [[30, 31, 32, 33, 34, 35, 36, 37]],
    ]
    assert ids(rest) == [[38], [40, 41, 42, 43]]
    # One text of several rows.
    rows, left, rest = pack([sequence_of(list(range(25)))], PackingConfig(10, num_open_rows=1))
    assert len(left) == 1
    assert [ids(row) for row in [*rows, *left]] == [[list(range(10))], [list(range(10, 20))]]
    assert ids(rest) == [list(range(20, 25))]


def test_best_fit_takes_the_tightest_row_and_the_oldest_is_closed():
    # 6 and 7 open two rows of 10 with 4 and 3 free; 3 fits both and goes to the second; 4 to the
    # first; 5 fits neither and closes the oldest, which is the first.
    sizes = ((10, 6), (20, 7), (30, 3), (40, 4), (50, 5))
    sequences = [sequence_of([k] * n, image=True) for k, n in sizes]
    rows, left, _ = pack(sequences, PackingConfig(10, num_open_rows=2))
    assert [ids(row) for row in rows] == [[[10] * 6, [40] * 4]]
    assert [ids(row) for row in left] == [[[20] * 7, [30] * 3], [[50] * 5]]


def test_gaps_are_filled_with_plain_text():
    text = sequence_of(list(range(100, 112)))
    images = [sequence_of([k] * 7, image=True) for k in (1, 2, 3)]
    config = PackingConfig(10, num_open_rows=1, least_text_piece=3)
    # The text of 12 fills a row; its rest of 2 and then nothing fill the gaps of 3.
    rows, left, rest = pack([text, *images], config)
    assert [ids(row) for row in rows] == [
        [list(range(100, 110))],
        [[1] * 7, [110, 111]],
        [[2] * 7],
    ]
    assert [ids(row) for row in left] == [[[3] * 7]] and ids(rest) == []
    # A longer rest is cut to fit, but not to less than least_text_piece.
    rows, _, rest = pack([sequence_of(list(range(100, 109))), *images], config)
    assert [ids(row) for row in rows] == [[[1] * 7, [100, 101, 102]], [[2] * 7, [103, 104, 105]]]
    assert ids(rest) == [[106, 107, 108]]
    whole = PackingConfig(10, num_open_rows=1, least_text_piece=4)
    rows, _, rest = pack([sequence_of(list(range(100, 109))), *images], whole)
    assert [ids(row) for row in rows] == [[[1] * 7], [[2] * 7]] and len(rest.pieces) == 1


def test_a_limit_on_image_tokens_spreads_images_over_rows(tokenizer):
    sequences = [s for s in lay_out_all(random_documents(60), tokenizer) if len(s.images) == 1]
    rows, left, _ = pack(sequences, PackingConfig(1000, max_image_tokens=32, num_open_rows=8))
    counts = [sum((p.sequence.token_ids == X).sum() for p in row.pieces) for row in [*rows, *left]]
    assert max(counts) == 32 == max(row.num_image_tokens for row in [*rows, *left])
    assert sum(counts) == sum((s.token_ids == X).sum() for s in sequences)


def test_every_token_arrives_once_and_images_whole(tokenizer):
    sequences = lay_out_all(random_documents(150), tokenizer)
    rows, left, rest = pack(sequences, PackingConfig(120, num_open_rows=4, least_text_piece=2))
    pieces = [piece for row in [*rows, *left, rest] for piece in row.pieces]
    covered = collections.defaultdict(list)
    for piece in pieces:
        covered[piece.position].append((piece.start, piece.end))
    assert sorted(covered) == list(range(150))
    for position, spans in covered.items():
        spans.sort()
        sequence = sequences[position]
        assert spans[0][0] == 0 and spans[-1][1] == len(sequence)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        assert len(spans) == 1 or not sequence.images
    for row in rows:
        assert row.num_tokens == sum(map(len, row.pieces)) <= 120
    assert any(len(spans) > 1 for spans in covered.values())
    tokens = sum(row.num_tokens for row in rows)
    assert 1 - tokens / (120 * len(rows)) < 0.12  # Documents of 30 to 70 tokens, four open rows.


def test_a_packer_continues_from_its_state(tokenizer):
    sequences = lay_out_all(random_documents(90, seed=2), tokenizer)
    config = PackingConfig(120, num_open_rows=3)

    def resolve(reference):
        source, position, start, end = reference
        return Piece(sequences[position], source, position, start, end)

    whole = [row for row in pack(sequences, config)[0]]
    for stop in (1, 30, 71):
        first, second = Packer(config), Packer(config)
        rows = [r for i in range(stop) for r in first.add(Piece.whole(sequences[i], "s", i))]
        second.set_state(json.loads(json.dumps(first.get_state())), resolve)
        for i in range(stop, len(sequences)):
            rows += second.add(Piece.whole(sequences[i], "s", i))
        assert [[p.reference for p in row.pieces] for row in rows] == [
            [p.reference for p in row.pieces] for row in whole
        ]


def test_what_does_not_fit_is_refused_by_name(tokenizer):
    small = Image(pixels=np.zeros((32, 32, 3), np.uint8))

    def refused(parts, kind, config, message):
        document = Document(parts, "long", "s", kind)
        sequence = layout.lay_out(document, tokenizer, LAYOUT, np.random.default_rng(0))
        with pytest.raises(DocumentError, match=f"document s/long: {message}") as error:
            packing.check_fits(sequence, config)
        assert error.value.reason == "too_long"

    pair = (Text("a" * 50), small)
    refused(pair, "pair", PackingConfig(40), "61 tokens do not fit into row_length=40; .* split")
    refused(
        (small,) * 3,
        "interleaved",
        PackingConfig(80, max_image_tokens=11),
        "12 image tokens do not fit into a row of max_image_tokens=11",
    )
    packing.check_fits(sequence_of(list(range(500))), PackingConfig(40))  # Text is cut.


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="num_open_rows=0 must be at least 1"):
        PackingConfig(10, num_open_rows=0)
    with pytest.raises(ValueError, match="row_length=0 must be at least 1"):
        PackingConfig(0)


# Batches


def test_a_batch_by_hand():
    sequences = [sequence_of([10 * k + i for i in range(n)]) for k, n in enumerate((5, 3, 2), 1)]
    picture = sequence_of([40, 41, 42], image=True)
    rows = [packing.Row(), packing.Row()]
    for row, pieces in zip(rows, ((0, 1), (2,)), strict=True):
        for position in pieces:
            row.add(Piece.whole(sequences[position], "s", position))
    rows[1].add(Piece.whole(picture, "p", 0))
    batch = collate.collate(rows, form(8))
    expected = {
        "token_ids": [[10, 11, 12, 13, 14, 20, 21, 22], [30, 31, 40, 41, 42, PAD, PAD, PAD]],
        "segment_ids": [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 0, 0, 0]],
        "text_weights": [[0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0, 0, 0]],
        "image_weights": [[0] * 8] * 2,
        "kinds": [[1] * 8, [1, 1, 2, 2, 2, 0, 0, 0]],
    }
    assert {name: batch[name].tolist() for name in expected} == expected
    assert {name: batch[name].dtype.name for name in expected} == {
        **dict.fromkeys(("token_ids", "segment_ids", "positions"), "int32"),
        **dict.fromkeys(("text_weights", "image_weights"), "float32"),
        "kinds": "int8",
    }
    assert batch["image_slots"]["16x16"].tolist() == [[8 + 4]]
    np.testing.assert_array_equal(batch["images"]["16x16"], picture.images[0][None])
    assert packing.padding_share(batch) == 3 / 16

    # The released trainer's rows: the second document's first token has a predecessor now.
    batch = collate.collate(rows, form(8, attend_across_documents=True))
    assert batch["segment_ids"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["positions"].tolist() == [list(range(8)), [0, 1, 2, 3, 4, 0, 0, 0]]
    assert batch["text_weights"].tolist() == [[0] + [1] * 7, [0, 1, 1, 1, 1, 0, 0, 0]]


def test_slots_are_where_each_documents_own_tokens_stand(tokenizer):
    sequences = lay_out_all(random_documents(80, seed=5), tokenizer)
    rows, left, _ = pack(sequences, PackingConfig(160, num_open_rows=4))
    rows += left
    batch = collate.collate(rows, form(160))
    assert list(batch["images"]) == ["32x32", "64x64"]
    # Every image's tokens, put in their places.
    buffer = np.zeros((len(rows) * 160, 768), np.uint8)
    for key, images in batch["images"].items():
        buffer[batch["image_slots"][key]] = encode(images)
    used = np.concatenate([slots.ravel() for slots in batch["image_slots"].values()])
    assert len(set(used.tolist())) == len(used) == (batch["token_ids"] == X).sum() > 1000
    # What a document's placeholders must read, from the document alone; noise makes it unique.
    for number, row in enumerate(rows):
        start = number * 160
        for piece in row.pieces:
            here = buffer[start : start + len(piece)][
                piece.sequence.token_ids[piece.start : piece.end] == X
            ]
            if piece.sequence.images:
                own = np.concatenate([encode(image) for image in piece.sequence.images])
                np.testing.assert_array_equal(here, own)
            start += len(piece)


def test_latents_stand_where_their_tokens_stand(tokenizer):
    rng = np.random.default_rng(0)
    latents = [rng.normal(size=(n, 64)).astype(np.float32) for n in (4, 6)]
    row = packing.Row()
    for i, x in enumerate(latents):
        image = Image(latents=x, grid=(2, len(x) // 2))
        document = Document((Text("ab"), image), str(i), "s", "pair")
        rule = layout.LayoutConfig(image_first_prob=0.0)
        sequence = layout.lay_out(document, tokenizer, rule, np.random.default_rng(0))
        row.add(Piece.whole(sequence, "s", i))
    batch = collate.collate([row], form(40, latent_dim=64))
    assert "images" not in batch and "image_slots" not in batch
    assert batch["latents"].shape == (1, 40, 64) and batch["latents"].dtype == np.float32
    is_image = batch["token_ids"] == X
    np.testing.assert_array_equal(batch["latents"][is_image], np.concatenate(latents))
    assert not batch["latents"][~is_image].any()
    with pytest.raises(ValueError, match=r"document s/0: every image .* must come as pixels"):
        collate.collate([row], form(40))
    with pytest.raises(ValueError, match="document s/0: latents have width 64, the model takes 16"):
        collate.collate([row], form(40, latent_dim=16))
