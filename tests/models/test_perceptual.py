import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.interop.perceptual_weights import lpips_slots
from nextstep_jax.interop.tensor_map import to_ours, tree_of
from nextstep_jax.models.perceptual import (
    LPIPS_MIN_SIDES,
    LPIPS_NETWORKS,
    FeatureStack,
    Lpips,
    layer_distance,
    unit_normalize,
)
from tests.recorded import record_perceptual as recorder

RECORD = json.loads(recorder.PATH.read_text())["lpips"]


@functools.cache
def slots_of(network, whole=False):
    image = jnp.zeros((1, 32, 32, 3))
    abstract = jax.eval_shape(Lpips(network).init, jax.random.key(0), image, image)["params"]
    return lpips_slots(abstract, whole=whole)


@functools.cache
def params_of(network):
    """The weights with which the record was made."""
    return tree_of(
        {
            slot.path: jnp.asarray(
                to_ours(recorder.random_tensor(slot.name, slot.shape), slot.layout)
            )
            for slot in slots_of(network)
        }
    )


@functools.cache
def run(network):
    """(params, images, others) -> distances, and the features of both, compiled."""

    def forward(params, images, others):
        distances, caught = Lpips(network).apply(
            {"params": params},
            images,
            others,
            capture_intermediates=lambda module, _: isinstance(module, FeatureStack),
        )
        return distances, caught["intermediates"]["net"]["__call__"]

    return jax.jit(forward)


@functools.cache
def run_gradient(network):
    """(params, images, others) -> distances, and the gradient of their sum by the others."""

    def total(others, params, images):
        distances = Lpips(network).apply({"params": params}, images, others)
        return distances.sum(), distances

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def distances_and_gradient(params, images, others):
        (_, distances), gradient = run(others, params, images)
        return distances, gradient

    return distances_and_gradient


def pair_of(network, size):
    """The images with which the record was made."""
    seeds = (1, recorder.OTHERS_SEED[network])
    return tuple(jnp.asarray(recorder.random_images(seed, size)) for seed in seeds)


def assert_summary(actual, expected, tolerance):
    """An array against `summary_of` the original's, relative to the root of the mean square."""
    found = recorder.summary_of(actual)
    scale = expected["rms"]
    assert abs(found["rms"] - scale) <= tolerance * scale
    assert abs(found["mean"] - expected["mean"]) <= tolerance * scale
    worst = np.abs(np.subtract(found["values"], expected["values"])).max()
    assert worst <= tolerance * np.abs(expected["values"]).max()


@pytest.mark.parametrize("network", LPIPS_NETWORKS)
def test_names_and_shapes_are_those_of_the_original(network):
    shapes = {slot.name: slot.shape for slot in slots_of(network, whole=True)}
    assert recorder.digest_of(shapes) == RECORD[network]["digest"]


@pytest.mark.parametrize("network", LPIPS_NETWORKS)
def test_features_and_distances_of_the_original(network):
    record, params = RECORD[network]["sizes"][0], params_of(network)
    distances, (features, others) = run(network)(params, *pair_of(network, record["size"]))
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, record["distance"], rtol=2e-6)
    assert len(features) == len(record["features"]) == 5
    weights = [params[f"lin{k}"] for k in range(5)]
    layers = jax.jit(
        lambda *pairs: [layer_distance(a, b, weight[0, 0, :, 0]) for a, b, weight in pairs]
    )(*zip(features, others, weights, strict=True))
    for k in range(5):
        assert_summary(features[k], record["features"][k], 1e-5)
        np.testing.assert_allclose(layers[k], record["layers"][k], rtol=5e-6)


@pytest.mark.parametrize("network", LPIPS_NETWORKS)
def test_gradient_of_the_original(network):
    """At sides that no pool divides."""
    record = RECORD[network]["sizes"][1]
    pair = pair_of(network, record["size"])
    distances, gradient = run_gradient(network)(params_of(network), *pair)
    np.testing.assert_allclose(distances, record["distance"], rtol=2e-6)
    assert_summary(gradient, record["gradient"], 1e-5)


def test_unit_normalize():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, -2e-10]], np.float32)
    expected = [[0.6, 0.8], [0.0, 0.0], [0.0, -2 / 3]]
    np.testing.assert_allclose(unit_normalize(jnp.asarray(x)), expected, rtol=1e-6)
    # d(x / (|x| + eps)) = 1 / |x| - x x^T / |x|^3 where it is smooth, nothing at zero.
    jacobian = jax.jit(jax.jacobian(unit_normalize))
    expected = [[0.128, -0.096], [-0.096, 0.072]]
    np.testing.assert_allclose(jacobian(jnp.array([3.0, 4.0])), expected, rtol=1e-5)
    np.testing.assert_array_equal(jacobian(jnp.zeros(2)), np.zeros((2, 2)))


def test_layer_distance_by_hand():
    a = jnp.array([[[[3.0, 4.0], [0.0, 0.0]]]])
    b = jnp.array([[[[4.0, 3.0], [0.0, 5.0]]]])
    # (0.6 - 0.8)^2 * 2 + (0.8 - 0.6)^2 * 10 and 0 * 2 + 1 * 10, over two pixels.
    np.testing.assert_allclose(layer_distance(a, b, jnp.array([2.0, 10.0])), [5.24], rtol=1e-6)


def test_equal_images():
    images, _ = pair_of("alex", (31, 37))
    distances, gradient = run_gradient("alex")(params_of("alex"), images, images)
    np.testing.assert_array_equal(distances, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_dead_features():
    """Layers in which every vector is zero count nothing, and leave the gradient finite."""
    record = RECORD["alex"]["sizes"][1]
    params = dict(params_of("alex"))
    params["net"] = {
        name: {"kernel": leaf["kernel"], "bias": leaf["bias"] - 1e3 * (name == "features_6")}
        for name, leaf in params["net"].items()
    }
    for name in ("features_8", "features_10"):
        params["net"][name]["bias"] = -jnp.abs(params["net"][name]["bias"])
    distances, gradient = run_gradient("alex")(params, *pair_of("alex", record["size"]))
    np.testing.assert_allclose(distances, np.sum(record["layers"][:2], axis=0), rtol=5e-6)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_bfloat16_is_near(relative_error):
    record = RECORD["alex"]["sizes"][1]
    model = Lpips("alex", dtype=jnp.bfloat16)
    pair = pair_of("alex", record["size"])
    distances = jax.jit(model.apply)({"params": params_of("alex")}, *pair)
    assert distances.dtype == np.float32
    assert 1e-5 < relative_error(distances, np.array(record["distance"])) < 1e-2


@pytest.mark.parametrize("network", LPIPS_NETWORKS)
def test_smallest_side(network):
    side = LPIPS_MIN_SIDES[network]
    init = functools.partial(jax.eval_shape, Lpips(network).init, jax.random.key(0))
    least = jax.ShapeDtypeStruct((1, side, side + 9, 3), np.float32)
    init(least, least)
    stack = functools.partial(jax.eval_shape, FeatureStack(network).init_with_output)
    taps = stack(jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), np.float32))[0]
    assert taps[-1].shape[1:3] == (1, 1)
    small = jax.ShapeDtypeStruct((1, side + 9, side - 1, 3), np.float32)
    words = rf"{side + 9}x{side - 1} are too small for network='{network}': .* at least {side}"
    with pytest.raises(ValueError, match=words):
        init(small, small)


def test_unknown_network():
    with pytest.raises(ValueError, match=r"network='resnet' must be one of \['vgg', 'alex'\]"):
        Lpips("resnet")


@pytest.mark.parametrize("shape", [(1, 40, 40, 3), (2, 40, 41, 3)])
def test_pairs_of_two_shapes(shape):
    images, others = (jax.ShapeDtypeStruct(s, np.float32) for s in ((2, 40, 40, 3), shape))
    words = rf"images \[2, 40, 40, 3\] and others \[{shape[0]}, .* must have one shape"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(Lpips("alex").init, jax.random.key(0), images, others)
