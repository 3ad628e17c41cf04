"""The report of a selection: one HTML file, for a look at what was kept and what was dropped.

Kept and dropped for each rule, a histogram of every score with its limits drawn in, pictures that
were kept and pictures that each rule dropped, and why documents could not be used at all. The
words of documents are data of strangers: they are escaped, and nothing in the page is a script.

Words: x and y are in the units of a histogram's viewBox, y downwards.
"""

import base64
import html
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from nextstep_jax.curation.config import DUPLICATES_RULE, SelectionConfig
from nextstep_jax.curation.facts import FAULTS
from nextstep_jax.curation.findings import findings_of
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.images import pixels_of
from nextstep_jax.data.record_writer import write_text
from nextstep_jax.data.records import RecordSource
from nextstep_jax.data.schema import Document, Image, Text

_THUMBNAIL = 144
_JPEG_QUALITY = 82
_MAX_WORDS = 120
_MAX_FAULTS = 20
_PLOT = (400.0, 110.0)

_STYLE = """
:root { --ink:#1d2430; --soft:#667085; --line:#e4e7ec; --paper:#fff; --ground:#f5f6f8;
  --kept:#2f7d5b; --dropped:#d9dde4; --limit:#c2410c; --lost:#b42318; }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:32px 24px 64px; }
h1 { font-size:26px; margin:0 0 4px; letter-spacing:-.01em; }
h2 { font-size:18px; margin:36px 0 12px; }
h3 { font-size:14px; margin:0; font-weight:600; }
p { margin:0; } .soft { color:var(--soft); font-size:13px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(170px,1fr)); gap:12px;
  margin-top:20px; }
.card { background:var(--paper); border:1px solid var(--line); border-radius:10px;
  padding:14px 16px; }
.card b { display:block; font-size:24px; font-variant-numeric:tabular-nums; line-height:1.25; }
table { width:100%; border-collapse:collapse; background:var(--paper); overflow:hidden;
  border:1px solid var(--line); border-radius:10px; border-spacing:0; }
th,td { padding:8px 14px; text-align:left; border-top:1px solid var(--line); }
thead th { border-top:0; font-size:12px; color:var(--soft); font-weight:600; }
td.n,th.n { text-align:right; font-variant-numeric:tabular-nums; }
td.bar { width:26%; } .bar i { display:block; height:8px; border-radius:4px;
  background:var(--kept); } .bar i.lost { background:var(--lost); }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(340px,1fr)); gap:12px; }
.plots svg { width:100%; height:auto; display:block; margin-top:8px; }
.head { display:flex; justify-content:space-between; align-items:baseline; gap:12px; }
.key span { margin-right:14px; } .key i { display:inline-block; width:10px; height:10px;
  border-radius:2px; margin-right:5px; vertical-align:-1px; }
.examples { display:grid; grid-template-columns:repeat(auto-fill,minmax(118px,1fr)); gap:12px;
  margin:10px 0 22px; }
figure { margin:0; background:var(--paper); border:1px solid var(--line); border-radius:10px;
  overflow:hidden; }
.images { display:flex; gap:2px; background:#eceff3; height:128px; align-items:center;
  justify-content:center; } .images img { min-width:0; max-width:100%; max-height:128px;
  object-fit:contain; flex:0 1 auto; }
figcaption { padding:8px 10px; font-size:12px; line-height:1.4; overflow-wrap:anywhere; }
figcaption .why { color:var(--limit); font-weight:600; display:block; }
code { font-family:ui-monospace,"DejaVu Sans Mono",monospace; font-size:12px; }
"""


def write_report(
    path: pathlib.Path,
    scored: pathlib.Path,
    source: RecordSource,
    config: SelectionConfig,
    summary: Mapping[str, Any],
    tally: Mapping[str, Any],
) -> None:
    """Writes the page of a selection.

    Args:
        path: The file; it is whole or not there.
        scored: The folder of the scored records, with its list of faults.
        source: The records in it, for the examples.
        config: The rules.
        summary: The content of `scores.json`.
        tally: See `thresholds.joined`.
    """
    rules = rule_names(config)
    blocks = [
        _cards(summary, tally),
        "<h2>Rules</h2>",
        _rule_table(rules, config, tally),
        "<h2>Scores</h2>",
        _legend(),
        '<div class="plots">',
        *(_plot(name, summary, config, tally) for name in summary["scores"]),
        "</div>",
        "<h2>Examples</h2>",
        _examples("Kept", "kept", source, config, tally),
        *(_examples(f"Dropped by {name}", name, source, config, tally) for name in rules),
        "<h2>Documents that could not be used</h2>",
        _faults(summary, scored),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Curation report</title><style>{_STYLE}</style></head><body><main>"
        "<h1>Curation report</h1>"
        f'<p class="soft">Scored documents of {_text(scored.name)},'
        f" selected into {_text(path.parent.name)}</p>"
        + "\n".join(blocks)
        + "</main></body></html>\n"
    )
    write_text(path, page)


def rule_names(config: SelectionConfig) -> list[str]:
    """The rules of a selection in the order in which they are asked."""
    return [*config.rules, *([DUPLICATES_RULE] if config.drop_duplicates else [])]


def number_text(value: float) -> str:
    """A number as a reader wants it: 12,345 or 0.0123."""
    if value == 0 or 1000 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _text(words: str) -> str:
    return html.escape(words, quote=True)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"


def _limits_text(limits: Sequence[float | None]) -> str:
    smallest, largest = limits
    if smallest is None and largest is None:
        return "any"
    if largest is None:
        return f"at least {number_text(smallest)}"
    if smallest is None:
        return f"at most {number_text(largest)}"
    return f"{number_text(smallest)} to {number_text(largest)}"


def _cards(summary: Mapping[str, Any], tally: Mapping[str, Any]) -> str:
    total, kept = tally["documents"], tally["kept"]
    unusable = sum(summary["faults"].values())
    cards = [
        ("read", summary["documents"], "documents of the source"),
        ("could not be used", unusable, _percent(unusable, summary["documents"])),
        ("scored", total, "seen by the rules"),
        ("dropped", total - kept, _percent(total - kept, total)),
        ("kept", kept, _percent(kept, total)),
    ]
    if summary["without_caption"]:
        cards.append(("without new caption", summary["without_caption"], "the endpoint gave none"))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span class="soft">{name}</span><b>{number:,}</b>'
            f'<span class="soft">{note}</span></div>'
            for name, number, note in cards
        )
        + "</div>"
    )


def _rule_table(rules: Sequence[str], config: SelectionConfig, tally: Mapping[str, Any]) -> str:
    total = tally["documents"]
    if not rules:
        return '<p class="soft">No rules: everything is kept. The histograms help to choose.</p>'
    rows = []
    for name in rules:
        limits = "the best left of each group" if name not in config.rules else None
        limits = limits or _limits_text(config.rules[name])
        first, failed = tally["first"].get(name, 0), tally["failed"].get(name, 0)
        share = 100 * failed / total if total else 0
        missing = tally["missing"].get(name, 0)
        rows.append(
            f"<tr><td><code>{_text(name)}</code></td><td>{limits}</td>"
            f'<td class="n">{first:,}</td><td class="n">{failed:,}</td>'
            f'<td class="n">{_percent(failed, total)}</td><td class="n">{missing:,}</td>'
            f'<td class="bar"><i class="lost" style="width:{share:.2f}%"></i></td></tr>'
        )
    kept = tally["kept"]
    share = 100 * kept / total if total else 0
    rows.append(
        f'<tr><td><b>kept</b></td><td>by all rules</td><td class="n">{kept:,}</td><td></td>'
        f'<td class="n">{_percent(kept, total)}</td><td></td>'
        f'<td class="bar"><i style="width:{share:.2f}%"></i></td></tr>'
    )
    return (
        '<table><thead><tr><th>rule</th><th>keeps</th><th class="n">dropped first by it</th>'
        '<th class="n">fail it in total</th><th class="n">share</th>'
        '<th class="n">without score</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        '<p class="soft" style="margin-top:8px">A document counts as dropped first'
        " by the uppermost rule that it fails,"
        f" so these add up to the {total - kept:,} dropped. Without the score of a rule documents"
        f" are {'kept' if config.missing == 'keep' else 'dropped'}.</p>"
    )


def _legend() -> str:
    return (
        '<p class="soft key"><span><i style="background:var(--kept)"></i>kept</span>'
        '<span><i style="background:var(--dropped)"></i>dropped by any rule</span>'
        '<span><i style="background:var(--limit)"></i>limit of the rule</span>'
        "The first and last bar take what is beyond them.</p>"
        '<p class="soft" style="margin-bottom:10px"></p>'
    )


def _plot(
    name: str, summary: Mapping[str, Any], config: SelectionConfig, tally: Mapping[str, Any]
) -> str:
    """The histogram of a score, with the limits of its rule."""
    found = summary["scores"][name]
    head = f'<div class="head"><h3><code>{_text(name)}</code></h3>'
    if not found["count"] or name not in tally["histograms"]:
        return f'<div class="card">{head}</div><p class="soft">no document has it</p></div>'
    spread = " to ".join(number_text(found[end]) for end in ("min", "max"))
    note = f"{found['count']:,} scored, {spread}, mean {number_text(found['mean'])}"
    limits = [n for n in config.rules.get(name, ()) if n is not None]
    svg = _histogram(found["edges"], tally["histograms"][name], limits)
    return f'<div class="card">{head}<span class="soft">{note}</span></div>{svg}</div>'


def _histogram(
    edges: Sequence[float], counts: Mapping[str, Sequence[int]], limits: Sequence[float]
) -> str:
    width, height = _PLOT
    number = len(edges) - 1
    step, most = width / number, max(1, *counts["all"])
    marks = []
    for part, colour in (("all", "--dropped"), ("kept", "--kept")):
        for i, count in enumerate(counts[part]):
            if count:
                tall = max(1.5, height * count / most)
                marks.append(
                    f'<rect x="{i * step + 0.75:.2f}" y="{height - tall:.2f}"'
                    f' width="{step - 1.5:.2f}" height="{tall:.2f}" rx="1" fill="var({colour})"/>'
                )
    for limit in limits:
        # Bars are of equal width, whatever their edges are.
        x = float(np.interp(limit, edges, np.arange(number + 1))) * step
        anchor, shift = ("end", -5) if x > width / 2 else ("start", 5)
        marks.append(
            f'<line x1="{x:.2f}" x2="{x:.2f}" y1="-12" y2="{height}" stroke="var(--limit)"'
            ' stroke-width="1.5" stroke-dasharray="4 3"/>'
            f'<text x="{x + shift:.2f}" y="-4" text-anchor="{anchor}" font-size="11"'
            f' fill="var(--limit)">{number_text(limit)}</text>'
        )
    ticks = []
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = edges[round(share * number)]
        ticks.append(
            f'<text x="{share * width:.1f}" y="{height + 16}" text-anchor="{anchor}"'
            f' font-size="11" fill="var(--soft)">{number_text(value)}</text>'
        )
    return (
        f'<svg viewBox="-2 -16 {width + 4:g} {height + 36:g}" role="img">'
        + "".join(marks)
        + f'<line x1="0" x2="{width:g}" y1="{height}" y2="{height}" stroke="var(--line)"/>'
        + "".join(ticks)
        + "</svg>"
    )


def _examples(
    title: str,
    name: str,
    source: RecordSource,
    config: SelectionConfig,
    tally: Mapping[str, Any],
) -> str:
    chosen = tally["examples"].get(name, [])
    number = tally["kept"] if name == "kept" else tally["failed"].get(name, 0)
    head = (
        f'<div class="head"><h3>{_text(title)}</h3>'
        f'<span class="soft">{len(chosen)} of {number:,}</span></div>'
    )
    figures = "".join(_figure(source[index], name, config) for _, index in chosen)
    return f'{head}<div class="examples">{figures}</div>'


def _figure(document: Document, rule: str, config: SelectionConfig) -> str:
    found = findings_of(document)
    scores = found.scores
    why = ""
    if rule in config.rules:
        value = number_text(scores[rule]) if rule in scores else "none"
        why = f'<span class="why">{_text(rule)} {value}</span>'
    elif rule == DUPLICATES_RULE and found.duplicates is not None:
        why = f'<span class="why">of group {found.duplicates.group}</span>'
    words = " / ".join(part.text for part in document.parts if isinstance(part, Text))
    words = words if len(words) <= _MAX_WORDS else words[: _MAX_WORDS - 1] + "\u2026"
    pictures = "".join(_thumbnail(image) for image in document.images)
    return (
        f'<figure><div class="images">{pictures}</div><figcaption>{why}{_text(words)}'
        f'<div class="soft">{_text(document.id)}</div></figcaption></figure>'
    )


def _thumbnail(image: Image) -> str:
    try:
        picture = PIL.Image.fromarray(pixels_of(image))
    except DocumentError:
        return ""
    # Small pictures are enlarged as they are, so that one sees what there is to see.
    scale = _THUMBNAIL / max(picture.size)
    if scale > 1:
        factor = math.floor(scale)
        picture = picture.resize(
            (factor * picture.width, factor * picture.height), PIL.Image.Resampling.NEAREST
        )
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def _faults(summary: Mapping[str, Any], scored: pathlib.Path) -> str:
    if not summary["faults"]:
        return '<p class="soft">None.</p>'
    rows = "".join(
        f'<tr><td><code>{_text(reason)}</code></td><td class="n">{number:,}</td></tr>'
        for reason, number in sorted(summary["faults"].items(), key=lambda item: -item[1])
    )
    with (scored / FAULTS).open(encoding="utf-8") as file:
        first = [json.loads(line) for _, line in zip(range(_MAX_FAULTS), file, strict=False)]
    listed = "".join(
        f'<tr><td class="n">{fault["index"]}</td><td><code>{_text(fault["reason"])}</code></td>'
        f"<td>{_text(fault['message'])}</td></tr>"
        for fault in first
    )
    return (
        f'<table style="max-width:420px"><thead><tr><th>reason</th><th class="n">documents</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="soft" style="margin:14px 0 6px">The first {len(first)}; all of them are in'
        f" {FAULTS} of the scored folder.</p>"
        '<table><thead><tr><th class="n">index</th><th>reason</th><th>message</th></tr></thead>'
        f"<tbody>{listed}</tbody></table>"
    )
