import collections
import dataclasses

import grain
import numpy as np
import pytest

from nextstep_jax.data import buckets, layout, packing
from nextstep_jax.data.schema import Document, Image, Sequence, Text

EOS, PAD, AREA, BOI, EOI, X = 0, 1, 2, 3, 4, 5
LAYOUT = layout.LayoutConfig(image_first_prob=0.5, image_bases=(32, 64), square_only=True)
STRIDE = 16


def config(row_length=100, **changes):
    values = {"pad_id": PAD, "image_sizes": LAYOUT.image_sizes, "num_packing_bins": 4}
    return packing.PackingConfig(row_length, **(values | changes))


def rows_of(sequences, packing_config):
    dataset = grain.MapDataset.source(list(sequences)).to_iter_dataset()
    return list(packing.pack(dataset, packing_config))


def sequence_of(token_ids, name="s/0"):
    length = len(token_ids)
    return Sequence(
        token_ids=np.array(token_ids, np.int32),
        text_weights=np.ones(length, np.float32),
        image_weights=np.zeros(length, np.float32),
        image_ref=np.full(length, -1, np.int32),
        images=(),
        grids=(),
        document_id=name,
        kind="text",
    )


def random_documents(n, seed=0):
    """Documents of all kinds with random noise for images of two sizes."""
    rng = np.random.default_rng(seed)

    def picture(loss=True):
        side = int(rng.choice([32, 64]))
        return Image(pixels=rng.integers(0, 256, (side, side, 3), np.uint8), loss=loss)

    def text():
        return Text("".join(rng.choice(list("abcdef "), rng.integers(1, 20))))

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


def segments_of(row):
    for segment in range(1, row["segment_ids"].max() + 1):
        yield np.flatnonzero(row["segment_ids"] == segment)


def test_a_row_by_hand():
    # Lengths 5, 3, 2, 4 into rows of 8: 5 + 3 fills the first; 2 + 4 stay in the second.
    sequences = [sequence_of([10 * k + i for i in range(n)]) for k, n in enumerate((5, 3, 2, 4), 1)]
    rows = rows_of(sequences, config(8, image_sizes=()))
    rows.sort(key=lambda row: row["token_ids"][0])
    assert [row["token_ids"].tolist() for row in rows] == [
        [10, 11, 12, 13, 14, 20, 21, 22],
        [30, 31, 40, 41, 42, 43, PAD, PAD],
    ]
    assert [row["segment_ids"].tolist() for row in rows] == [
        [1, 1, 1, 1, 1, 2, 2, 2],
        [1, 1, 2, 2, 2, 2, 0, 0],
    ]
    assert [row["positions"].tolist() for row in rows] == [
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 0, 1, 2, 3, 0, 0],
    ]
    assert [row["text_weights"].tolist() for row in rows] == [
        [0, 1, 1, 1, 1, 0, 1, 1],
        [0, 1, 0, 1, 1, 1, 0, 0],
    ]
    assert [packing.padding_share(row) for row in rows] == [0.0, 0.25]
    for row in rows:
        assert row["image_index"].tolist() == [-1] * 8 and row["images"] == {}
        assert row["image_weights"].tolist() == [0] * 8
        dtypes = {name: row[name].dtype.name for name in row if name != "images"}
        assert dtypes == {
            "token_ids": "int32",
            "segment_ids": "int32",
            "positions": "int32",
            "text_weights": "float32",
            "image_weights": "float32",
            "image_index": "int32",
        }


def test_best_fit_takes_the_tightest_row():
    # 6 and 7 open two rows of 10 each with 4 and 3 free; 3 fits both and goes to the second.
    sequences = [sequence_of([k] * n) for k, n in ((10, 6), (20, 7), (30, 3), (40, 4))]
    rows = rows_of(sequences, config(10, image_sizes=(), num_packing_bins=2))
    assert {tuple(row["token_ids"]) for row in rows} == {
        (10,) * 6 + (40,) * 4,
        (20,) * 7 + (30,) * 3,
    }


def test_attending_across_documents_is_one_long_segment():
    sequences = [sequence_of([11, 12, 13]), sequence_of([21, 22])]
    (row,) = rows_of(sequences, config(7, image_sizes=(), attend_across_documents=True))
    assert row["token_ids"].tolist() == [11, 12, 13, 21, 22, PAD, PAD]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 0]
    # The second document's first token has a predecessor now.
    assert row["text_weights"].tolist() == [0, 1, 1, 1, 1, 0, 0]


def test_every_document_arrives_once_and_whole(tokenizer):
    sequences = lay_out_all(random_documents(150), tokenizer)
    rows = rows_of(sequences, config(120))
    assert {len(row["token_ids"]) for row in rows} == {120}

    def key(ids, text_weights, image_weights):
        # The weight of the first position is the only thing packing may change.
        return tuple(ids), tuple(text_weights[1:]), tuple(image_weights)

    sent = collections.Counter(key(s.token_ids, s.text_weights, s.image_weights) for s in sequences)
    arrived = collections.Counter(
        key(row["token_ids"][at], row["text_weights"][at], row["image_weights"][at])
        for row in rows
        for at in segments_of(row)
    )
    assert arrived == sent and sum(arrived.values()) == 150
    for row in rows:
        for at in segments_of(row):
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
            assert row["text_weights"][at[0]] == 0
        padding = row["segment_ids"] == 0
        assert (row["token_ids"][padding] == PAD).all()
        assert (row["image_index"][padding] == -1).all()
        np.testing.assert_array_equal(row["image_index"] >= 0, row["token_ids"] == X)
    assert max(row["segment_ids"].max() for row in rows) >= 4
    num_tokens = sum(map(len, sequences))
    padding = np.mean([packing.padding_share(row) for row in rows])
    np.testing.assert_allclose(padding, 1 - num_tokens / (120 * len(rows)), rtol=1e-12)


def test_image_index_gathers_each_documents_own_tokens(tokenizer):
    documents = random_documents(80, seed=5)
    sequences = lay_out_all(documents, tokenizer)
    # What a document's placeholders must read, from the document alone; noise makes it unique.
    expected = {}
    for sequence in sequences:
        tokens = [encode(image) for image in sequence.images]
        own = np.concatenate(tokens) if tokens else np.zeros((0, 768), np.uint8)
        expected.setdefault(tuple(sequence.token_ids), []).append(own)
    rows = rows_of(sequences, config(160))
    assert sorted(rows[0]["images"]) == ["32x32", "64x64"]
    num_compared, sizes_in_a_row = 0, set()
    for row in rows:
        keys = buckets.ordered_image_keys(row["images"])
        assert [row["images"][key].shape for key in keys] == [(20, 32, 32, 3), (8, 64, 64, 3)]
        buffer = np.concatenate([encode(row["images"][key]).reshape(-1, 768) for key in keys])
        used = row["image_index"][row["image_index"] >= 0]
        assert len(set(used)) == len(used)
        sizes_in_a_row.add((bool((used < 80).any()), bool((used >= 80).any())))
        for at in segments_of(row):
            index = row["image_index"][at]
            gathered = buffer[index[index >= 0]]
            candidates = expected[tuple(row["token_ids"][at])]
            matches = [k for k, own in enumerate(candidates) if np.array_equal(own, gathered)]
            assert matches
            candidates.pop(matches[0])
            num_compared += len(gathered)
    assert not any(expected.values())
    assert num_compared == sum(int((s.token_ids == X).sum()) for s in sequences) > 1000
    assert (True, True) in sizes_in_a_row


def test_latents_stand_where_their_tokens_stand(tokenizer):
    rng = np.random.default_rng(0)
    latents = [rng.normal(size=(n, 64)).astype(np.float32) for n in (4, 6)]
    documents = [
        Document((Text("ab"), Image(latents=x, grid=(2, len(x) // 2))), str(i), "s", "pair")
        for i, x in enumerate(latents)
    ]
    rule = layout.LayoutConfig(image_first_prob=0.0)
    sequences = [layout.lay_out(d, tokenizer, rule, np.random.default_rng(0)) for d in documents]
    (row,) = rows_of(sequences, config(40, latent_dim=64, num_packing_bins=1))
    assert set(row) == {
        "token_ids",
        "segment_ids",
        "positions",
        "text_weights",
        "image_weights",
        "latents",
    }
    assert row["latents"].shape == (40, 64) and row["latents"].dtype == np.float32
    np.testing.assert_array_equal(row["latents"][row["token_ids"] == X], np.concatenate(latents))
    assert not row["latents"][row["token_ids"] != X].any()


def test_long_text_is_cut_into_rows():
    sequence = sequence_of(list(range(10, 35)))
    rows = rows_of([sequence], config(10, image_sizes=()))
    pieces = sorted(row["token_ids"][row["segment_ids"] > 0].tolist() for row in rows)
    assert pieces == [list(range(10, 20)), list(range(20, 30)), list(range(30, 35))]
    assert all(row["text_weights"][0] == 0 for row in rows)


def test_what_does_not_fit_is_refused_by_name(tokenizer):
    def refused(document, packing_config, message):
        sequence = layout.lay_out(document, tokenizer, LAYOUT, np.random.default_rng(0))
        with pytest.raises(ValueError, match=f"document s/long: .*{message}"):
            rows_of([sequence], packing_config)

    small = Image(pixels=np.zeros((32, 32, 3), np.uint8))
    pair = Document((Text("a" * 50), small), "long", "s", "pair")
    refused(pair, config(40), "61 tokens do not fit into row_length=40; .* are not split")
    story = Document((small,) * 3, "long", "s", "interleaved")
    refused(
        story, config(80, max_images_per_row=2), r"3 images of size 32x32, but a row has 2 slots"
    )
    refused(story, config(80, image_sizes=((64, 64),)), "image size 32x32 is none of .*: 64x64")
    refused(story, config(80, latent_dim=64), "must come as latents")
    latents = Image(latents=np.zeros((1, 16), np.float32), grid=(1, 1))
    thin = Document((latents,), "long", "s", "interleaved")
    refused(thin, config(80), "must come as pixels")
    refused(thin, config(80, latent_dim=64), "latents have width 16, the model takes 64")


def test_slots_are_limited_by_what_a_row_can_hold():
    # With the four tokens around them, images take 8 and 20 of the row's 100 tokens at least.
    assert config(100).buffer_offsets == {(32, 32): 0, (64, 64): 12 * 4}
    limits = config(100, max_images_per_row=8)
    assert (limits.slots_of((32, 32)), limits.slots_of((64, 64))) == (8, 5)
    assert limits.buffer_offsets == {(32, 32): 0, (64, 64): 8 * 4}
    with pytest.raises(ValueError, match="row_length=19 is too short for an image of size 64x64"):
        config(19)
    assert config(20).slots_of((64, 64)) == 1
    with pytest.raises(ValueError, match="num_packing_bins=0 must be at least 1"):
        config(num_packing_bins=0)


def test_a_limit_on_images_spreads_them_over_rows(tokenizer):
    sequences = [s for s in lay_out_all(random_documents(60), tokenizer) if len(s.images) == 1]
    rows = rows_of(sequences, config(1000, max_images_per_row=2, num_packing_bins=8))
    used = [
        [int(row["images"][key].any((1, 2, 3)).sum()) for key in ("32x32", "64x64")] for row in rows
    ]
    assert np.max(used) == 2 and np.sum(used) == len(sequences)


def test_rows_resume(tokenizer):
    sequences = lay_out_all(random_documents(15), tokenizer)
    sequences.append(dataclasses.replace(sequence_of(list(range(10, 300))), document_id="cut"))
    dataset = grain.MapDataset.source(sequences).to_iter_dataset()
    grain.experimental.assert_equal_output_after_checkpoint(packing.pack(dataset, config(120)))
