import collections
import dataclasses
import itertools
import json
from contextlib import closing

import grain
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from nextstep_jax.data import packing, pipeline, shapes
from nextstep_jax.data.schema import Document, Image, Text

AREA, X = 2, 5
# Images of one token each: what is tested here are orders and choices, not pixels.
SMALL = {"image_bases": (16,), "square_only": True}


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
ONE_A_ROW = {"row_length": 20, "num_packing_bins": 1, "max_images_per_row": 1, **SMALL}


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
            color = batch["images"]["16x16"][row, 0]
            assert (color == number % 256).all()
            assert batch["image_index"][row].max() == 0
            found.append((number, image_first))
    return found


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    return True


def test_batches_have_static_shapes(tokenizer, model_config):
    config = pipeline.DataConfig(
        row_length=90, rows_per_batch=4, image_bases=(32, 64), square_only=True
    )
    rng = np.random.default_rng(0)
    documents = [
        Document((Text("a" * int(rng.integers(1, 30))), Image(pixels=pixels)), str(i), "s", "pair")
        for i in range(40)
        for pixels in [np.zeros((int(rng.choice([32, 64])),) * 2 + (3,), np.uint8)]
    ]
    stream = batches(6, {"s": (documents, 1.0)}, tokenizer, model_config, config)
    shapes = {str(jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)) for batch in stream}
    assert len(shapes) == 1
    shape = {name: value.shape for name, value in stream[0].items() if name != "images"}
    assert shape == {
        "token_ids": (4, 90),
        "segment_ids": (4, 90),
        "positions": (4, 90),
        "text_weights": (4, 90),
        "image_weights": (4, 90),
        "image_index": (4, 90),
    }
    sizes = {name: value.shape for name, value in stream[0]["images"].items()}
    assert sizes == {"32x32": (4, 11, 32, 32, 3), "64x64": (4, 4, 64, 64, 3)}
    assert 0 < packing.padding_share(stream[0]) < 0.5


def test_every_epoch_has_every_document_once_in_a_new_order(tokenizer, model_config):
    sources = {"s": (pairs(40), 1.0)}
    numbers = [n for n, _ in read_one_a_row(120, sources, tokenizer, model_config)]
    epochs = [tuple(numbers[i : i + 40]) for i in (0, 40, 80)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert len({*epochs, tuple(range(40))}) == 4
    plain = read_one_a_row(40, sources, tokenizer, model_config, shuffle=False)
    assert [n for n, _ in plain] == list(range(40))


def test_processes_are_disjoint_and_complete(tokenizer, model_config):
    sources = {"s": (pairs(40), 1.0)}
    whole = read_one_a_row(80, sources, tokenizer, model_config)
    parts = [
        read_one_a_row(20, sources, tokenizer, model_config, (i, 4), rows_per_batch=4)
        for i in range(4)
    ]
    assert [len(part) for part in parts] == [20] * 4  # Two epochs in quarters.
    # Taking turns, the processes give exactly what one process gives: numbers and choices.
    assert list(itertools.chain(*zip(*parts, strict=True))) == whole
    assert not set(n for n, _ in parts[0][:10]) & set(n for n, _ in parts[1][:10])


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
    config = packed_config(row_length=256, rows_per_batch=8, num_packing_bins=8, prefetch=0)
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
    for index in range(4):
        found = read_one_a_row(60, sources, tokenizer, model_config, (index, 4), rows_per_batch=4)
        assert sum(n >= 1000 for n, _ in found) == 15
        for start in range(0, 60, 12):
            assert sum(n >= 1000 for n, _ in found[start : start + 12]) == 3


def packed_config(**changes):
    values = {"row_length": 64, "rows_per_batch": 2, "num_packing_bins": 4, **SMALL}
    return pipeline.DataConfig(**(values | changes))


def packed_sources():
    text = [Document((Text("t" * n),), str(n), "t", "text") for n in range(1, 150, 7)]
    return {"s": (pairs(23, length=2), 2.0), "t": (text, 1.0)}


@pytest.mark.parametrize("threads", [(0, 0), (2, 2)])
def test_every_state_restores(threads, tokenizer, model_config):
    config = packed_config(num_threads=threads[0], prefetch=threads[1])
    dataset = pipeline.make_pipeline(packed_sources(), tokenizer, model_config, config)
    limited = grain.experimental.LimitIterDataset(dataset, 6)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


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
    config = pipeline.DataConfig(
        row_length=16, rows_per_batch=8, latents=True, num_packing_bins=1, shuffle=False
    )
    (batch,) = batches(1, {"s": (documents, 1.0)}, tokenizer, model_config, config)
    assert batch["latents"].shape == (8, 16, 64)
    assert "images" not in batch and "image_index" not in batch
    np.testing.assert_array_equal(
        batch["latents"][batch["token_ids"] == X], latents.reshape(-1, 64)
    )


def test_a_document_that_does_not_fit_stops_the_run_with_its_name(tokenizer, model_config):
    documents = [*pairs(3), Document((Text("a" * 80), pairs(1)[0].parts[1]), "9", "s", "pair")]
    with pytest.raises(ValueError, match="document s/9: 88 tokens do not fit into row_length=64"):
        batches(9, {"s": (documents, 1.0)}, tokenizer, model_config, packed_config())


def test_fingerprints_tell_pipelines_apart(tokenizer, model_config):
    def fingerprint(sources=None, process_count=1, **changes):
        return pipeline.pipeline_fingerprint(
            packed_config(**changes),
            sources or packed_sources(),
            tokenizer,
            model_config,
            process_count,
        )

    saved = json.loads(json.dumps(fingerprint()))
    pipeline.check_fingerprint(saved, fingerprint())
    pipeline.check_fingerprint(saved, fingerprint(num_threads=9, prefetch=0))
    with pytest.raises(ValueError) as error:
        pipeline.check_fingerprint(saved, fingerprint(process_count=2, rows_per_batch=8))
    assert "process_count: saved 1, now 2; rows_per_batch: saved 2, now 8" in str(error.value)
    sources = packed_sources()
    sources["t"] = (sources["t"][0], 1.5)
    with pytest.raises(ValueError, match=r"saved .*'t', 'list', 22, 1\.0\].*22, 1\.5\]"):
        pipeline.check_fingerprint(saved, fingerprint(sources))
    names = {field.name for field in dataclasses.fields(pipeline.DataConfig)}
    assert names - {"num_threads", "prefetch"} <= set(saved)


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
    refused(r"source 's': weight=0\.0 must be positive", sources={"s": (pairs(2), 0.0)})
    refused(
        "rows_per_batch=3 must be a multiple of the 2 processes", None, (0, 2), rows_per_batch=3
    )
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
    config = pipeline.DataConfig(
        row_length=512, rows_per_batch=4, image_bases=(64,), square_only=True, num_packing_bins=4
    )
    batch = batches(1, sources, tokenizer, model_config, config)[0]
    is_image = batch["token_ids"] == X
    assert batch["images"]["64x64"].shape == (4, 25, 64, 64, 3)
    assert ((batch["image_index"] >= 0) == is_image).all()
    # Each of the row's images is used once, and none is empty.
    for row in range(4):
        index = batch["image_index"][row][is_image[row]]
        assert sorted(index) == list(range(len(index))) and len(index) % 16 == 0
        filled = batch["images"]["64x64"][row].any((1, 2, 3))
        assert filled.sum() == filled[: len(index) // 16].sum() == len(index) // 16
    # The sources of edits are images without loss.
    assert 0 < batch["image_weights"].sum() < is_image.sum()
    assert not batch["image_weights"][~is_image].any()
    assert not batch["text_weights"][is_image].any()


def test_names_seed_the_sources(tokenizer, model_config):
    orders = collections.defaultdict(list)
    for name in ("a", "b"):
        sources = {name: (pairs(40), 1.0)}
        orders[name] = [n for n, _ in read_one_a_row(40, sources, tokenizer, model_config)]
    assert sorted(orders["a"]) == sorted(orders["b"]) and orders["a"] != orders["b"]
