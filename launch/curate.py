r"""Curates a data set: rates every document once, then chooses among them as often as you like.

Examples:
    python launch/curate.py --config=configs/curate_images.py:folder:photos --out=photos.scored
    python launch/curate.py --config=configs/curate_images.py --select=photos.scored --out=good.rec
    python launch/curate.py --config=configs/curate_images.py --select=photos.scored \
        --out=sharp.rec --rule=clarity=200: --rule=clip_aesthetic/aesthetic=5:10
    python launch/curate.py --config=configs/curate_edits.py:tars:edits --out=edits.scored
    python launch/curate.py --config=configs/curate_images.py:records:web.rec --out=web.scored \
        --ray_address=auto

The first form scores: it measures, finds near-duplicates over the whole set, runs models and
recaptions, as the config's stages say. Scores are kept in the documents; only what cannot be
decoded is left out, and listed in faults.jsonl. The second applies the config's rules to them and
writes records for training and report.html, a page that shows what was kept and dropped and why.
It reads no more than the documents, so other rules cost no scoring; each --out is a new folder.

Killed and started again, both go on with the shards that are missing, and the result is the same.
Ray runs on this machine, or with --ray_address on a cluster, all of whose machines must see the
source and --out and have this package. It is the extra [curate].
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from nextstep_jax.curation.cluster import Cluster
from nextstep_jax.curation.config import curation_config, selection_config
from nextstep_jax.curation.scoring import score_source
from nextstep_jax.curation.thresholds import REPORT, select_documents
from nextstep_jax.data.source_types import build_source
from nextstep_jax.training.experiment import check_sections, plain
from nextstep_jax.training.logs import run_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE or FILE:SOURCE, see above.")
_OUT = flags.DEFINE_string("out", None, "Folder to make, or to go on with.")
_SELECT = flags.DEFINE_string("select", None, "Scored folder to choose from; without it, score.")
_ADDRESS = flags.DEFINE_string(
    "ray_address", None, "A Ray cluster, such as 'auto' or ray://host:10001; default: this machine."
)
_TASKS = flags.DEFINE_integer(
    "num_tasks", None, "Of this machine: shards that are read at a time; by default one a CPU."
)

_DOCUMENTS = flags.DEFINE_integer("num_documents", None, "Scores the first so many; default: all.")
_RULES = flags.DEFINE_multi_string(
    "rule", [], "SCORE=SMALLEST:LARGEST, either left out for none; instead of the config's."
)

SECTIONS = {"source", "image_size", "documents_per_shard", "stages", "select"}


def where() -> Cluster:
    """The cluster of the flags."""
    return Cluster(_ADDRESS.value, _TASKS.value)


def read_rules(texts: list[str]) -> dict[str, tuple[float | None, float | None]]:
    """The rules of --rule.

    Raises:
        ValueError: One is not of the form SCORE=SMALLEST:LARGEST.
    """
    rules = {}
    for text in texts:
        name, equals, limits = text.rpartition("=")
        ends = limits.split(":")
        try:
            smallest, largest = (float(end) if end.strip() else None for end in ends)
        except ValueError as error:
            raise ValueError(f"--rule={text} must be like clarity=50: or aspect=1:3") from error
        if not equals or not name:
            raise ValueError(f"--rule={text} must be like clarity=50: or aspect=1:3")
        rules[name] = (smallest, largest)
    return rules


def score(config: dict, out: pathlib.Path) -> str:
    """Scores the source of a config; returns what to say about it."""
    values = dict(config["source"])
    if "root" in values:
        # Workers of Ray may run in another folder.
        values["root"] = os.path.abspath(values["root"])
    source = build_source(values, config["image_size"])
    stages = curation_config(config["stages"], documents_per_shard=config["documents_per_shard"])
    summary = score_source(
        source, stages, out, where(), num_documents=_DOCUMENTS.value, progress=True
    )
    faults = ", ".join(f"{reason} {number}" for reason, number in summary["faults"].items())
    unusable = f"; could not be used: {faults}" if faults else ""
    return f"scored {summary['written']} of {summary['documents']} documents{unusable}"


def select(config: dict, scored: pathlib.Path, out: pathlib.Path) -> str:
    """Chooses among scored documents; returns what to say about it."""
    values = config["select"]
    rules = selection_config({**values, "rules": {**values["rules"], **read_rules(_RULES.value)}})
    tally = select_documents(scored, rules, out, where(), progress=True)
    dropped = ", ".join(f"{name} {number}" for name, number in tally["first"].items())
    why = f"; dropped by {dropped}" if dropped else ""
    return f"kept {tally['kept']} of {tally['documents']} documents{why}; see {out / REPORT}"


def main(argv: list[str]) -> None:
    """Scores or selects, as the flags say."""
    del argv
    config = plain(_CONFIG.value)
    check_sections(config, SECTIONS)
    out = pathlib.Path(_OUT.value)
    if _SELECT.value is None:
        print(score(config, out))
    else:
        print(select(config, pathlib.Path(_SELECT.value), out))
    print(f"written to {out}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    run_program(main)
