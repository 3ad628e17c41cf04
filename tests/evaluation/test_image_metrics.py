import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nextstep_jax.evaluation import image_metrics
from nextstep_jax.evaluation.image_metrics import (
    MAX_PSNR,
    FeatureStatistics,
    baseline_size,
    bicubic_baseline,
    frechet_distance,
    psnr,
    ssim,
)


def reference_ssim(x, y):
    return structural_similarity(
        x,
        y,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )


def noisy_pairs(height, width, seed):
    """Photograph crops and themselves disturbed: a little, a lot, shifted, flat and bright."""
    rng = np.random.default_rng([seed])
    photo = astronaut()
    tops, lefts = rng.integers(0, 512 - height, 4), rng.integers(0, 512 - width - 1, 4)
    x = np.stack([photo[t : t + height, p : p + width] for t, p in zip(tops, lefts, strict=True)])
    y = np.stack(
        [photo[t : t + height, p + 1 :][:, :width] for t, p in zip(tops, lefts, strict=True)]
    )
    x[3] = 250 + rng.integers(0, 2, x[3].shape)
    y[3] = 250 + rng.integers(0, 2, x[3].shape)
    for i, deviation in ((0, 3), (1, 60)):
        y[i] = np.clip(x[i] + rng.normal(0, deviation, x[i].shape), 0, 255).round()
    return x, y


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 40), (64, 48), (129, 130)])
def test_ssim_is_that_of_scikit_image(height, width):
    x, y = noisy_pairs(height, width, seed=height)
    expected = [reference_ssim(*pair) for pair in zip(x, y, strict=True)]
    assert min(expected) < 0.5 and max(expected) > 0.85
    np.testing.assert_allclose(jax.jit(ssim)(x, y), expected, rtol=0, atol=1e-5)
    # Floats are taken as they are; scikit-image works in float64 here as well.
    a, b = x + 0.25, y * 0.9
    expected = [reference_ssim(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(ssim)(a, b), expected, rtol=0, atol=1e-5)


def test_ssim_of_equal_images_is_one():
    x, _ = noisy_pairs(20, 20, seed=1)
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 10, 64, 3), (1, 64, 10, 3)])
def test_ssim_refuses_images_smaller_than_its_window(shape):
    small = np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match=f"at least 11 .*got {shape[1]}x{shape[2]}"):
        ssim(small, small)


def test_images_of_other_shapes_are_refused():
    # Below the annotations, which catch this in the test run only.
    with pytest.raises(ValueError, match="cannot be compared"):
        image_metrics._as_floats(np.zeros((1, 16, 16, 3)), np.zeros((2, 16, 16, 3)))


def test_psnr_is_that_of_scikit_image():
    x, y = noisy_pairs(96, 128, seed=2)
    expected = [peak_signal_noise_ratio(*pair, data_range=255) for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(jax.jit(psnr)(x, y), expected, rtol=2e-6)
    np.testing.assert_allclose(psnr(jnp.asarray(y, jnp.float32), x), expected, rtol=2e-6)


def test_psnr_by_hand():
    x = np.full((3, 12, 16, 3), 100, np.uint8)
    y = np.stack([x[0], x[1] + np.uint8(5), 255 * (x[2] > 200).astype(np.uint8)])
    # Squared errors 0, 25 and 100^2.
    expected = [MAX_PSNR, 20 * np.log10(255 / 5), 20 * np.log10(2.55)]
    np.testing.assert_allclose(psnr(x, y), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "num_values", "size"),
    [
        # 8x8 latents of 16 channels: 1024 / 3 = 341.3 pixels, between 18^2 and 19^2.
        (64, 64, 1024, (19, 19)),
        (64, 64, 3 * 18 * 18, (18, 18)),
        (64, 64, 3 * 18 * 18 + 1, (19, 19)),
        (32, 128, 3 * 5 * 20, (5, 20)),
        (32, 128, 3 * 5 * 20 + 1, (6, 21)),
        (64, 64, 1, (1, 1)),
        (64, 64, 10**6, (64, 64)),
        # 32 x 32 x 16 values of 256 x 256 pixels: 5461.3 pixels, 74^2 = 5476.
        (256, 256, 16384, (74, 74)),
    ],
)
def test_baseline_size(height, width, num_values, size):
    assert baseline_size(height, width, num_values) == size


def test_bicubic_baseline_is_pillows():
    pixels = np.stack([astronaut()[100:164, 150:246], astronaut()[:64, :96]])
    result = bicubic_baseline(pixels, 3 * 10 * 15)
    assert result.dtype == np.uint8 and result.shape == pixels.shape
    for image, got in zip(pixels, result, strict=True):
        small = Image.fromarray(image).resize((15, 10), Image.Resampling.BICUBIC)
        expected = np.asarray(small.resize((96, 64), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(got, expected)
        # Antialiased: the mean survives; sampling every 6th pixel would not be that exact.
        assert abs(got.mean() - image.mean()) < 1
    np.testing.assert_array_equal(bicubic_baseline(pixels, pixels[0].size), pixels)
    with pytest.raises(ValueError, match="num_values=0"):
        bicubic_baseline(pixels, 0)


def test_statistics_of_pieces_are_those_of_the_whole():
    rng = np.random.default_rng([3])
    # A mean far from 0, where one-pass formulas lose their digits.
    features = rng.normal(1000.0, 1.0, (300, 7)) @ rng.normal(size=(7, 7))
    cuts = [0, 1, 50, 50, 51, 190, 300]
    pieces = [FeatureStatistics.of(features[a:b]) for a, b in itertools.pairwise(cuts)]
    for order in (range(6), (5, 3, 0, 1, 4, 2)):
        merged = FeatureStatistics.of(np.zeros((0, 7)))
        for i in order:
            merged = merged.merge(pieces[i])
        assert merged.count == 300
        np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-12)
        expected = np.cov(features, rowvar=False)
        assert np.abs(merged.covariance - expected).max() < 1e-10 * np.abs(expected).max()
    tree = pieces[0].merge(pieces[1]).merge(pieces[4].merge(pieces[5]).merge(pieces[3]))
    assert np.abs(tree.covariance - expected).max() < 1e-10 * np.abs(expected).max()


def test_statistics_of_float32_features_are_in_float64():
    features = np.random.default_rng([4]).normal(100, 1, (50, 3)).astype(np.float32)
    stats = FeatureStatistics.of(features)
    assert stats.mean.dtype == stats.scatter.dtype == np.float64
    np.testing.assert_allclose(
        stats.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10
    )


def test_statistics_refuse_what_has_no_answer():
    three, four = (FeatureStatistics.of(np.ones((1, n))) for n in (3, 4))
    with pytest.raises(ValueError, match="3 and of 4"):
        three.merge(four)
    with pytest.raises(ValueError, match="3 and of 4"):
        frechet_distance(three, four)
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        frechet_distance(three, three)


def given(mean, covariance):
    """Statistics of that mean and covariance."""
    return FeatureStatistics(11, np.asarray(mean, float), 10 * np.asarray(covariance, float))


def random_covariance(rng, width, rank):
    factor = rng.normal(size=(width, rank)) * np.geomspace(1, 1e-2, rank)
    return factor @ factor.T


def test_frechet_distance_of_commuting_covariances():
    """|ma - mb|^2 + sum of (sqrt(a_i) - sqrt(b_i))^2 in the common eigenvectors."""
    rng = np.random.default_rng([5])
    mean_a, mean_b = rng.normal(size=(2, 6))
    a, b = rng.uniform(0.01, 4, (2, 6))
    b[2] = 0.0
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    diagonal = frechet_distance(given(mean_a, np.diag(a)), given(mean_b, np.diag(b)))
    assert diagonal == pytest.approx(expected, rel=1e-12)
    turn = scipy.linalg.qr(rng.normal(size=(6, 6)))[0]
    turned = [turn @ np.diag(values) @ turn.T for values in (a, b)]
    assert frechet_distance(
        given(turn @ mean_a, turned[0]), given(turn @ mean_b, turned[1])
    ) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng([6])
    for width in (2, 10, 64):
        a, b = (random_covariance(rng, width, width) for _ in range(2))
        means = rng.normal(size=(2, width))
        root = scipy.linalg.sqrtm(a @ b).real
        expected = np.sum((means[0] - means[1]) ** 2) + np.trace(a + b - 2 * root)
        forward = frechet_distance(given(means[0], a), given(means[1], b))
        assert forward == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(given(means[1], b), given(means[0], a)) == pytest.approx(
            forward, rel=1e-12
        )


@pytest.mark.filterwarnings("error")
def test_frechet_distance_of_fewer_images_than_features():
    """Singular covariances, against the same vectors in coordinates of their span."""
    rng = np.random.default_rng([7])
    a, b = rng.normal(size=(12, 5)), 3 + rng.normal(size=(9, 5)) * 2
    expected = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    span = scipy.linalg.qr(rng.normal(size=(80, 5)), mode="economic")[0].T
    wide = [FeatureStatistics.of(x @ span) for x in (a, b)]
    assert wide[0].factor.shape == (80, 5)
    assert frechet_distance(*wide) == pytest.approx(expected, rel=1e-10)
    # Of a set to itself: nothing but rounding, on either side of 0.
    for x in (a @ span, rng.normal(size=(20, 200)), np.ones((4, 6)), np.ones((4, 6)) * 0.1):
        stats = FeatureStatistics.of(x)
        assert abs(frechet_distance(stats, stats)) < 1e-10
    flat = FeatureStatistics.of(np.zeros((4, 5)))
    trace = np.trace(np.cov(a, rowvar=False))
    moved = np.sum(a.mean(axis=0) ** 2)
    assert frechet_distance(flat, FeatureStatistics.of(a)) == pytest.approx(trace + moved)
