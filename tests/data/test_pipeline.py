import collections
import dataclasses
import json
import logging
from contextlib import closing

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from nextstep_jax.data import packing, pipeline, shapes
from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.schema import Document, Image, Text

AREA, X = 2, 5
# Images of one token each: what is tested here are orders and choices, not pixels.
SMALL = LayoutConfig(image_bases=(16,), square_only=True, capitalize_prob=0.0)


def pairs(n, name="s", start=0, length=1):
    """Pairs whose caption is their number, and whose image has its colour."""
    return [
        Document(
            (
                Text(f"{i:04d}" * length),
                Image(pixels=np.full((16, 16, 3), i % 256, np.uint8)),
            ),
            id=str(i),
            source=name,
            kind="pair",
        )
        for i in range(start, start + n)
    ]


def batches(n, sources, tokenizer, model_config, config, **process):
    dataset = pipeline.make_pipeline(sources, tokenizer, model_config, config, **process)
    with closing(iter(dataset)) as iterator:
        return [next(iterator) for _ in range(n)]


# A pair of a four-digit caption has 12 tokens, so that a row of 20 holds one, and with a single
# open row, rows come in the order of the documents.
ONE_A_ROW = {"row_length": 20, "num_open_rows": 1, "layout": SMALL}


def read_one_a_row(n, sources, tokenizer, model_config, process=(0, 1), **changes):
    """(number, image first) of the documents of n batches, in order."""
    config = pipeline.DataConfig(**({"rows_per_batch": 1} | ONE_A_ROW | changes))
    index, count = process
    found = []
    for batch in batches(
        n, sources, tokenizer, model_config, config, process_index=index, process_count=count
    ):
        for row in range(len(batch["token_ids"])):
            ids = batch["token_ids"][row][batch["segment_ids"][row] > 0]
            assert batch["segment_ids"][row].max() == 1
            image_first = bool(ids[0] == AREA)
            start = 7 if image_first else 0  # Area token, "1*1", begin, image, end.
            number = int(tokenizer.decode(ids[start : start + 4]))
            assert (batch["images"]["16x16"][row] == number % 256).all()
            assert batch["image_slots"]["16x16"].shape == (len(batch["token_ids"]), 1)
            found.append((number, image_first))
    return found


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    return True


def test_batches_have_static_shapes_but_for_the_number_of_images(tokenizer, model_config):
    rule = LayoutConfig(image_bases=(32, 64), square_only=True)
    config = pipeline.DataConfig(row_length=90, rows_per_batch=4, layout=rule)
    rng = np.random.default_rng(0)
    documents = [
        Document((Text("a" * int(rng.integers(1, 30))), Image(pixels=pixels)), str(i), "s", "pair")
        for i in range(40)
        for pixels in [np.zeros((int(rng.choice([32, 64])),) * 2 + (3,), np.uint8)]
    ]
    stream = batches(6, {"s": (documents, 1.0)}, tokenizer, model_config, config)
    for batch in stream:
        arrays = [value for value in batch.values() if isinstance(value, np.ndarray)]
        assert {array.shape for array in arrays} == {(4, 90)} and len(arrays) == 6
        for key, side in (("32x32", 32), ("64x64", 64)):
            number = len(batch["images"][key])
            assert batch["images"][key].shape == (number, side, side, 3)
            assert batch["image_slots"][key].shape == (number, (side // 16) ** 2)
        num_tokens = sum(slots.size for slots in batch["image_slots"].values())
        assert num_tokens == (batch["token_ids"] == X).sum()
    assert len({len(batch["images"]["32x32"]) for batch in stream}) > 1
    assert 0 < packing.padding_share(stream[0]) < 0.5


def test_every_epoch_has_every_document_once_in_a_new_order(tokenizer, model_config):
    sources = {"s": (pairs(40), 1.0)}
    numbers = [n for n, _ in read_one_a_row(120, sources, tokenizer, model_config)]
    epochs = [tuple(numbers[i : i + 40]) for i in (0, 40, 80)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert len({*epochs, tuple(range(40))}) == 4
    plain = read_one_a_row(40, sources, tokenizer, model_config, shuffle=False)
    assert [n for n, _ in plain] == list(range(40))


def test_choices_depend_on_seed_epoch_and_document_alone(tokenizer, model_config):
    documents = pairs(50)
    one = read_one_a_row(100, {"s": (documents, 1.0)}, tokenizer, model_config)
    first_epoch, second_epoch = dict(one[:50]), dict(one[50:])
    # Another order, another thread count, another process, an unrelated source beside it.
    other = read_one_a_row(
        50, {"s": (documents[::-1], 1.0)}, tokenizer, model_config, shuffle=False, num_threads=0
    )
    assert dict(other) == first_epoch
    mixed = read_one_a_row(
        50,
        {"s": (documents, 1.0), "t": (pairs(7, "t", start=500), 1.0)},
        tokenizer,
        model_config,
        (1, 2),
        rows_per_batch=2,
        num_threads=4,
    )
    assert all(first_epoch[n] == first for n, first in mixed if n < 50)
    assert sum(n < 50 for n, _ in mixed) == 25
    assert second_epoch != first_epoch
    assert dict(read_one_a_row(50, {"s": (documents, 1.0)}, tokenizer, model_config, seed=1)) != (
        first_epoch
    )


def test_image_first_with_its_probability(tokenizer, model_config):
    config = packed_config(row_length=256, rows_per_batch=8, num_open_rows=8, prefetch=0)
    found = []
    for batch in batches(6, {"s": (pairs(900), 1.0)}, tokenizer, model_config, config):
        starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        found += (batch["token_ids"][starts] == AREA).tolist()
    n = len(found)
    assert n > 700
    # Four standard deviations of a binomial with p = 0.3: for 800 documents, 240 +- 52.
    assert abs(sum(found) - 0.3 * n) < 4 * (n * 0.3 * 0.7) ** 0.5


def test_weights_hold_in_every_process(tokenizer, model_config):
    # With weights 1 : 1 and two processes, splitting the mixture instead of its components would
    # give each process one source.
    sources = {"a": (pairs(30), 3.0), "b": (pairs(10, start=1000), 1.0)}
    together = np.zeros(5, int)
    for index in range(4):
        found = read_one_a_row(60, sources, tokenizer, model_config, (index, 4), rows_per_batch=4)
        parts = [sum(n >= 1000 for n, _ in found[at : at + 12]) for at in range(0, 60, 12)]
        assert set(parts) <= {2, 3, 4} and abs(sum(parts) - 15) <= 1
        together += parts
    # Streams begin between each other's turns, so that the whole is met more closely.
    assert (abs(together - 12) <= 1).all() and together.sum() == 60


def packed_config(**changes):
    values = {"row_length": 64, "rows_per_batch": 2, "num_open_rows": 4, "layout": SMALL}
    return pipeline.DataConfig(**(values | changes))


def packed_sources():
    text = [Document((Text("t" * n),), str(n), "t", "text") for n in range(1, 150, 7)]
    return {"s": (pairs(23, length=2), 2.0), "t": (text, 1.0)}


@pytest.mark.parametrize("threads", [(0, 0), (2, 2)])
def test_every_state_restores(threads, tokenizer, model_config):
    config = packed_config(num_threads=threads[0], prefetch=threads[1])
    dataset = pipeline.make_pipeline(packed_sources(), tokenizer, model_config, config)
    states, found = [], []
    with closing(iter(dataset)) as iterator:
        for _ in range(7):
            states.append(json.dumps(iterator.get_state()))
            found.append(next(iterator))
    for start, state in enumerate(states):
        with closing(iter(dataset)) as iterator:
            iterator.set_state(json.loads(state))
            assert json.dumps(iterator.get_state()) == state
            assert all(equal(next(iterator), batch) for batch in found[start:])


def test_a_state_continues_in_another_process_with_other_threads(tokenizer, model_config):
    def start(**changes):
        config = packed_config(**changes)
        return iter(pipeline.make_pipeline(packed_sources(), tokenizer, model_config, config))

    with closing(start()) as first:
        for _ in range(17):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        expected = [next(first) for _ in range(10)]
    for changes in ({}, {"num_threads": 0, "prefetch": 0}, {"num_threads": 5, "prefetch": 1}):
        with closing(start(**changes)) as second:
            second.set_state(state)
            assert all(equal(next(second), batch) for batch in expected)


def test_orbax_saves_and_restores_the_iterator(tokenizer, model_config, tmp_path):
    dataset = pipeline.make_pipeline(packed_sources(), tokenizer, model_config, packed_config())
    with closing(iter(dataset)) as first, closing(iter(dataset)) as second:
        for _ in range(9):
            next(first)
        with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
            checkpointer.save_checkpointables(9, {"dataset": first})
            expected = [next(first) for _ in range(5)]
            next(second)
            checkpointer.load_checkpointables(9, {"dataset": second})
        assert all(equal(next(second), batch) for batch in expected)


def test_latents_skip_the_images(tokenizer, model_config):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(8, 4, 64)).astype(np.float32)
    documents = [
        Document((Text(f"{i}"), Image(latents=x, grid=(2, 2))), str(i), "s", "pair")
        for i, x in enumerate(latents)
    ]
    config = packed_config(
        row_length=16, rows_per_batch=8, num_streams=1, num_open_rows=1, latents=True, shuffle=False
    )
    (batch,) = batches(1, {"s": (documents, 1.0)}, tokenizer, model_config, config)
    assert batch["latents"].shape == (8, 16, 64)
    assert "images" not in batch and "image_slots" not in batch
    np.testing.assert_array_equal(
        batch["latents"][batch["token_ids"] == X], latents.reshape(-1, 64)
    )


def test_a_document_that_does_not_fit_is_skipped_with_its_name(tokenizer, model_config, caplog):
    documents = [*pairs(3), Document((Text("a" * 80), pairs(1)[0].parts[1]), "9", "s", "pair")]
    config = packed_config(max_bad_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        batches(3, {"s": (documents, 1.0)}, tokenizer, model_config, config)
    assert "document s/9: 88 tokens do not fit into row_length=64" in caplog.text


def test_fingerprints_tell_pipelines_apart(tokenizer, model_config, caplog):
    def fingerprint(sources=None, **changes):
        return pipeline.pipeline_fingerprint(
            packed_config(**changes), sources or packed_sources(), tokenizer, model_config
        )

    saved = json.loads(json.dumps(fingerprint()))
    current = json.loads(json.dumps(fingerprint(num_threads=9, prefetch=0, max_bad_fraction=1.0)))
    pipeline.check_fingerprint(saved, current)
    with pytest.raises(ValueError) as error:
        pipeline.check_fingerprint(saved, fingerprint(num_streams=1, rows_per_batch=8))
    assert "num_streams: saved 2, now 1; rows_per_batch: saved 2, now 8" in str(error.value)
    assert "weights" not in caplog.text
    # Other weights and more sources are another mixture of the same data, and are logged.
    sources = packed_sources()
    changed = {"s": (sources["s"][0], 0.5), "t": sources["t"], "u": (pairs(3), 1.0)}
    pipeline.check_fingerprint(saved, json.loads(json.dumps(fingerprint(changed))))
    assert "from {'s': 2.0, 't': 1.0} to {'s': 0.5, 't': 1.0, 'u': 1.0}" in caplog.text
    with pytest.raises(ValueError, match=r"documents: saved .*'t'"):
        pipeline.check_fingerprint(saved, fingerprint({"s": sources["s"]}))
    names = {field.name for field in dataclasses.fields(pipeline.DataConfig)}
    assert names - {"num_threads", "prefetch", "max_bad_fraction"} <= set(saved)


def test_bad_arguments_are_refused_before_reading(tokenizer, model_config):
    def refused(message, sources=None, process=(0, 1), model=model_config, **changes):
        with pytest.raises(ValueError, match=message):
            pipeline.make_pipeline(
                packed_sources() if sources is None else sources,
                tokenizer,
                model,
                packed_config(**changes),
                *process,
            )

    refused("at least one source", sources={})
    refused("source 'x' is empty", sources={"x": ([], 1.0)})
    refused(r"source 's': weight=-1\.0 must be finite", sources={"s": (pairs(2), -1.0)})
    refused("num_streams=3 must be a multiple of the 2 processes", None, (0, 2), rows_per_batch=3)
    refused("num_streams=3 must divide rows_per_batch=4", num_streams=3, rows_per_batch=4)
    refused("row_length=4 is too short for an image of 1 tokens", row_length=4)
    big = dataclasses.replace(SMALL, image_bases=(64,))
    refused("max_image_tokens=9 is less than the 16 tokens", layout=big, max_image_tokens=9)
    refused("max_bad_fraction=2.0 must lie in", max_bad_fraction=2.0)
    refused(r"process_index=2 must lie in \[0, 2\)", None, (2, 2))
    refused("boi_id: the tokenizer has 3", model=dataclasses.replace(model_config, boi_id=9))
    refused("num_threads=-1 must be at least 0", num_threads=-1)
    refused("seed=-1 must lie in", seed=-1)
    refused("row_length=0 must be at least 1", row_length=0)


def test_the_built_in_world_flows_through(tokenizer, model_config):
    sources = {
        kind: (shapes.ShapesSource(kind, "full"), weight)
        for kind, weight in (("text", 1.0), ("pair", 2.0), ("edit", 1.0), ("interleaved", 1.0))
    }
    rule = LayoutConfig(image_bases=(64,), square_only=True)
    config = pipeline.DataConfig(row_length=512, rows_per_batch=4, layout=rule)
    batch = batches(1, sources, tokenizer, model_config, config)[0]
    is_image = batch["token_ids"] == X
    slots = batch["image_slots"]["64x64"]
    assert sorted(slots.ravel().tolist()) == np.flatnonzero(is_image).tolist()
    assert batch["images"]["64x64"].any((1, 2, 3)).all()
    # The sources of edits are images without loss.
    assert 0 < batch["image_weights"].sum() < is_image.sum()
    assert not batch["image_weights"][~is_image].any()
    assert not batch["text_weights"][is_image].any()
    assert ((batch["kinds"] == 0) == (batch["segment_ids"] == 0)).all()
    kinds = {
        int(k)
        for b in batches(6, sources, tokenizer, model_config, config)
        for k in np.unique(b["kinds"])
    }
    assert kinds == {0, 1, 2, 3, 4}


def test_names_seed_the_sources(tokenizer, model_config):
    orders = collections.defaultdict(list)
    for name in ("a", "b"):
        sources = {name: (pairs(40), 1.0)}
        orders[name] = [n for n, _ in read_one_a_row(40, sources, tokenizer, model_config)]
    assert sorted(orders["a"]) == sorted(orders["b"]) and orders["a"] != orders["b"]


def test_rows_of_the_built_in_mixture_are_full(tokenizer, model_config):
    """Less than 3% padding at length 4096, of rows that were begun after the first were closed."""
    mixture = {"text": 0.1, "pair": 0.7, "edit": 0.1, "interleaved": 0.1}
    sources = {
        kind: (shapes.ShapesSource(kind, "full", num_documents=100), weight)
        for kind, weight in mixture.items()
    }
    config = pipeline.DataConfig(
        row_length=4096,
        rows_per_batch=4,
        num_streams=1,
        num_open_rows=8,
        layout=LayoutConfig(image_bases=(64,), square_only=True),
    )
    found = batches(4, sources, tokenizer, model_config, config)
    shares = [packing.padding_share(batch) for batch in found]
    assert np.mean(shares) < 0.03 and np.mean(shares[2:]) < 0.03
