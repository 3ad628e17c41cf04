import importlib

import pytest

from nextstep_jax.training import experiment
from nextstep_jax.training.optimizer import learning_rate_schedule
from nextstep_jax.training.recipe import stage_config

CONFIGS = ("pretrain_stage1", "pretrain_stage2", "anneal", "sft")
# The columns of Table 1 (arXiv 2508.10711), and the sides of the images' bases.
TABLE_1 = {
    "rate": (1e-4, 1e-5, 1e-5, 1e-5),
    "last_rate": (1e-4, 1e-5, 0.0, 0.0),
    "weight_decay": (0.1, 0.1, 0.1, 0.1),
    "steps": (200_000, 100_000, 20_000, 10_000),
    "warmup": (5000, 5000, 0, 500),
    "length": (16_384, 16_384, 16_384, 8192),
    "tokens": (1.23e12, 0.61e12, 40e9, 5e9),
    "text": (0.2, 0.2, 0.2, 0.0),
    "pair": (0.6, 0.6, 0.6, 0.9),
    "edit": (0.0, 0.0, 0.1, 0.1),
    "interleaved": (0.2, 0.2, 0.1, 0.0),
    "sides": ((256,), (256, 512), (256, 512), (256, 512)),
}


def read(name, argument):
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    return experiment.plain(config)


@pytest.mark.parametrize("number", range(4))
def test_table_1(number):
    want = {name: values[number] for name, values in TABLE_1.items()}
    config = read(CONFIGS[number], "14b")
    loop, data = experiment.build_model_loop(config), experiment.build_data(config)
    loss = experiment._build_loss(config)
    optimizer = loop.optimizer
    assert (loss.text_weight, loss.image_weight) == (0.01, 1.0)
    assert (loop.num_steps, optimizer.num_steps) == (want["steps"], want["steps"])
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (
        want["weight_decay"],
        want["warmup"],
    )
    rate = learning_rate_schedule(optimizer)
    assert float(rate(want["warmup"])) == pytest.approx(want["rate"], rel=1e-6)
    assert float(rate(want["steps"])) == pytest.approx(want["last_rate"], rel=1e-6, abs=1e-12)
    if want["warmup"]:
        assert float(rate(want["warmup"] // 2 - 1)) == pytest.approx(want["rate"] / 2, rel=1e-3)
    assert data.row_length == want["length"]
    tokens = loop.num_steps * data.rows_per_batch * data.row_length
    assert tokens == pytest.approx(want["tokens"], rel=0.02)
    assert data.layout.image_bases == want["sides"]
    first = number == 0
    assert (data.layout.square_only, data.layout.random_crop) == (first, first)
    shares = dict.fromkeys(("text", "pair", "edit", "interleaved"), 0.0)
    for values in config["sources"].values():
        shares[values["kind"]] += values["weight"]
    assert shares == pytest.approx({kind: want[kind] for kind in shares})
    # What Table 1 leaves open, from the released trainer.
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.clip_norm, optimizer.ema_decay, loop.checkpoint_every) == (1.0, 0.0, 2500)


@pytest.mark.parametrize("size", ["tiny", "0.5b", "1.5b", "3b", "7b", "14b"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_is_an_experiment(name, size):
    objective, _ = experiment.build_objective(read(name, size))
    assert objective.model.config == experiment.build_model_config({"size": size})
    assert (objective.model.dtype.name == "float32") == (size == "tiny")


def test_records_of_ones_own(tmp_path):
    sources = read("anneal", f"14b,{tmp_path}")["sources"]
    assert sources == {
        "text": {"type": "records", "root": str(tmp_path / "text"), "weight": 0.2},
        "pair": {"type": "records", "root": str(tmp_path / "pair"), "weight": 0.6},
        "edit": {"type": "records", "root": str(tmp_path / "edit"), "weight": 0.1},
        "interleaved": {"type": "records", "root": str(tmp_path / "interleaved"), "weight": 0.1},
    }
    # A kind that a stage does not have is not asked for.
    assert set(read("sft", f"14b,{tmp_path}")["sources"]) == {"pair", "edit"}


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match=r"model size '15b' is unknown; choose from \['tiny', "):
        stage_config("stage1", "15b")
