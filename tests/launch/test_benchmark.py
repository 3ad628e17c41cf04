import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from launch import benchmark
from nextstep_jax.evaluation import checkpoint_speed, sampling_speed, train_speed
from nextstep_jax.models.config import FlowHeadConfig, nextstep_config
from nextstep_jax.models.flow_head import FlowHead
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.sampling import generate
from nextstep_jax.sampling.generate import SamplerConfig
from tests import tiny_model

PROGRAM = "launch/benchmark.py"
TINY = ["flow_head", "--head=tiny", "--steps=3", "--rows=2", "--cond_dim=8", "--repeats=3"]


def test_both_forms_take_the_same_euler_steps():
    head = FlowHead(FlowHeadConfig(width=16, num_layers=2, frequency_dim=8), token_dim=4)
    draw = np.random.default_rng([8]).standard_normal
    # Weights of order one, so that time, condition and noise all matter.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw(leaf.shape) / np.sqrt(leaf.shape[0]), jnp.float32),
        benchmark.random_params(head, cond_dim=6),
    )
    x = jnp.asarray(draw((2, 4)), jnp.float32)
    condition = jnp.asarray(draw((2, 6)), jnp.float32)
    times = jnp.array([0.0, 0.2, 0.4, 0.6, 0.8])
    expected = np.asarray(x, np.float64)
    velocity = jax.jit(head.apply)
    for time in times:
        v = velocity(params, jnp.asarray(expected, jnp.float32), jnp.full(2, time), condition)
        expected = expected + 0.2 * np.asarray(v, np.float64)
    assert np.abs(expected - x).max() > 0.1
    for method in (benchmark.naive_token, benchmark.amortised_token):
        actual = jax.jit(nn.apply(method, head))(params, x, times, condition)
        assert np.abs(actual - expected).max() / np.abs(expected).max() < 1e-5


def test_random_params_have_no_zeros():
    head = FlowHead(FlowHeadConfig(width=32, num_layers=1), token_dim=4)
    for leaf in jax.tree.leaves(benchmark.random_params(head, cond_dim=6)):
        assert np.all(leaf != 0)
        assert abs(np.std(leaf) / 0.02 - 1) < 5 / np.sqrt(2 * leaf.size) + 0.5 * (leaf.size < 10)


def test_flow_head_report(tmp_path, capsys):
    path = tmp_path / "figures.json"
    benchmark.main(benchmark.parse_flags([PROGRAM, *TINY, f"--json={path}"]))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == report
    assert report["benchmark"] == "flow_head"
    assert report["settings"] | {"head": "tiny", "steps": 3, "rows": 2} == report["settings"]
    for form in ("naive", "amortised"):
        times = report[form]["times_s"]
        assert len(times) == 3
        assert report[form]["median_s"] == sorted(times)[1] > 0
        assert report[form]["compile_s"] > 0
    pairs = zip(report["naive"]["times_s"], report["amortised"]["times_s"], strict=True)
    assert report["ratio"] == sorted(slow / fast for slow, fast in pairs)[1]
    assert report["max_relative_difference"] < 1e-5
    assert report["environment"]["jax"] == jax.__version__
    assert report["environment"]["platform"] == "cpu"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--head=xl", r"head='xl' is unknown; choose from \['tiny', 's', 'b', 'l'\]"),
        ("--steps=0", "steps=0 must be at least 1"),
        ("--rows=0", "rows=0 must be at least 1"),
        ("--repeats=0", "repeats=0 must be at least 1"),
    ],
)
def test_bad_flags_end_with_one_line(flag, message):
    with pytest.raises(SystemExit, match=f"benchmark flow_head: {message}"):
        benchmark.main(benchmark.parse_flags([PROGRAM, *TINY, flag]))


def test_a_new_subcommand_is_one_row(monkeypatch, capsys):
    row = benchmark.Benchmark(
        "adds",
        lambda p: p.add_argument("--count", type=int),
        lambda args: {"sum": args.count + 1},
    )
    monkeypatch.setitem(benchmark.BENCHMARKS, "adding", row)
    benchmark.main(benchmark.parse_flags([PROGRAM, "adding", "--count=4"]))
    assert json.loads(capsys.readouterr().out)["sum"] == 5


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_flags([PROGRAM, "--help"])
    assert stopped.value.code == 0
    assert f"python {PROGRAM} flow_head --head=b" in capsys.readouterr().out


SMALL = ["sampling", "--steps=2", "--tokens=3", "--prompt_length=8", "--repeats=5"]


def test_sampling_report(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = [*SMALL, "--batch=2", "--bandwidth_gbs=20", f"--json={path}"]
    benchmark.main(benchmark.parse_flags([PROGRAM, *flags]))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == report
    assert report["settings"]["parameters"]["decoder"] == 1_575_872
    times = report["times_s"]
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(
        ("whole", "decoder", "head", "prefill"), 5
    )
    assert set(report["compile_s"]) == set(times) and min(report["compile_s"].values()) > 0
    ms = report["ms_per_token"]
    for name in ("whole", "decoder", "head"):
        assert ms[name] == pytest.approx(1e3 * sorted(times[name])[2] / 3)
        model = report["byte_model"]
        limit = 1e3 * model["bytes_per_token"][name] / 20e9
        assert model["limit_ms_per_token"][name] == pytest.approx(limit)
        assert model["share_reached"][name] == pytest.approx(limit / ms[name])
    rounds = zip(times["whole"], times["decoder"], times["head"], strict=True)
    assert ms["rest"] == pytest.approx(sorted(1e3 * (w - d - h) / 3 for w, d, h in rounds)[2])
    assert report["tokens_per_s"] == pytest.approx(2 * 3 / sorted(times["whole"])[2])
    assert report["byte_model"]["bandwidth_source"] == "--bandwidth_gbs"


def test_a_second_order_solver_asks_the_head_twice_a_step(monkeypatch, capsys):
    times = {key: [1.0] for key in ("whole", "decoder", "head", "prefill")}
    monkeypatch.setattr(sampling_speed, "random_params", lambda *_: None)
    monkeypatch.setattr(sampling_speed, "measure", lambda *_: {"times_s": times})
    read = {}
    for solver in ("ode", "heun"):
        flags = [*SMALL, f"--solver={solver}", "--steps=5", "--bandwidth_gbs=20"]
        benchmark.main(benchmark.parse_flags([PROGRAM, *flags]))
        report = json.loads(capsys.readouterr().out)
        read[solver] = report["byte_model"]["bytes_per_token"]["head"]
    per_step = report["settings"]["parameters"]["head_per_step"]
    assert read["heun"] - read["ode"] == 4 * (2 * 5 - 5) * per_step


def test_the_parts_do_what_sampling_does():
    """The decoder's program leaves sampling's cache, the head's its tokens."""
    model = NextStep(tiny_model.CONFIG, scan_layers=False)
    params, sampler = tiny_model.unrolled_params(), SamplerConfig("ode", num_steps=2)
    prompts = generate.pad_prompts(tiny_model.prompt_rows(("a", "green")), 1, 16, 16)
    keys, guidance = jax.random.key(3)[None], np.array([2.0, 1.0], np.float32)
    start = generate.prefill_jit(model, params, prompts, keys, 3)
    hidden = [jnp.array(start.hidden)]
    state = generate.prefill_jit(model, params, prompts, keys, 3)
    for _ in range(3):
        state = generate.sample_chunk(model, params, state, guidance, sampler, 1)
        hidden.append(jnp.array(state.hidden))
    again = sampling_speed.decoder_only(model, params, start.replace(tokens=state.tokens.copy()))
    for left, right in zip(again.cache.k, state.cache.k, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    np.testing.assert_allclose(again.hidden, state.hidden, atol=1e-5)

    noise = generate.draw_noise(keys, jnp.int32(0), 1, 16)
    tokens = sampling_speed.head_only(
        model, params, jnp.stack(hidden[:3]), noise, guidance, sampler
    )
    # The first token starts from the same noise; the others from the token before.
    np.testing.assert_allclose(tokens[0], state.tokens[:, 0], atol=1e-5)
    assert np.abs(tokens[1] - tokens[0]).max() > 1e-2


def test_random_weights_are_drawn_in_their_dtype():
    model = NextStep(tiny_model.CONFIG, scan_layers=False)
    params = sampling_speed.random_params(model, jnp.bfloat16)
    assert "lm_head" not in params
    assert set(params["decoder"]) == {"layers_0", "layers_1", "final_norm"}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    table = np.asarray(params["embed_tokens"], np.float32)
    assert abs(np.std(table) / 0.02 - 1) < 0.03
    assert np.unique(table).size > 100


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--size=99b", "size='99b' is unknown; choose from"),
        ("--head=xl", "head='xl' is unknown; choose from"),
        ("--solver=rk4", "unknown solver 'rk4'"),
        ("--branches=4", "branches=4 must be 1, 2 or 3"),
        ("--tokens=0", "tokens=0 must be at least 1"),
        ("--bandwidth_gbs=-1", "bandwidth_gbs=-1.0 must be positive"),
    ],
)
def test_bad_flags_of_sampling(flag, message):
    with pytest.raises(SystemExit, match=f"benchmark sampling: {message}"):
        benchmark.main(benchmark.parse_flags([PROGRAM, *SMALL, flag]))


def test_data_report(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = ["--formats=records", "--sizes=32", "--source_size=32", "--num_images=4"]
    flags += ["--threads=", "--repeats=1", f"--json={path}"]
    benchmark.main(benchmark.parse_flags([PROGRAM, "data", *flags]))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == report
    assert report["settings"] | {"formats": ["records"], "sizes": [32]} == report["settings"]
    (figures,) = report["per_core"].values()
    assert figures["counted"]["images"] == figures["counted"]["documents"] > 0
    assert report["all_cores"] == {}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--formats=zip", r"formats=\['zip'\]; choose from \['folder', 'tars'"),
        ("--sizes=small", "sizes='small' must be whole numbers with commas between"),
        ("--num_images=0", "num_images=0 must be at least 1"),
    ],
)
def test_bad_flags_of_data(flag, message):
    with pytest.raises(SystemExit, match=f"benchmark data: {message}"):
        benchmark.main(benchmark.parse_flags([PROGRAM, "data", flag]))


def run_captured(monkeypatch, module, flags):
    """The setting that a subcommand makes of its flags; nothing is measured."""
    seen = []
    monkeypatch.setattr(module, "run", lambda setting: seen.append(setting) or {})
    benchmark.main(benchmark.parse_flags([PROGRAM, *flags]))
    return seen[0]


def test_flags_of_train(monkeypatch):
    flags = ["--size=1.5b", "--length=8192", "--rows=8", "--dtype=bfloat16", "--attention=chunked"]
    flags += ["--remat=nothing_saveable", "--accumulate=2", "--mesh=fsdp:2,tensor:2", "--seed=3"]
    setting = run_captured(monkeypatch, train_speed, ["train", *flags, "--repeats=7"])
    assert setting == train_speed.Setting(
        nextstep_config("1.5b"),
        rows=8,
        length=8192,
        dtype="bfloat16",
        attention="chunked",
        remat="nothing_saveable",
        accumulate=2,
        mesh=(("fsdp", 2), ("tensor", 2)),
        repeats=7,
        seed=3,
    )
    assert setting.num_devices == 4
    flags = ["--head=s", "--decoder=embed_dim:64,num_layers:3", "--flow_head=num_layers:5"]
    model = run_captured(monkeypatch, train_speed, ["train", *flags]).model
    assert (model.decoder.embed_dim, model.decoder.num_layers) == (64, 3)
    assert (model.flow_head.num_layers, model.flow_head.width) == (5, 1024)
    assert model.decoder.vocab_size == nextstep_config("tiny").decoder.vocab_size


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--size=99b", "size='99b' is unknown; choose from"),
        ("--decoder=embed_dim", "decoder='embed_dim' must read like embed_dim:512"),
        ("--decoder=layers:3", r"config.decoder: unknown keys \['layers'\]"),
        ("--mesh=fsdp", "mesh 'fsdp' must read like"),
        ("--mesh=fsdp:-1", ".*every size must be given"),
        ("--mesh=fsdp:64", "a mesh of 64 devices, but there are 8"),
        ("--mesh=rows:1", r"mesh axes \['rows'\] are unknown"),
        ("--attention=flash", "attention implementation 'flash' is unknown"),
        ("--remat=some", "remat='some' is unknown; choose from"),
        ("--rows=0", "rows=0 must be at least 1"),
    ],
)
def test_bad_flags_of_train(flag, message):
    with pytest.raises(SystemExit, match=f"benchmark train: {message}"):
        benchmark.main(benchmark.parse_flags([PROGRAM, "train", flag]))


def test_flags_of_checkpoint(monkeypatch, tmp_path):
    flags = ["--gigabytes=0.5", "--mesh=fsdp:4", "--other_mesh=data:2", f"--dir={tmp_path}"]
    setting = run_captured(monkeypatch, checkpoint_speed, ["checkpoint", *flags])
    assert setting == checkpoint_speed.Setting(
        0.5, (("fsdp", 4),), (("data", 2),), directory=str(tmp_path)
    )
    assert run_captured(monkeypatch, checkpoint_speed, ["checkpoint"]) == (
        checkpoint_speed.Setting()
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--gigabytes=0", "gigabytes=0.0 must be positive"),
        ("--dir=/no/such/folder", "dir='/no/such/folder' is not a folder"),
        ("--other_mesh=fsdp:64", "a mesh of 64 devices, but there are 8"),
    ],
)
def test_bad_flags_of_checkpoint(flag, message):
    with pytest.raises(SystemExit, match=f"benchmark checkpoint: {message}"):
        benchmark.main(benchmark.parse_flags([PROGRAM, "checkpoint", flag]))
