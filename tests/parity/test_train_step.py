"""The trainer's step beside the same step in PyTorch: losses and gradient norms of three steps.

Float32, packed rows of several documents with padding at their ends, weights that leave nothing
out, and per step the same times and noises.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from launch import benchmark
from nextstep_jax.evaluation import torch_train, train_speed
from nextstep_jax.models.config import DecoderConfig, FlowHeadConfig
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.pretrain import LossConfig
from tests import tiny_model

pytestmark = pytest.mark.parity

NUM_STEPS = 3
PADDING = 5
# Warm-up, and a norm that the gradients are clipped to; the rate is high, so that a wrong update
# shows in the next loss.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, clip_norm=0.5, weight_decay=0.3)
# Both losses count about as much, so that neither hides the other.
LOSS = LossConfig(text_weight=0.5)
# Relative. Measured: losses within 1e-7, norms within 3e-7.
BOUND = 1e-5

# The embedding is the LM head too; the benchmark below has a head of its own.
CONFIG = dataclasses.replace(
    tiny_model.CONFIG,
    decoder=dataclasses.replace(tiny_model.CONFIG.decoder, tie_embeddings=True),
    flow_head=FlowHeadConfig(width=24, num_layers=2, frequency_dim=16, mlp_ratio=2.0),
)


def packed(config):
    """Rows with unlike numbers of image tokens, weights that are not all one, and padding."""
    batch = train_speed.packed_rows(config, 2, 64, seed=5)
    batch["text_weights"] *= np.random.default_rng([5]).uniform(0.5, 1.5, (2, 64)).astype("f4")
    batch["image_weights"][1, np.flatnonzero(batch["image_weights"][1])[:2]] = 0
    batch["image_weights"][0] *= 0.5
    for name, value in {"token_ids": config.pad_id, "segment_ids": 0, "positions": 0}.items():
        batch[name][:, -PADDING:] = value
    for name in ("text_weights", "image_weights", "kinds", "latents"):
        batch[name][:, -PADDING:] = 0
    assert len(set(np.count_nonzero(batch["image_weights"], axis=1))) == 2
    return batch


@pytest.fixture(scope="module")
def ours():
    """Parameters, batch, and our losses, norms and draws of three steps."""
    batch = packed(CONFIG)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_speed, "_OPTIMIZER", OPTIMIZER)
        patched.setattr(train_speed, "LossConfig", lambda: LOSS)
        setting = train_speed.Setting(CONFIG, rows=2, length=64)
        trainer = train_speed.Trainer(setting, batch)
    shapes = jax.eval_shape(lambda: trainer.state.params)
    params = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding),
        tiny_model.random_tree(shapes, 11),
        trainer.state.params,
    )
    host = jax.tree.map(np.array, params)
    trainer.state = trainer.state.replace(params=params)
    steps, draws = [], []
    for step in range(NUM_STEPS):
        draws.append(train_speed.draws_of_step(trainer.objective, batch, trainer.state.key, step))
        steps.append(trainer.step())
    return host, batch, draws, steps


@pytest.mark.parametrize(
    ("attention", "checkpointing"), [("sdpa", False), ("sdpa", True), ("eager", False)]
)
def test_three_steps(ours, torch, attention, checkpointing):
    """With documents told apart by a mask (sdpa) or by positions in one long row (eager)."""
    params, batch, draws, steps = ours
    more = {"attention": attention, "checkpointing": checkpointing}
    trainer = torch_train.TorchTrainer(
        CONFIG, params, batch, loss=LOSS, optimizer=OPTIMIZER, **more
    )
    assert trainer.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    for number, (draw, mine) in enumerate(zip(draws, steps, strict=True)):
        theirs = trainer.step(draw)
        for name in ("loss", "text_loss", "image_loss", "grad_norm"):
            error = abs(mine[name] / theirs[name] - 1)
            print(f"step {number} {name}: {theirs[name]:.6f}, {error:.1e}")
            assert error <= BOUND, (number, name)
        # Clipping and training do something, so that both are compared.
        assert theirs["grad_norm"] > 2 * OPTIMIZER.clip_norm
    assert abs(steps[2]["loss"] / steps[0]["loss"] - 1) > 1000 * BOUND


def test_benchmark_beside_torch(torch, tmp_path, capsys):
    path = tmp_path / "figures.json"
    # Of tests/evaluation/test_train_speed.py, so that the same step is compiled once.
    sizes = "embed_dim:32,num_layers:2,num_heads:4,num_kv_heads:2,head_dim:8,mlp_dim:48"
    flags = [f"--decoder={sizes}", "--flow_head=width:24,num_layers:1", "--rows=2", "--length=48"]
    flags += ["--repeats=3", "--against=torch", f"--json={path}"]
    threads = torch.get_num_threads()
    try:
        benchmark.main(benchmark.parse_flags(["benchmark", "train", *flags]))
    finally:
        torch.set_num_threads(threads)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == report
    for name in ("loss", "grad_norm"):
        assert report["first_step_difference"][name] < 1e-5
        assert report["torch"]["first_step"][name] > 0
    for name, times in {"ratio": "times_s", "processor_ratio": "processor_s"}.items():
        pairs = zip(report["torch"][times], report["jax"][times], strict=True)
        assert report[name] == sorted(slow / fast for slow, fast in pairs)[1]
    assert report["torch"]["version"] == torch.__version__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": dataclasses.replace(OPTIMIZER, schedule="cosine")}, "optimizer.schedule"),
        ({"optimizer": dataclasses.replace(OPTIMIZER, frozen=("decoder/*",))}, "optimizer.frozen"),
        ({"attention": "xla"}, "torch_attention='xla'; choose from"),
    ],
)
def test_what_torch_does_not_have_is_refused(changes, message):
    check = functools.partial(
        torch_train.check_supported, tiny_model.CONFIG, optimizer=OPTIMIZER, attention="sdpa"
    )
    check()
    with pytest.raises(ValueError, match=message):
        check(**changes)


def test_only_decoders_that_qwen2_can_express():
    decoder = DecoderConfig(qkv_bias=False)
    config = dataclasses.replace(tiny_model.CONFIG, decoder=decoder)
    with pytest.raises(ValueError, match="Qwen2 has biases on queries, keys and values"):
        torch_train.check_supported(config, OPTIMIZER, "sdpa")
