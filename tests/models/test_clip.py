import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from nextstep_jax.interop import streaming
from nextstep_jax.interop.clip_weights import clip_slots
from nextstep_jax.interop.tensor_views import MemoryTensors
from nextstep_jax.models.clip import (
    AestheticHead,
    Clip,
    ClipConfig,
    TowerConfig,
    cosine,
    end_index,
    exact_gelu,
    quick_gelu,
    unit_vectors,
)
from tests import tiny_clip
from tests.recorded import record_clip

RECORD = json.loads(record_clip.PATH.read_text())["towers"]
SIDE = tiny_clip.IMAGE_SIZE


@functools.cache
def clip_of(variant):
    """The recorded CLIP and its parameters; the config is written out once more."""
    first = variant == "first"
    shared = {"activation": "quick_gelu" if first else "gelu", "eps": 1e-5 if first else 1e-2}
    config = ClipConfig(
        vision=TowerConfig(width=32, mlp_dim=48, num_layers=2, num_heads=4, **shared),
        text=TowerConfig(width=24, mlp_dim=40, num_layers=2, num_heads=2, **shared),
        embed_dim=16,
        image_size=SIDE,
        patch_size=8,
        vocab_size=tiny_clip.VOCAB_SIZES[variant],
        context_length=tiny_clip.CONTEXT,
        end_id=None if first else tiny_clip.END_ID,
    )
    abstract = jax.eval_shape(Clip(config).init, jax.random.key(0), *inputs_of(variant))["params"]
    files = MemoryTensors(tiny_clip.tensors_of(variant))
    return config, streaming.load_params(files, clip_slots(abstract), abstract)


def inputs_of(variant):
    images = tiny_clip.normalized_of(1, (SIDE, SIDE))
    return jnp.asarray(images), jnp.asarray(tiny_clip.token_ids_of(variant))


@functools.cache
def embed(variant, dtype=jnp.float32):
    config, params = clip_of(variant)
    return jax.jit(functools.partial(Clip(config, dtype).apply, {"params": params}))


@pytest.mark.parametrize("variant", RECORD)
def test_embeddings_of_the_original(variant):
    for ours, tower in zip(embed(variant)(*inputs_of(variant)), ("images", "texts"), strict=True):
        assert ours.dtype == np.float32
        theirs = np.array(RECORD[variant][tower])
        assert ours.shape == theirs.shape == (3, 16)
        # Measured: at most 3e-7.
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-6


def test_bfloat16_is_near():
    for ours, tower in zip(
        embed("later", jnp.bfloat16)(*inputs_of("later")), ("images", "texts"), strict=True
    ):
        assert ours.dtype == np.float32
        theirs = np.array(RECORD["later"][tower])
        error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
        # Measured: 8e-3.
        assert 1e-4 < error < 2e-2


def test_text_before_its_end_is_all_that_counts():
    variant = "later"
    images, token_ids = inputs_of(variant)
    texts = embed(variant)(images, token_ids)[1]
    other = token_ids.at[0, 5:].set(7).at[1, 3].add(1)
    changed = embed(variant)(images, other)[1]
    np.testing.assert_array_equal(changed[0], texts[0])
    assert np.abs(changed[1] - texts[1]).max() > 1e-3


def test_end_index():
    token_ids = jnp.array([[5, 1, 8, 9, 8], [9, 8, 1, 2, 9]])
    np.testing.assert_array_equal(end_index(token_ids, 8), [2, 1])
    np.testing.assert_array_equal(end_index(token_ids, None), [3, 0])


def test_activations():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    wide = x.astype(np.float64)
    quick = wide * scipy.special.expit(1.702 * wide)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), quick, atol=1e-6)
    gelu = wide * scipy.special.ndtr(wide)
    np.testing.assert_allclose(exact_gelu(jnp.asarray(x)), gelu, atol=1e-6)
    # Apart enough for the comparisons above to tell one from the other.
    assert np.abs(quick - gelu).max() > 0.02


def test_cosine():
    x = jnp.array([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]])
    y = jnp.array([[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0]])
    np.testing.assert_allclose(cosine(x, y), [1, 0, -np.sqrt(0.5)], atol=1e-7)
    np.testing.assert_allclose(unit_vectors(x)[0], [0.6, 0.8], rtol=1e-6)
    assert np.isnan(unit_vectors(jnp.zeros((1, 2)))).all()


@pytest.mark.parametrize(("form", "num_layers"), [("linear", 1), ("mlp", 5)])
def test_heads_are_affine(form, num_layers):
    """A chain of linear layers is one: the product of the kernels, the biases carried through."""
    rng = np.random.default_rng([4])
    embeddings = rng.standard_normal((3, 16)).astype(np.float32)
    head = AestheticHead(form)
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.asarray(embeddings))["params"]
    assert len(shapes) == num_layers
    params = jax.tree.map(
        lambda leaf: np.float32(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0])), shapes
    )
    kernel, bias = np.eye(16), np.zeros(16)
    for number in range(num_layers):
        layer = jax.tree.map(np.float64, params[f"layers_{number}"])
        kernel, bias = kernel @ layer["kernel"], bias @ layer["kernel"] + layer["bias"]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = jax.jit(head.apply)({"params": params}, 7 * embeddings)
    np.testing.assert_allclose(scores, (unit @ kernel + bias)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TowerConfig(10, 10, 1, 3), "num_heads=3 must divide width=10"),
        (lambda: TowerConfig(8, 8, 1, 2, "relu"), r"activation='relu' must be one of \['gelu'"),
        (
            lambda: ClipConfig(*[TowerConfig(8, 8, 1, 2)] * 2, 8, image_size=224, patch_size=15),
            "patch_size=15 must divide image_size=224",
        ),
    ],
)
def test_faults_of_configs(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_faults_of_inputs():
    images, token_ids = inputs_of("first")
    run = functools.partial(jax.eval_shape, embed("first"))
    with pytest.raises(ValueError, match=r"images \[3, 32, 24, 3\] must be \[batch, 32, 32, 3\]"):
        run(images[:, :, :24], token_ids)
    with pytest.raises(ValueError, match="24 tokens are more than context_length=12"):
        run(images, jnp.concatenate([token_ids, token_ids], axis=1))
