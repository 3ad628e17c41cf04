import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from launch import benchmark
from nextstep_jax.models.config import FlowHeadConfig
from nextstep_jax.models.flow_head import FlowHead

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
