"""Configs of curation: what is refused, in what order stages run, and what a folder depends on."""

import importlib.util
import pathlib
import sys

import pytest

from nextstep_jax.curation import cluster, stages
from nextstep_jax.curation.config import Recaption, curation_config, selection_config
from nextstep_jax.curation.thresholds import group_shards

ROOT = pathlib.Path(__file__).resolve().parents[2]
EDITS = {"type": "scorer", "scorer": {"scorer": "edit_change"}}


def test_stages_run_in_the_order_of_their_kinds():
    config = curation_config(
        {
            "clarity": {"side": 64},
            "zeal": EDITS,
            "ask": {"type": "recaption", "url": "http://localhost/v1", "model": "m"},
            "art": {"type": "scorer", "scorer": {"scorer": "edit_change", "name": "other"}},
            "decode": {},
        }
    )
    assert list(config.stages) == ["decode", "clarity", "art", "zeal", "ask"]
    assert config.stages["clarity"].side == 64
    plan = stages.make_plan(config, ROOT, 1000)
    assert plan.scores == ("clarity", "other/change", "edit_change/change")
    assert plan.num_shards == 4
    assert [len(plan.indices(shard)) for shard in range(4)] == [256, 256, 256, 232]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "decode"),
        ({"clarity": {}}, "decode"),
        ({"decode": {}, "sharpness": {}}, "'sharpness' is none of"),
        ({"decode": {}, "clarity": {"sides": 3}}, r"unknown \['sides'\]; known are \['side'\]"),
        ({"decode": {}, "clarity": {"side": 2}}, "clarity.side=2"),
        ({"decode": {}, "a": {"type": "clarity"}, "clarity": {}}, "2 of type clarity"),
        ({"decode": {}, "duplicates": {"hash": "md5"}}, "hash='md5'; choose from"),
        ({"decode": {}, "x": {"type": "scorer"}}, r"\['scorer'\] must be given"),
        ({"decode": {}, "x": {**EDITS, "num_cpus": 1.0}}, "num_cpus=1.0"),
        ({"decode": {}, "recaption": {"url": "ftp://x", "model": "m"}}, "recaption.url="),
    ],
)
def test_stages_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        curation_config(values)


def test_plans_that_cannot_be():
    with pytest.raises(ValueError, match="stages a and b both give the score"):
        stages.make_plan(curation_config({"decode": {}, "a": EDITS, "b": EDITS}), ROOT, 1)
    with pytest.raises(ValueError, match="keep_best_by='pixels' is none of the scores"):
        stages.make_plan(curation_config({"decode": {}, "duplicates": {}}), ROOT, 1)


@pytest.mark.parametrize("limits", [(3.0, 1.0), 5.0, (1.0,), ("a", None), (float("nan"), None)])
def test_rules_that_cannot_be(limits):
    with pytest.raises(ValueError, match=r"select\.rules\.clarity="):
        selection_config({"rules": {"clarity": limits}})


def test_how_fast_is_not_what():
    def identity(**changes):
        recaption = {"url": "http://a/v1", "model": "m", **changes}
        return curation_config({"decode": {}, "recaption": recaption}).identity()

    assert identity() == identity(url="http://b/v1", concurrency=2, requests_per_minute=9.0)
    assert identity() != identity(prompt="Why?")
    assert Recaption(url="http://a/v1", model="m").api_key_variable is None


def test_shards_are_joined_up_to_a_size():
    assert group_shards([3, 3, 3, 9, 1, 1], 6) == [
        *(range(0, 2), range(2, 3), range(3, 4), range(4, 6)),
    ]
    assert group_shards([], 6) == []


def test_a_missing_ray_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ValueError, match=r"pip install nextstep_jax\[curate\]"),
        cluster.session(cluster.LOCAL),
    ):
        pass


@pytest.mark.parametrize("name", ["curate_images", "curate_edits"])
def test_the_configs_are_whole(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config("shapes:easy").to_dict()
    config = curation_config(values["stages"])
    plan = stages.make_plan(config, ROOT, 1)
    rules = selection_config(values["select"]).rules
    assert set(rules) <= set(plan.scores)
    assert values["source"]["level"] == "easy"
