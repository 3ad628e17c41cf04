import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.interop.perceptual_weights import inception_slots
from nextstep_jax.interop.tensor_map import to_ours, tree_of
from nextstep_jax.models.inception import (
    INCEPTION_VARIANTS,
    Inception,
    InceptionBlock,
    batch_norm,
    resize_bilinear,
)
from tests.models.test_perceptual import assert_summary
from tests.recorded import record_perceptual as recorder

RECORD = json.loads(recorder.PATH.read_text())


@functools.cache
def slots():
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    return inception_slots(jax.eval_shape(Inception().init, jax.random.key(0), image)["params"])


@functools.cache
def params():
    """The weights with which the record was made, of both variants."""
    return tree_of(
        {
            slot.path: jnp.asarray(
                to_ours(recorder.random_tensor(slot.name, slot.shape), slot.layout)
            )
            for slot in slots()
        }
    )


def test_random_weights_are_those_of_the_record():
    weights = recorder.random_tensor("features.0.weight", (64, 3, 3, 3))
    assert recorder.summary_of(weights) == RECORD["random"]


def test_names_and_shapes_are_those_of_the_originals():
    digest = recorder.digest_of({slot.name: slot.shape for slot in slots()})
    for variant in INCEPTION_VARIANTS:
        assert digest == RECORD["inception"][variant]["digest"]


@pytest.mark.parametrize("variant", INCEPTION_VARIANTS)
def test_features_of_the_original(variant):
    record = RECORD["inception"][variant]

    @jax.jit
    def run(params, images):
        features, caught = Inception(variant).apply(
            {"params": params},
            images,
            capture_intermediates=lambda module, _: isinstance(module, InceptionBlock),
        )
        return features, {k: v["__call__"][0] for k, v in caught["intermediates"].items()}

    images = recorder.random_images(3, recorder.INCEPTION_SIZE)
    features, blocks = run(params(), jnp.asarray(images))
    assert features.shape == (2, 2048) and features.dtype == np.float32
    assert record["blocks"].keys() <= blocks.keys()
    for name, expected in record["blocks"].items():
        assert_summary(blocks[name], expected, 1e-5)
    assert_summary(features, record["features"], 1e-5)


def test_variants_differ_in_their_pools():
    ours = [RECORD["inception"][variant]["features"]["values"] for variant in INCEPTION_VARIANTS]
    assert np.abs(np.subtract(*ours)).max() > 1e-2


@pytest.mark.parametrize("number", [0, 1])
def test_resize_of_the_original(number):
    record = RECORD["resize"][number]
    images = jnp.asarray(recorder.random_images(4, record["size"]))
    assert_summary(resize_bilinear(images, 299), record, 2e-6)


def test_resize_by_hand():
    """Centres of 2 pixels in 4: 1/4 inside the outer ones is clamped, the inner two are mixed."""
    images = jnp.arange(4.0).reshape(1, 2, 2, 1)
    expected = np.array([0, 0.5, 1.5, 2])[:, None] + np.array([0, 0.25, 0.75, 1])
    np.testing.assert_allclose(resize_bilinear(images, 4)[0, :, :, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(resize_bilinear(images, 2), images)
    # Without antialiasing, a shrunk line of pixels is sampled: centres 1.5 and 4.5 of 6.
    line = jnp.array([0.0, 8, 0, 0, 2, 0]).reshape(1, 6, 1, 1)
    np.testing.assert_allclose(resize_bilinear(line, 2)[0, :, 0, 0], [8, 2], atol=1e-6)


def test_batch_norm_by_hand():
    values = batch_norm(jnp.array([[5.0, 1.0]]), *(jnp.array(x) for x in PARTS))
    np.testing.assert_allclose(values, [[2 * (5 - 1) / np.sqrt(4.001) + 3, 0.5]], rtol=1e-6)


# scale, bias, mean, variance
PARTS = ([2.0, 7.0], [3.0, 0.5], [1.0, 1.0], [4.0, 0.25])


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"variant='v4' must be one of \['fid', 'torchvision'\]"):
        Inception("v4")
