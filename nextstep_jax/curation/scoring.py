"""The scoring pass: every document of a source rated once, nothing dropped but what is broken.

    source -> read, decode, measure      tasks, a shard each
           -> rate by models, recaption  actors, on CPUs or accelerators
           -> write the shard            tasks
    then, with near-duplicates: groups over the whole set, and each shard written once more

All stages run at the same time, each on another shard (Ray Data streams). A shard is a range of
the source's indices, its file a function of source and config alone; those that are whole stay
when a run is killed, and the next one makes the others. Thresholds are applied to the result by
`curation/thresholds.py`, as often as one likes.
"""

import functools
import json
import logging
import pathlib
import shutil
from typing import Any

import tqdm

from nextstep_jax.curation import stages
from nextstep_jax.curation.cluster import LOCAL, Cluster, Shared, run_rows, session
from nextstep_jax.curation.config import CurationConfig, Rating, Recaption
from nextstep_jax.curation.facts import SUMMARY, begin_folder, summarise
from nextstep_jax.curation.grouping import Groups, find_groups, hashes_of
from nextstep_jax.curation.scorers import build_scorer
from nextstep_jax.curation.stages import SCORED
from nextstep_jax.data.record_writer import write_index
from nextstep_jax.data.records import INDEX
from nextstep_jax.data.sources import DocumentSource, source_fingerprint

# Of a process that only waits for an endpoint.
_RECAPTION_CPUS = 0.25
# Blocks of shard numbers whose files are small or few; a task each.
_MAX_BLOCKS = 10_000


def actor_cpus(config: CurationConfig) -> float:
    """CPUs that the actors of a scoring pass reserve, beside its tasks."""
    ratings = config.of_type(Rating).values()
    recaptions = config.of_type(Recaption).values()
    shares = [
        *(stage.num_actors * stage.num_cpus for stage in ratings),
        *(stage.num_actors * _RECAPTION_CPUS for stage in recaptions),
    ]
    return sum(shares, 0.0)


def score_source(
    source: DocumentSource,
    config: CurationConfig,
    out: pathlib.Path,
    cluster: Cluster = LOCAL,
    *,
    num_documents: int | None = None,
    max_tasks: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores a source into a folder of records, or goes on with it.

    Args:
        source: The documents; it is pickled.
        config: What is done.
        out: The folder, seen by all machines.
        cluster: Where it is done; a session of Ray that runs is used.
        num_documents: The first so many of the source; None is all.
        max_tasks: How many shards are read at a time; None is one a CPU.
        progress: Shows a bar.

    Returns:
        The content of `scores.json` (`curation/facts.py`).

    Raises:
        ValueError: There are no documents, the folder is of another source or config, stages do not
            fit together, or the cluster has too few CPUs for the actors.
        OSError: An endpoint gave no captions.
    """
    number = len(source) if num_documents is None else min(num_documents, len(source))
    if number < 1:
        raise ValueError(f"{number} documents: there is nothing to score")
    plan = stages.make_plan(config, pathlib.Path(out).resolve(), number)
    identity = {"source": source_fingerprint(source), "documents": number}
    begin_folder(plan.out, {"pass": "score", **identity, **config.identity()})
    if (plan.out / INDEX).is_file():
        return json.loads((plan.out / SUMMARY).read_text(encoding="utf-8"))
    with session(cluster, actor_cpus(config)) as ray:
        _check_cluster(ray, config)
        with tqdm.tqdm(total=plan.num_documents, unit="doc", disable=not progress) as bar:
            _score_shards(ray, plan, source, max_tasks, bar)
        if plan.duplicates:
            logging.info("grouping near-duplicates")
            _finish_shards(ray, plan, find_groups(ray, plan))
    shutil.rmtree(plan.out / SCORED, ignore_errors=True)
    summary = summarise(plan.out, plan.num_shards, plan.scores)
    made_by = {"pass": "score", **config.identity()}
    if write_index(plan.out, plan.num_shards, made_by) is None:
        raise OSError(f"{plan.out}: shards are missing that were written")
    return summary


def _check_cluster(ray: Any, config: CurationConfig) -> None:
    needed, found = 1 + actor_cpus(config), ray.cluster_resources().get("CPU", 0)
    if found < needed:
        raise ValueError(
            f"the stages need {needed:g} CPUs, one for reading and the others for actors; Ray has"
            f" {found:g}. Take fewer actors or a smaller num_cpus of theirs"
        )


def _score_shards(
    ray: Any, plan: stages.Plan, source: DocumentSource, max_tasks: int | None, bar: Any
) -> None:
    """Makes the shards that are not there."""
    done = [
        plan.path(shard, scored=False).is_file() or plan.path(shard, scored=True).is_file()
        for shard in range(plan.num_shards)
    ]
    missing = [shard for shard in range(plan.num_shards) if not done[shard]]
    if len(missing) < plan.num_shards:
        kept = plan.num_shards - len(missing)
        logging.info("%d of %d shards are there already", kept, plan.num_shards)
        bar.update(sum(len(plan.indices(shard)) for shard in range(plan.num_shards) if done[shard]))
    if not missing:
        return
    plan.path(missing[0], scored=True).parent.mkdir(exist_ok=True)
    # The number of the task stands for the shard, so that the driver holds a list of numbers.
    read = functools.partial(_read, plan=plan, source=Shared(ray, source), shards=missing)
    whole = {"batch_size": None, "batch_format": "pyarrow"}
    dataset = ray.data.range(len(missing), override_num_blocks=len(missing))
    dataset = dataset.map_batches(read, num_cpus=1, concurrency=max_tasks, **whole)
    for stage in plan.config.stages.values():
        if isinstance(stage, Rating):
            actor, arguments, resources = stages.RatingActor, (stage,), _resources(ray, stage)
            most = stage.max_actors or stage.num_actors
        elif isinstance(stage, Recaption):
            cache = pathlib.Path(stage.cache or plan.out / "captions").resolve()
            actor, arguments = stages.RecaptionActor, (stage, cache)
            most, resources = stage.num_actors, {"num_cpus": _RECAPTION_CPUS}
        else:
            continue
        pool = ray.data.ActorPoolStrategy(min_size=stage.num_actors, max_size=most)
        dataset = dataset.map_batches(
            actor, fn_constructor_args=arguments, compute=pool, **resources, **whole
        )
    write = functools.partial(stages.write_shard, plan=plan)
    dataset = dataset.map_batches(write, num_cpus=1, concurrency=max_tasks, **whole)
    run_rows(dataset, lambda row: bar.update(row["read"]))


def _read(table: Any, *, plan: stages.Plan, source: Shared, shards: list[int]) -> Any:
    (number,) = table["id"].to_pylist()
    return stages.measured_shard(source.value, plan, shards[number])


def _resources(ray: Any, stage: Rating) -> dict[str, Any]:
    """What an actor of a scorer reserves."""
    num_gpus = stage.num_gpus
    if num_gpus is None:
        wanted = build_scorer(stage.scorer).accelerator and not stage.resources
        num_gpus = 1.0 if wanted and ray.cluster_resources().get("GPU") else 0.0
        if wanted and not num_gpus:
            logging.warning("Ray has no GPU: scorer %s runs on CPUs", stage.scorer["scorer"])
    resources = {"num_cpus": stage.num_cpus, "num_gpus": num_gpus}
    return {**resources, "resources": dict(stage.resources)} if stage.resources else resources


def _finish_shards(ray: Any, plan: stages.Plan, groups: Groups) -> None:
    """Writes the groups into the documents."""
    finish = functools.partial(_finish, plan=plan, groups=Shared(ray, groups))
    blocks = min(plan.num_shards, _MAX_BLOCKS)
    dataset = ray.data.range(plan.num_shards, override_num_blocks=blocks)
    dataset = dataset.map_batches(finish, batch_size=None, batch_format="numpy")
    run_rows(dataset, lambda row: None)


def _finish(batch: dict[str, Any], *, plan: stages.Plan, groups: Shared) -> dict[str, Any]:
    for shard in batch["id"]:
        indices, hashes, _ = hashes_of(plan, int(shard))
        stages.finish_shard(int(shard), plan, groups.value.of(hashes, indices))
    return batch
