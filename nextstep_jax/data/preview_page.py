r"""One self-contained HTML page from what `data/preview.py` has read.

The page holds the numbers as a JSON block, and a script that draws them; it opens from a file,
asks nothing of any network, and is light or dark as the reader's system is. Text of documents
reaches it as text nodes only, and a policy lets no script run but the page's own.

Words: a chip is what the page shows of one token, or of the tokens of an image; a block is a
document's piece of the bar of a row.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nextstep_jax.data.preview_script import SCRIPT

DATA_ID = "preview-data"
"""The id of the script element that holds the JSON."""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1b1b1a; --soft: #63625e; --line: #dddcd7;
  --empty: #e3e2dd; --link: #1f5fae;
  --text: #2f74c8; --pair: #15936a; --edit: #c77700; --interleaved: #7a4fc4; --unknown: #777777;
  --cross: #c2185b; --flow: #007f93;
  --chip: #eceae4; --special: #e4dbf5; --size: #fbe6c2; --image: #c9e8ec; --stripe: #a9d6dc;
  --bad: #b3261e; --bad-page: #fdecea; --good: #15734f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161615; --card: #20201f; --ink: #f1f0ec; --soft: #a9a8a2; --line: #3a3a37;
    --empty: #343432; --link: #8dbcf5;
    --text: #4b93e6; --pair: #22a87c; --edit: #d98a1c; --interleaved: #9a78e0; --unknown: #999999;
    --cross: #ff74a8; --flow: #3cc5d8;
    --chip: #333330; --special: #43365f; --size: #57431b; --image: #154b54;
    --stripe: #1f6672; --bad: #ff8a80; --bad-page: #3d1f1d; --good: #5bd0a2;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, nav > div { max-width: 1280px; margin-inline: auto; padding-inline: 1rem; }
header { padding-top: 1.5rem; }
h1 { overflow-wrap: anywhere; font-size: 1.6rem; line-height: 1.2; margin-block: 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .25rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 .75rem; }
.soft { color: var(--soft); }
.prose { max-width: 46rem; }
a { color: var(--link); }
code, pre, .mono { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86em; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; max-height: 24rem; overflow: auto; margin: .5rem 0 0; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page);
  border-bottom: 1px solid var(--line); margin-top: .75rem; }
nav > div { display: flex; gap: .25rem 1.25rem; overflow-x: auto; padding-block: .5rem; }
header p { margin-bottom: 0; }
nav a { text-decoration: none; white-space: nowrap; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .9rem 1rem; min-width: 0; }
.grid { display: grid; gap: .75rem; margin-top: .75rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.tile { padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.4rem; line-height: 1.25; font-weight: 650; }
.tile span { color: var(--soft); font-size: .85rem; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 16.5rem), 1fr)); }
.notice { border-radius: 10px; padding: .6rem 1rem; margin-top: .75rem; border: 1px solid; }
.notice.good { color: var(--good); background: var(--card); }
.notice.bad { color: var(--bad); background: var(--bad-page); }
.notice ul { margin: .25rem 0 0; padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th, td { text-align: right; padding: .25rem 0 .25rem .6rem; border-top: 1px solid var(--line); }
tr:first-child > th { border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td > span { white-space: nowrap; }
td .soft { display: inline-block; min-width: 3.6rem; padding-left: .4rem; }
.table { overflow-x: auto; }
.note { font-size: .85rem; margin: .5rem 0 0; }
svg { display: block; width: 100%; height: auto; max-width: 26rem; }
svg text { fill: var(--soft); font-size: 11.5px; }
svg .value { fill: var(--ink); }
svg .bin { fill: var(--text); }
svg .axis { stroke: var(--line); stroke-width: 1; fill: none; }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 3px; margin-right: .4em;
  background: var(--kind); }
.text-kind { --kind: var(--text); } .pair-kind { --kind: var(--pair); }
.edit-kind { --kind: var(--edit); } .interleaved-kind { --kind: var(--interleaved); }
.unknown-kind { --kind: var(--unknown); }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; align-items: center;
  font-size: .88rem; margin: .5rem 0; }
.legend > span { display: inline-flex; align-items: center; gap: .4rem; }
.legend .dot { margin: 0; }
.row { display: grid; grid-template-columns: 3.6rem 1fr 3.2rem; gap: .5rem; align-items: center;
  margin: 5px 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
.row > :last-child { text-align: right; }
.bar, .swatch.padding { background: var(--empty); }
.bar { position: relative; height: 30px; border-radius: 4px; overflow: hidden; }
.block { position: absolute; top: 0; bottom: 0; background: var(--kind); overflow: hidden;
  border-right: 2px solid var(--card); }
.block.even { background: color-mix(in srgb, var(--kind) 76%, var(--card)); }
a.block:hover, a.block:focus-visible { filter: brightness(1.15); outline: 2px solid var(--ink);
  outline-offset: -2px; }
.block i, .swatch.hatched {
  background: repeating-linear-gradient(45deg, #0007 0 3px, #0003 3px 6px); }
.block i { position: absolute; top: 0; bottom: 0; }
.block.hidden-document { opacity: .4; }
.swatch { width: 1.6rem; height: .95rem; border-radius: 3px; }
.swatch.hatched { background-color: var(--pair); }
.swatch.faded { background: var(--kind); opacity: .4; }
.scale { display: flex; justify-content: space-between; font-size: .8rem; }
.document { margin-top: .75rem; border-left: 5px solid var(--kind); }
.document:target { outline: 3px solid var(--kind); }
.title { display: flex; flex-wrap: wrap; gap: 0 .9rem; align-items: baseline; }
.title b { font-size: 1.02rem; }
.parts { display: flex; flex-wrap: wrap; gap: .75rem 1rem; margin: .6rem 0; align-items: start; }
.part { flex: 0 1 auto; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  max-width: 46rem; }
.context { color: var(--soft); }
.tag { display: inline-block; font-size: .78rem; border: 1px solid var(--line);
  border-radius: 99px; padding: 0 .5em; color: var(--soft); white-space: nowrap; }
figure { margin: 0; width: min-content; min-width: 9rem; max-width: 100%; }
figure img { display: block; max-width: calc(100vw - 5rem); height: auto; border-radius: 6px;
  border: 1px solid var(--line); }
figure .pixels { image-rendering: pixelated; }
figcaption { font-size: .8rem; color: var(--soft); margin-top: .2rem; }
.chips { display: flex; flex-wrap: wrap; gap: 5px 2px; margin-top: .5rem; }
.chip { display: inline-block; max-width: 100%; white-space: pre; overflow: hidden;
  text-overflow: ellipsis; padding: 1px 4px;
  border-radius: 4px 4px 0 0; background: var(--chip); border-bottom: 3px solid transparent;
  font: .82rem/1.35 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.chip.special { background: var(--special); font-weight: 650; }
.chip.size { background: var(--size); }
.chip.image { background: repeating-linear-gradient(45deg, var(--image) 0 5px,
  var(--stripe) 5px 10px); padding-inline: 1.1rem; font-weight: 650; }
.chip.cross { border-bottom-color: color-mix(in srgb, var(--cross) var(--weight), transparent); }
.chip.flow { border-bottom-color: color-mix(in srgb, var(--flow) var(--weight), transparent); }
.chip.zero { opacity: .5; }
.chip.on, .chip:hover { outline: 2px solid var(--ink); opacity: 1; }
.clamped { max-height: 11.5rem; overflow: hidden;
  mask-image: linear-gradient(#000 75%, transparent); }
button { font: inherit; font-size: .85rem; color: var(--link); background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .7rem; margin-top: .4rem; }
#tip { position: fixed; z-index: 3; pointer-events: none; background: var(--ink);
  color: var(--page); border-radius: 8px; padding: .45rem .7rem; font-size: .82rem;
  max-width: min(22rem, calc(100vw - 16px)); line-height: 1.4; overflow-wrap: anywhere; }
#tip b { font-weight: 650; } #tip[hidden] { display: none; }
footer { padding: 1.5rem 0 3rem; }
@media (max-width: 480px) {
  table { font-size: .86rem; }
  th, td { padding-left: .35rem; }
  td .soft { min-width: 3rem; padding-left: .2rem; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>Data preview</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<noscript>This page draws its numbers with a script of its own; please allow it.</noscript>
<script type="application/json" id="{data_id}">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(data: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        data: What `preview.read_batches` answers, with these entries beside it: title,
            command_line (a list of texts), config (what JSON can say), sources
            (`preview.source_table`) and skipped (`preview.skipped_documents`).

    Raises:
        ValueError: A number is not finite.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    parts = {"style": _STYLE, "data_id": DATA_ID, "data": escape_json(data), "script": SCRIPT}
    return _PAGE.format(digest=digest, **parts)


def escape_json(data: Any) -> str:
    """JSON that can stand inside a script element: no character of it can close the element.

    Raises:
        ValueError: A number is not finite, which JSON cannot say.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
