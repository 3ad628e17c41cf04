import copy
import json
import re

import jax
import numpy as np
import pytest

from nextstep_jax.evaluation import recorded_run
from nextstep_jax.evaluation.comparison import (
    Comparison,
    compare,
    summary,
    table,
    with_tolerance,
)
from nextstep_jax.evaluation.recorded_run import RecordedRun, draws_by_row
from tests.published_files import CASE

STAGES = {
    1e-5: [
        *("vae_moments", "vae_logvar", "vae_dec", "hidden", "logits", "head_v"),
        *("train_lm_loss", "train_im_loss", "train_loss", "trainp_im_loss", "trainp_loss"),
        "grad/layers.0.self_attn.q_proj.weight",
        "grad/layers.1.mlp.down_proj.weight",
        "grad/embed_tokens.weight",
        "grad/lm_head.weight",
        "grad/image_in_projector.weight",
        "grad/image_head.net.res_blocks.1.adaLN_modulation.1.weight",
        "grad/image_head.net.time_embed.mlp.0.weight",
        "grad/norm.weight",
        "gradp/layers.0.self_attn.q_proj.weight",
        "gradp/image_out_projector.weight",
        "gradp/image_in_projector.weight",
        "gradp/embed_tokens.weight",
    ],
    5e-5: ["vae_mean"],
    1e-4: [
        *("sample_nocfg/out", "sample_cfg/out", "sample_cfg2/out"),
        *(
            f"{solver}_{kind}/out"
            for solver in ("ode", "sde", "cps")
            for kind in ("m1_plain", "m2_plain", "m2_renorm", "m3_plain", "m3_renorm")
        ),
        *("gen_tokens", "gen_latents", "gen_image"),
    ],
}


@pytest.fixture(scope="module")
def run():
    return RecordedRun(CASE)


@pytest.fixture(scope="module")
def comparisons(run):
    """All of them; it compiles for a while."""
    return list(run.compare_all())


def test_every_recorded_quantity_is_met(run, comparisons):
    wanted = {name: tolerance for tolerance, names in STAGES.items() for name in names}
    assert {one.name: one.tolerance for one in comparisons} == wanted
    assert len(comparisons) == len(wanted) == 45
    assert summary(comparisons) == "PASS 45/45"
    failed = [(one.name, one.relative) for one in comparisons if not one.passed]
    assert not failed
    # Far from the bounds: the errors are those of float32.
    assert max(one.relative for one in comparisons if one.tolerance == 1e-4) < 1e-5
    assert run.uncompared(one.name for one in comparisons) == []
    # Not equal by being the recording itself.
    assert sum(one.absolute > 0 for one in comparisons) > 35


def test_what_is_left_out_is_named(run, comparisons):
    names = [one.name for one in comparisons if not one.name.startswith(("cps_m1", "logits"))]
    assert run.uncompared(names) == ["cps_m1_plain/out", "logits"]
    other = copy.copy(run)
    other.golden = {**run.golden, "something_new": np.zeros(3)}
    assert other.uncompared(one.name for one in comparisons) == ["something_new"]


def test_the_losses_of_august_are_an_option(run, monkeypatch):
    def empty(self):
        return iter(())

    def name_losses(self, *arguments, **options):
        yield arguments, options

    for stage in ("vae", "decoder", "head", "august_sampler", "later_samplers", "generation"):
        monkeypatch.setattr(RecordedRun, f"compare_{stage}", empty)
    monkeypatch.setattr(RecordedRun, "compare_losses", name_losses)
    ours = (("trainp", "gradp"), {})
    assert list(run.compare_all(august_loss=False)) == [ours]
    august = (("train", "grad"), {"without_projector": True})
    assert list(run.compare_all(august_loss=True)) == [ours, august]


def test_one_tolerance_for_all(comparisons):
    strict = list(with_tolerance(iter(comparisons), 1e-12))
    exact = sum(one.absolute == 0 for one in comparisons)
    assert summary(strict) == f"FAIL {45 - exact}/45"
    assert {one.tolerance for one in strict} == {1e-12}
    assert list(with_tolerance(iter(comparisons), None)) == comparisons


def failing(comparisons):
    return {one.name for one in comparisons if not one.passed}


def test_a_changed_recording_fails_where_it_was_changed(run):
    other = copy.copy(run)
    other.golden = {name: array.copy() for name, array in run.golden.items()}
    name = max(run.golden["head_v"].flat, key=abs)
    other.golden["head_v"][2, 7] += 2e-5 * abs(name)
    assert failing(other.compare_head()) == {"head_v"}
    other.golden["head_v"][2, 7] = np.nan
    assert failing(other.compare_head()) == {"head_v"}
    other.golden["logits"] = other.golden["logits"][::-1]
    assert failing(other.compare_decoder()) == {"logits"}


@pytest.mark.parametrize(
    ("path", "stage", "expected"),
    [
        (("lm_head", "kernel"), "compare_decoder", {"logits"}),
        (
            ("decoder", "layers_2", "attn", "k_proj", "bias"),
            "compare_decoder",
            {"hidden", "logits"},
        ),
        (("decoder", "final_norm", "scale"), "compare_head", set()),
        (("flow_head", "blocks_0", "norm", "bias"), "compare_head", {"head_v"}),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else None,
)
def test_a_changed_weight_fails_where_it_is_used(run, path, stage, expected):
    other = copy.copy(run)
    other.params = jax.tree.map(lambda leaf: leaf, run.params)
    node = other.params
    for key in path[:-1]:
        node = node[key]
    # One value of the leaf, by a hundredth of the largest.
    leaf = node[path[-1]]
    place = (0,) * leaf.ndim
    node[path[-1]] = leaf.at[place].add(0.05 + 0.01 * abs(leaf).max())
    assert failing(getattr(other, stage)()) == expected


def test_a_changed_weight_of_the_image_tokenizer(run):
    other = copy.copy(run)
    params = run._vae_params
    conv_out = params["decoder"]["conv_out"]
    conv_out = {**conv_out, "bias": conv_out["bias"].at[1].add(1e-3)}
    other._vae_params = {**params, "decoder": {**params["decoder"], "conv_out": conv_out}}
    compared = list(other.compare_vae())
    assert [one.name for one in compared] == ["vae_moments", "vae_mean", "vae_logvar", "vae_dec"]
    assert failing(compared) == {"vae_dec"}


def test_compare():
    recorded = np.array([[1.0, -4.0], [2.0, 0.5]], np.float32)
    ours = recorded.copy()
    ours[1, 1] += 1e-4
    one = compare("x", ours, recorded, 3e-5)
    assert (one.name, one.shape, one.tolerance) == ("x", (2, 2), 3e-5)
    np.testing.assert_allclose([one.absolute, one.relative], [1e-4, 2.5e-5], rtol=1e-3)
    assert one.passed
    assert not compare("x", ours, recorded, 2e-5).passed
    assert not compare("x", np.full(2, np.nan), np.ones(2)).passed
    assert not compare("x", np.ones(2), np.full(2, np.nan)).passed
    # Where all is zero only zero will do.
    assert compare("x", np.zeros(3), np.zeros(3)).passed
    assert not compare("x", np.full(3, 1e-30), np.zeros(3), 1e9).passed
    with pytest.raises(ValueError, match=r"x: ours is \(3,\), recorded \(2, 2\)"):
        compare("x", np.zeros(3), recorded)


def test_the_table():
    rows = [
        Comparison("one", (2, 3), 1.234e-6, 5e-7, 1e-5),
        Comparison("second", (), 0.5, 0.1, 5e-5),
    ]
    assert table(rows).splitlines() == [
        "quantity  shape   max abs  max rel  tolerance",
        "one       2x3     1.2e-06  5.0e-07  1e-05      pass",
        "second    scalar  5.0e-01  1.0e-01  5e-05      FAIL",
    ]
    assert summary(rows) == "FAIL 1/2"
    assert summary(rows[:1]) == "PASS 1/1"


@pytest.mark.parametrize("counts", [(3, 3), (1, 4), (4, 0, 2), (5,)], ids=str)
def test_draws_go_to_their_tokens(counts):
    """Against a loop over blocks, rows and tokens."""
    length, num_blocks, dim = 7, 3, 2
    rng = np.random.default_rng([1, *counts])
    is_image = np.zeros((len(counts), length), bool)
    for row, count in zip(is_image, counts, strict=True):
        row[rng.choice(length, count, replace=False)] = True
    total = sum(counts)
    u = rng.standard_normal(num_blocks * total).astype(np.float32)
    noise = rng.standard_normal((num_blocks * total, dim)).astype(np.float32)
    our_u, our_noise = draws_by_row(u, noise, is_image)
    assert our_u.shape == (num_blocks, len(counts), max(counts))
    assert our_noise.shape == (*our_u.shape, dim)
    k = 0
    for block in range(num_blocks):
        for row in range(len(counts)):
            for token in range(counts[row]):
                assert our_u[block, row, token] == u[k]
                np.testing.assert_array_equal(our_noise[block, row, token], noise[k])
                k += 1
    assert k == len(u)


def test_draws_must_be_whole_blocks():
    is_image = np.ones((1, 4), bool)
    with pytest.raises(ValueError, match="6 times and 6 noises are not whole blocks for 4 tokens"):
        draws_by_row(np.zeros(6, np.float32), np.zeros((6, 2), np.float32), is_image)
    with pytest.raises(ValueError, match="8 times and 4 noises are not"):
        draws_by_row(np.zeros(8, np.float32), np.zeros((4, 2), np.float32), is_image)
    with pytest.raises(ValueError, match="8 times and 8 noises are not whole blocks for 0 tokens"):
        draws_by_row(np.zeros(8, np.float32), np.zeros((8, 2), np.float32), ~is_image)


def unequal_rows(run):
    """A recording with two images in one row, one in the other, and three draws a token.

    The losses are computed here, draw by draw; hidden states and velocities are the model's, which
    are compared elsewhere.
    """
    rng = np.random.default_rng([9])
    boi, eoi, placeholder = 500, 501, 502
    image = [boi, *[placeholder] * 16, eoi]
    rows = [[5, 6, *image, *image, 7, 2], [8, *image, 9, 10, 11]]
    length = max(map(len, rows))
    ids = np.array([[*row, *[2] * (length - len(row))] for row in rows])
    labels = np.where((ids == placeholder) | (ids == boi), -100, ids)
    labels[1, len(rows[1]) :] = -100
    latents = rng.standard_normal((3, 16, 8, 8)).astype(np.float32)
    u = rng.standard_normal(3 * 48).astype(np.float32)
    noise = rng.standard_normal((3 * 48, 64)).astype(np.float32)
    # (image, channel, row, column) -> the tokens of an image by rows of 2x2 patches.
    tokens = latents.reshape(3, 16, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(48, 64)

    golden = {"train_ids": ids, "train_labels": labels, "train_latents": latents}
    golden |= {"trainp_u": u, "trainp_noise": noise}
    other = copy.copy(run)
    other.golden = golden
    batch = other._training_batch()
    np.testing.assert_array_equal(np.asarray(batch["latents"])[ids == placeholder], tokens)
    args = [batch[name] for name in ("token_ids", "latents", "positions", "segment_ids")]
    hidden = np.asarray(run._run("hidden", *args))
    places = [(row, p) for row in range(2) for p in range(length) if ids[row, p] == placeholder]
    before = np.stack([hidden[row, p - 1] for row, p in places])
    conditions = np.asarray(run._run("condition", before))
    times = 1 / (1 + np.exp(-u.astype(np.float64)))
    noisy, target, condition = [], [], []
    for k, time in enumerate(times):
        token = tokens[k % 48]
        noisy.append(time * token + (1 - time) * noise[k])
        target.append(token - noise[k])
        condition.append(conditions[k % 48])
    inputs = [np.asarray(x, np.float32) for x in (noisy, times, condition)]
    velocity = np.asarray(run._run("velocity", *inputs))
    golden["trainp_im_loss"] = np.mean((velocity - np.array(target)) ** 2)

    logits = np.asarray(run._run("text_logits", hidden), np.float64)
    losses = [
        np.log(np.exp(logits[row, p - 1]).sum()) - logits[row, p - 1, labels[row, p]]
        for row in range(2)
        for p in range(1, length)
        if labels[row, p] not in (-100, placeholder)
    ]
    assert len(losses) == 1 + 1 + 1 + 2 + 1 + 3
    golden["train_lm_loss"] = np.mean(losses)
    golden["trainp_loss"] = 0.01 * golden["train_lm_loss"] + golden["trainp_im_loss"]
    golden |= {name: np.asarray(array) for name, array in golden.items()}
    return other


def test_losses_of_unequal_rows(run):
    other = unequal_rows(run)
    compared = list(other.compare_losses("trainp", "gradp"))
    names = ["train_lm_loss", "trainp_im_loss", "trainp_loss"]
    assert [(one.name, one.passed) for one in compared] == [(name, True) for name in names]
    # The order of the draws matters.
    other.golden["trainp_u"] = other.golden["trainp_u"].reshape(3, 48)[:, ::-1].ravel()
    assert failing(other.compare_losses("trainp", "gradp")) == {"trainp_im_loss", "trainp_loss"}


def test_rows_that_contradict_themselves(run):
    other = copy.copy(run)
    other.golden = dict(run.golden)
    other.golden["train_latents"] = run.golden["train_latents"][:1]
    with pytest.raises(ValueError, match="32 placeholders for 1 images of 16 tokens"):
        list(other.compare_decoder())
    other.golden = {**run.golden, "train_labels": run.golden["train_labels"].copy()}
    kept = np.argwhere(other.golden["train_labels"][:, 1:] != -100)[0] + [0, 1]
    other.golden["train_labels"][tuple(kept)] += 1
    with pytest.raises(ValueError, match="train_labels differ from train_ids where they count"):
        list(other.compare_decoder())


def test_settings_that_are_unknown(run):
    other = copy.copy(run)
    other.meta = {**run.meta, "sched": "rising"}
    message = r"sched of meta.json: 'rising' is unknown; known are \['constant', 'linear'\]"
    with pytest.raises(ValueError, match=message):
        list(other.compare_generation())
    other.samplers = {
        k.replace("ode_", "dpm_"): v for k, v in run.samplers.items() if "ode_m1" in k
    }
    with pytest.raises(ValueError, match=r"a solver of samplers.npz: 'dpm' is unknown"):
        list(other.compare_later_samplers())


def test_recordings_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "golden.npz"
    whole = (CASE / "golden.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (whole[: len(whole) // 2], b"", b"text", (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is no .npz file, or is cut"):
            recorded_run._arrays(path)
    with pytest.raises(FileNotFoundError, match=r"model/config.json is not there"):
        RecordedRun(tmp_path)
    arrays = recorded_run._arrays(CASE / "golden.npz")
    assert json.loads((CASE / "meta.json").read_text())["hw"] == [*arrays["gen_image"].shape[2:]]
