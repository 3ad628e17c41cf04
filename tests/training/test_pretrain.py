import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nextstep_jax.data import packing, pipeline
from nextstep_jax.data.shapes import ShapesSource
from nextstep_jax.models.flops import training_flops
from nextstep_jax.models.nextstep import NextStep, init_params
from nextstep_jax.models.vae import from_uint8
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.training import experiment, pretrain
from nextstep_jax.training.batch_encoding import BatchEncoder
from nextstep_jax.training.pretrain import LossConfig
from tests import tiny_model

DRAWS, TOKEN = 2, 64
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def net(make_config, fill):
    """The model, random parameters, and value and gradients of both losses, compiled."""
    model = NextStep(experiment.build_model_config(make_config()["model"]))
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = fill(nn.unbox(boxed))

    def totals(params, batch, times, noise):
        """Losses times the weights they are means over: sums add up over documents."""
        text, image = pretrain.nextstep_losses(model, params, batch, times, noise, 7)
        sums = jnp.sum(batch["text_weights"][:, 1:]), jnp.sum(batch["image_weights"])
        total = jnp.stack([text * sums[0], image * sums[1]])
        return 0.3 * total[0] + total[1], (total, jnp.stack([text, image]))

    grad = fast_jit(jax.value_and_grad(totals, has_aux=True))

    def evaluate(batch, times, noise):
        (_, (total, means)), grads = grad(params, batch, times, noise)
        return np.asarray(total), np.asarray(means), jax.device_get(grads)

    return model, evaluate


def documents(model):
    """Three documents as rows of their own: image in the middle, text only, image first."""
    rng = np.random.default_rng(3)
    rows = []
    for length, image in ((13, range(5, 9)), (6, range(0)), (9, range(3, 7))):
        is_image = np.isin(np.arange(length), list(image))
        text_weights = rng.uniform(0.2, 1, length) * ~is_image
        text_weights[0] = 0  # nothing in the document precedes it
        ids = rng.integers(6, 270, length)
        rows.append(
            {
                "token_ids": np.where(is_image, model.config.image_placeholder_id, ids),
                "latents": rng.standard_normal((length, TOKEN)) * is_image[:, None],
                "text_weights": text_weights,
                "image_weights": rng.uniform(0.2, 1, length) * is_image,
                "times": rng.uniform(size=(length, DRAWS)),
                "noise": rng.standard_normal((length, DRAWS, TOKEN)),
                "positions": np.arange(length),
            }
        )
    return rows


def pack(rows, length, num_positions):
    """Documents side by side in one row; times and noise go with their image tokens."""
    packed = {name: np.concatenate([row[name] for row in rows], axis=0) for name in rows[0]}
    packed["segment_ids"] = np.repeat(np.arange(len(rows)) + 1, [len(r["positions"]) for r in rows])
    pad = length - len(packed["positions"])
    packed = {k: np.pad(v, [(0, pad)] + [(0, 0)] * (v.ndim - 1)) for k, v in packed.items()}
    order = np.flatnonzero(packed["image_weights"])
    rest = np.flatnonzero(packed["image_weights"] == 0)
    order = np.concatenate([order, rest])[:num_positions]
    times, noise = packed.pop("times")[order], packed.pop("noise")[order]
    batch = {
        k: jnp.asarray(v[None], jnp.int32 if v.dtype.kind == "i" else jnp.float32)
        for k, v in packed.items()
    }
    times = jnp.asarray(np.moveaxis(times, 1, 0)[:, None], jnp.float32)
    return batch, times, jnp.asarray(np.moveaxis(noise, 1, 0)[:, None], jnp.float32)


def test_packed_is_one_by_one(net, relative_error):
    """Sums, means and gradients of a row of three documents are those of three rows."""
    model, evaluate = net
    rows = documents(model)
    total, means, grads = evaluate(*pack(rows, 31, 8))
    # Rows of the same length are one program; the padding has no weight.
    alone = [evaluate(*pack([row], 31, 8)) for row in rows]
    np.testing.assert_allclose(total, sum(a[0] for a in alone), rtol=1e-5)
    expected = jax.tree.map(lambda *leaves: sum(leaves), *(a[2] for a in alone))
    assert relative_error(grads, expected) < 1e-5
    text = sum(row["text_weights"].sum() for row in rows)
    image = sum(row["image_weights"].sum() for row in rows)
    np.testing.assert_allclose(means, total / np.float32([text, image]), rtol=1e-5)
    # A document without images has no flow loss, and takes nothing from the others.
    assert alone[1][0][1] == 0
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 0


def test_documents_do_not_see_each_other(net):
    """Swapping a neighbour changes nothing, and swapping one's own text does."""
    model, evaluate = net
    rows = documents(model)

    def changed(index):
        row = dict(rows[index])
        row["token_ids"] = np.where(row["image_weights"] > 0, row["token_ids"], 100)
        return [row if i == index else r for i, r in enumerate(rows)]

    weights = [np.zeros(len(r["positions"])) for r in rows]
    only_last = [
        {**rows[i], "text_weights": weights[i], "image_weights": weights[i]} for i in range(2)
    ]
    base = evaluate(*pack([*only_last, rows[2]], 31, 8))[0]
    other = changed(0)
    silent = {**other[0], "text_weights": weights[0], "image_weights": weights[0]}
    assert np.array_equal(evaluate(*pack([silent, only_last[1], rows[2]], 31, 8))[0], base)
    own = evaluate(*pack([*only_last, changed(2)[2]], 31, 8))[0]
    assert (np.abs(own / base - 1) > 1e-3).all()


def test_gathering_positions_changes_nothing(net, relative_error):
    """8 image tokens in a row of 31: gathering 8, or the whole row, is the same."""
    model, evaluate = net
    rows = documents(model)
    total, means, grads = evaluate(*pack(rows, 31, 8))
    others = evaluate(*pack(rows, 31, 31))
    np.testing.assert_allclose(others[0], total, rtol=1e-6)
    np.testing.assert_allclose(others[1], means, rtol=1e-6)
    assert relative_error(others[2], grads) < 1e-5


def test_loss_weights(make_task, fill):
    """0.01 and 1, and the times and noises that the key gives."""
    task, _ = make_task()
    model = task.model
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = fill(nn.unbox(boxed))
    iterator = iter(task.dataset(0, 1))
    batch = {k: jnp.asarray(v) for k, v in next(iterator).items() if isinstance(v, np.ndarray)}
    iterator.close()
    latents = jax.random.normal(jax.random.key(5), (*batch["token_ids"].shape, TOKEN))
    is_image = batch["token_ids"] == model.config.image_placeholder_id
    batch["latents"] = jnp.where(is_image[..., None], latents, 0)
    loss, metrics = fast_jit(task.loss)(params, batch, jax.random.key(6))
    metrics = {name: mean.value() for name, mean in metrics.items()}
    text, image = float(metrics["text_loss"]), float(metrics["image_loss"])
    assert float(loss) == pytest.approx(0.01 * text + image, rel=1e-6)
    # Close to chance for 272 ids; a random head misses x - noise, of variance 2, and adds its own.
    assert text == pytest.approx(np.log(272), rel=0.25)
    assert image > 1.5
    padding = packing.padding_share({k: np.asarray(v) for k, v in batch.items()})
    assert float(metrics["padding"]) == pytest.approx(padding, rel=1e-6)
    assert LossConfig() == LossConfig(0.01, 1.0, 512, None, False)


@pytest.mark.parametrize(("num_devices", "group_size"), [(1, 2), (4, 1)])
def test_encoded_images_stand_in_their_places(vae, devices, num_devices, group_size):
    """Two sizes, more images than a group and fewer than the next; every token by its place."""
    rng = np.random.default_rng(0)
    rows, length = 4, 30
    numbers = {"32x32": 5, "112x32": 3}
    images = {
        key: rng.integers(0, 256, (number, *map(int, key.split("x")), 3)).astype(np.uint8)
        for key, number in numbers.items()
    }
    # 5 * 4 and 3 * 14 tokens anywhere in the 120 places.
    places = rng.permutation(rows * length)[:62].astype(np.int32)
    slots = {"32x32": places[:20].reshape(5, 4), "112x32": places[20:].reshape(3, 14)}
    batch = {
        "token_ids": np.zeros((rows, length), np.int32),
        "images": images,
        "image_slots": slots,
    }
    encoder = BatchEncoder(vae.module, vae.params, 2, group_size)
    mesh = make_mesh({"fsdp": num_devices}, devices[:num_devices])
    with jax.transfer_guard("disallow"):
        latents = encoder(mesh, batch)
    assert {s.data.shape for s in latents.addressable_shards} == {
        (rows // num_devices, length, TOKEN)
    }
    assert latents.sharding.device_set == set(devices[:num_devices])
    expected = np.zeros((rows * length, TOKEN), np.float32)
    for key, pixels in images.items():
        variables = {"params": vae.params}
        expected[slots[key]] = vae.module.apply(
            variables, from_uint8(pixels), 2, method="encode_tokens"
        )
    np.testing.assert_allclose(
        np.asarray(latents), expected.reshape(rows, length, TOKEN), atol=2e-5
    )


def test_a_batch_on_eight_devices(make_task, devices):
    """The encoder's parameters come from one device; the latents are split like the batch."""
    task, _ = make_task()
    iterator = iter(task.dataset(0, 1))
    local = next(iterator)
    iterator.close()
    results = []
    for number in (8, 1):
        mesh = make_mesh({"fsdp": number}, devices[:number])
        with jax.transfer_guard("disallow"):
            batch = task.place(mesh, local)
        on_host = {"images", "image_slots", "document_ids"}
        assert set(batch) == {*local, "latents"} - on_host
        assert len(batch["latents"].sharding.device_set) == number
        assert {s.data.shape[0] for s in batch["latents"].addressable_shards} == {8 // number}
        results.append(np.asarray(batch["latents"]))
    np.testing.assert_allclose(results[0], results[1], atol=2e-5)
    is_image = local["token_ids"] == task.model.config.image_placeholder_id
    assert (np.abs(results[0]).max(-1) > 0).tolist() == is_image.tolist()
    # Latents from disk need no encoder.
    stored = {k: v for k, v in local.items() if not k.startswith("image")}
    again = task.place(mesh, {**stored, "latents": results[1]})
    np.testing.assert_array_equal(np.asarray(again["latents"]), results[1])


@pytest.mark.parametrize(
    ("data", "most"),
    [
        ({}, 16),
        ({"max_image_tokens": None}, 96),  # the length bounds it
        ({"max_image_tokens": None, "latents": True}, 96),
    ],
)
def test_more_image_tokens_than_positions_are_refused(make_task, data, most):
    """Positions that are not gathered would never be trained."""
    for enough in (most, None):
        make_task(data=data, loss={"image_positions": enough})
    match = rf"loss.image_positions={most - 1}, .*data.row_length=96.*max_image_tokens.* {most} "
    with pytest.raises(ValueError, match=match):
        make_task(data=data, loss={"image_positions": most - 1})


def test_no_row_exceeds_the_bound(tokenizer, make_config):
    """On the densest rows that the packer makes of the built-in world."""
    config = make_config(data={"rows_per_batch": 2})
    data = experiment.build_data(config)
    model = experiment.build_model_config(config["model"])
    sources = {
        kind: (ShapesSource(kind, level="easy", image_size=32), 1.0) for kind in ("pair", "edit")
    }
    iterator = iter(pipeline.make_pipeline(sources, tokenizer, model, data))
    placeholder = model.image_placeholder_id
    counts = [(next(iterator)["token_ids"] == placeholder).sum(1).max() for _ in range(20)]
    iterator.close()
    assert max(counts) == 16


def test_flops_of_rows():
    """Documents of 5 and 3 positions and 2 of padding; then of 4, 1 and 5."""
    segments = np.int32([[1] * 5 + [2] * 3 + [0] * 2, [1] * 4 + [2] + [3] * 5])
    text, image = np.zeros((2, 2, 10), np.float32)
    text[0, [0, 1, 2, 6]], text[1, [1, 9]] = 1.0, 0.5  # nothing predicts the first of a row
    image[0, 3:5], image[1, 5:8] = 1.0, 0.5
    batch = {"segment_ids": segments, "text_weights": text, "image_weights": image}
    expected = training_flops(
        tiny_model.CONFIG,
        rows=2,
        length=10,
        positions=18,
        attention_pairs=15 + 6 + 10 + 1 + 15,
        text_positions=5,
        image_positions=5,
    )
    assert pretrain.batch_flops(tiny_model.CONFIG, batch) == expected
    # Nothing but padding.
    empty = {name: np.zeros_like(value) for name, value in batch.items()}
    assert pretrain.batch_flops(tiny_model.CONFIG, empty).total == 0


def test_the_task_counts_the_batch_of_all_processes(monkeypatch):
    task = object.__new__(pretrain.NextStepTask)
    task.model = NextStep(tiny_model.CONFIG)
    ones = np.ones((2, 8), np.float32)
    batch = {"segment_ids": ones.astype(np.int32), "text_weights": ones, "image_weights": ones}
    one = training_flops(tiny_model.CONFIG, rows=2, length=8, text_positions=14, image_positions=16)
    assert task.num_flops(batch) == one.total
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert task.num_flops(batch) == 3 * one.total
