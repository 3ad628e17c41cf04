r"""The script of the preview page (`data/preview_page.py`): draws it from the page's JSON block.

It has no library. Everything that comes from the data becomes a text node or an attribute, never
markup. When all is drawn, the root element says so: `data-drawn` is "yes", and `data-rows`,
`data-documents`, `data-images`, `data-chips` count what was drawn.
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("preview-data").textContent);
const number = (x) => x.toLocaleString("en-US");
const percent = (x, digits = 1) => (100 * x).toFixed(digits) + "%";
const short = (x) => (Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(3));
const several = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
const times = "\u00a0\u00d7\u00a0";
const SVG = "http://www.w3.org/2000/svg";

// An element; text becomes text nodes. "class" and others are attributes, functions are handlers.
function make(tag, attributes, ...children) {
  const svg = ["svg", "rect", "path", "g"].includes(tag) || attributes?.svg;
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "svg" || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}
// A text of SVG.
const label = (x, y, text, more) => make("text", { svg: 1, x, y, ...more }, text);
const dot = (kind) => make("span", { class: `dot ${kind}-kind` });
const section = (id, title, text, ...children) =>
  make("section", { id }, make("h2", null, title),
    text ? make("p", { class: "soft prose" }, text) : null, ...children);

function table(head, rows) {
  const line = (cells, tag) => make("tr", null, cells.map((cell) => make(tag, null, cell)));
  return make("div", { class: "table" },
    make("table", null, line(head, "th"), rows.map((cells) => line(cells, "td"))));
}

// Numbers

function header() {
  const nav = [["#mixture", "Mixture"], ["#charts", "Distributions"], ["#rows", "Rows"],
    ["#documents", "Documents"]];
  return [make("header", null, make("h1", null, data.title),
    make("p", { class: "soft mono" }, data.command_line.join(" "))),
    make("nav", null, make("div", null, nav.map(([href, text]) => make("a", { href }, text))))];
}

function tiles() {
  const t = data.totals;
  const trained = t.trained_text_tokens + t.trained_image_tokens;
  const tile = (value, text) => make("div", { class: "tile" }, make("b", null, value),
    make("span", null, text));
  return make("div", { class: "grid tiles" },
    tile(number(t.documents), "documents in rows"),
    tile(number(t.rows), `rows of ${number(t.row_length)} tokens`),
    tile(number(t.tokens), "tokens"),
    tile(percent(t.image_tokens / t.tokens), `of tokens are in ${several(t.images, "image")}`),
    tile(percent(trained / t.tokens), "of tokens have a loss"),
    tile(percent(t.padding_share, 2), "of positions are padding"));
}

function problems() {
  if (!data.problems.length) {
    return make("div", { class: "notice good" },
      "\u2713 Tokens, images, size strings and weights fit together in all of these rows.");
  }
  return make("div", { class: "notice bad", role: "alert" },
    make("b", null, "Look at this before training"),
    make("ul", null, data.problems.map((text) => make("li", null, text))));
}

function mixture() {
  const read = data.sources.reduce((sum, s) => sum + (s.read ?? 0), 0);
  const both = (value, fraction) => make("span", null, value,
    make("span", { class: "soft" }, ` ${percent(fraction)}`));
  const sources = table(["source", "documents", "weight", "read"],
    data.sources.map((s) => [s.name, number(s.documents), both(String(s.weight), s.share),
      read ? both(number(s.read), s.read / read) : "\u2013"]));
  const kinds = table(["kind", "documents", "tokens"], data.kinds.map((k) =>
    [make("span", null, dot(k.kind), k.kind), both(number(k.documents), k.document_share),
      both(number(k.tokens), k.token_share)]));
  const card = (title, ...content) => make("div", { class: "card" },
    make("h3", null, title), ...content.filter((child) => child));
  return section("mixture", "Mixture", null,
    make("div", { class: "grid pairs" },
      card("Sources: what was asked for, and what was read", sources, read ? make("p",
        { class: "soft note" }, "More is read than stands in the rows: the rest waits in rows"
          + " that are not full yet.") : null),
      card("Kinds of documents, as measured in the rows", kinds),
      data.skipped.length ? card("Documents skipped so far",
        table(["source", "reason", "documents"], data.skipped.map((s) =>
          [s.source, s.reason.replaceAll("_", " "), number(s.documents)]))) : null),
    make("details", { class: "card", style: "margin-top:.75rem" },
      make("summary", null, "The whole configuration"),
      make("pre", null, JSON.stringify(data.config, null, 2))));
}

// Charts

function ticks(most, count = 4) {
  const rough = Math.max(1, most / count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  return Array.from({ length: Math.ceil(most / step) + 1 }, (_, i) => i * step);
}

function histogram(chart) {
  const [width, height, left, right, top, bottom] = [300, 190, 44, 12, 10, 42];
  const marks = ticks(Math.max(1, ...chart.counts));
  const y = (n) => height - bottom - (n / marks.at(-1)) * (height - top - bottom);
  const bins = chart.counts.length;
  const x = (i) => left + (i / bins) * (width - left - right);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${chart.title}: ${chart.y} over ${chart.x}` });
  for (const n of marks) {
    svg.append(make("path", { class: "axis", d: `M${left} ${y(n)}H${width - right}` }),
      label(left - 6, y(n) + 4, number(n), { "text-anchor": "end" }));
  }
  const whole = chart.edges.every((e, i) => !i || e - chart.edges[i - 1] === 1)
    && chart.x !== "% of the row";
  chart.counts.forEach((n, i) => {
    const [low, high] = [chart.edges[i], chart.edges[i + 1]];
    const range = whole ? number(low) : `${number(low)} to ${number(high)}`;
    const title = make("title", { svg: 1 }, `${range} ${chart.x}: ${number(n)} ${chart.y}`);
    svg.append(make("rect", { class: "bin", x: x(i) + 1, width: Math.max(1, x(1) - x(0) - 2),
      y: y(n), height: y(0) - y(n), rx: 1.5 }, title));
  });
  // Single numbers stand under their bar, ranges have their ends under its sides.
  const every = Math.ceil((bins + 1) / 7);
  for (let i = 0; i < bins + (whole ? 0 : 1); i += every) {
    svg.append(label(x(whole ? i + 0.5 : i), height - bottom + 16, number(chart.edges[i]),
      { "text-anchor": "middle" }));
  }
  svg.append(
    label((left + width - right) / 2, height - 6, chart.x, { "text-anchor": "middle" }),
    label(0, 0, chart.y, { "text-anchor": "middle",
      transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)` }));
  return svg;
}

// A bar to the right for each size, so that many sizes have room for their names.
function sizes(chart) {
  const [width, line, left, right, top, bottom] = [300, 21, 112, 34, 22, 26];
  const bins = chart.counts.length;
  const height = top + Math.max(1, bins) * line + bottom;
  const most = Math.max(1, ...chart.counts);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${chart.title}: ${chart.x} of each ${chart.y}` });
  svg.append(label(0, 11, `${chart.y} (width / height)`));
  chart.labels.forEach((text, i) => {
    const length = (chart.counts[i] / most) * (width - left - right);
    const y = top + i * line;
    const aspect = `${text.replace("x", " \u00d7 ")} (${chart.aspects[i].toFixed(2)})`;
    svg.append(label(0, y + 15, aspect, { class: "value" }),
      make("rect", { class: "bin", x: left, y: y + 3, width: Math.max(1, length),
        height: line - 6, rx: 1.5 }),
      label(left + length + 5, y + 15, number(chart.counts[i])));
  });
  if (!bins) svg.append(label(0, top + 15, "no images", { class: "value" }));
  svg.append(label((left + width - right) / 2, height - 6, chart.x, { "text-anchor": "middle" }));
  return svg;
}

function charts() {
  return section("charts", "Distributions", "Of all rows that were taken, not only of what is"
    + " shown below.", make("div", { class: "grid charts" }, data.charts.map((chart) =>
      make("div", { class: "card" }, make("h3", null, chart.title),
        chart.labels ? sizes(chart) : histogram(chart)))));
}

// Rows

const share = (tokens) => `${(100 * tokens) / data.totals.row_length}%`;
const shade = (segment) => (segment % 2 ? "odd" : "even");

function block(segment, i) {
  const shown = segment.document !== null;
  const images = segment.images.map(([start, length]) => {
    const stripe = make("i", null);
    stripe.style.left = `${(100 * (start - segment.start)) / segment.length}%`;
    stripe.style.width = `${(100 * length) / segment.length}%`;
    return stripe;
  });
  const text = `${segment.kind}, ${several(segment.length, "token")} from position`
    + ` ${number(segment.start)}, ${several(segment.images.length, "image")}`;
  const element = make(shown ? "a" : "span", {
    class: `block ${segment.kind}-kind ${shade(i + 1)}${shown ? "" : " hidden-document"}`,
    href: shown ? `#document-${segment.document}` : null, "data-block": "",
    "aria-label": shown ? `Document ${segment.document + 1}: ${text}` : text,
    "data-tip": shown ? `Document ${segment.document + 1}: ${text}`
      : `${text}. Not among the documents shown below.` }, images);
  element.style.left = share(segment.start);
  element.style.width = share(segment.length);
  return element;
}

function rows() {
  const t = data.totals;
  const item = (swatch, text) => make("span", null, swatch, text);
  const legend = make("div", { class: "legend" },
    data.kinds.map((k) => item(dot(k.kind), k.kind)),
    item(make("span", { class: "swatch hatched" }), "image tokens"),
    item(make("span", { class: "swatch padding" }), "padding"),
    t.documents > data.documents.length
      ? item(make("span", { class: `swatch faded ${data.kinds[0].kind}-kind` }),
        "paler: not shown below") : "");
  const bars = data.rows.map((row) => make("div", { class: "row", id: `row-${row.row}`,
    "data-row": "" }, make("span", { class: "soft" }, `Row ${row.row + 1}`),
    make("div", { class: "bar" }, row.segments.map(block)), make("span", null,
      percent(row.fill))));
  const scale = make("div", { class: "row soft" }, make("span", null, "position"),
    make("div", { class: "scale" }, make("span", null, "0"),
      make("span", null, number(t.row_length / 2)), make("span", null, number(t.row_length))),
    make("span", null, "filled"));
  const more = t.rows > bars.length
    ? make("p", { class: "soft" }, `The first ${number(bars.length)} of ${number(t.rows)} rows.`)
    : null;
  return section("rows", "Rows", "A row is what the model reads at once: several documents side"
    + " by side. Each block is a document, and a click on it leads to it.", legend,
    make("div", { class: "card" }, bars, scale), more);
}

// Documents

function chip(one, i) {
  const weight = Math.max(one.text_weight, one.image_weight);
  const loss = one.text_weight > 0 ? "cross" : one.image_weight > 0 ? "flow" : "zero";
  // What one cannot see is written as a sign: a line end, and a token inside a character.
  const text = one.text === "" ? "\u25cc" : one.text.replaceAll("\n", "\u23ce")
    .replaceAll("\t", "\u21e5");
  const element = make("span", { class: `chip ${one.kind} ${loss}`, "data-chip": i },
    one.kind === "image" ? `image \u00d7 ${number(one.count)}` : text);
  if (weight > 0) element.style.setProperty("--weight", `${100 * Math.min(1, weight)}%`);
  return element;
}

function chipTip(one) {
  const last = one.at + one.count - 1;
  const kinds = { text: "text", special: "special token", size: "size string",
    image: "image tokens" };
  const name = one.spelling ?? JSON.stringify(one.text);
  const weight = (value, name) => `${name} ${value ? short(value) : "0"}`;
  return [[make("b", null, one.text === "" ? "part of a character" : name)],
    [`${kinds[one.kind]}, id ${one.id}`],
    [`position ${number(one.at)}${one.count > 1 ? ` to ${number(last)}` : ""} of the row`],
    [`weight: ${weight(one.text_weight, "cross-entropy")}, `
      + weight(one.image_weight, "flow loss")]];
}

function picture(image, i) {
  const [height, width] = image.size ?? image.grid ?? [1, 1];
  const grid = image.grid ? `${image.grid.join(times)} tokens` : "no grid";
  const role = image.loss ? make("span", { class: "tag" }, "flow loss")
    : make("span", { class: "tag" }, "context only");
  const scale = Math.min(150 / height, 300 / width);
  const frame = make("figure", null);
  if (image.url) {
    frame.append(make("img", { src: image.url, alt: `image ${i + 1}`, width: Math.round(width
      * scale), height: Math.round(height * scale), class: scale > 1 ? "pixels" : null,
      "data-image": "" }));
  } else frame.append(make("p", { class: "soft" }, "image missing"));
  const caption = [image.size ? `${height}${times}${width} pixels, ${grid} ` : `${grid} `, role];
  if (image.mean !== undefined) {
    caption.push(make("div", null, "Stored tokens; brighter is a larger norm. Mean"
      + ` ${short(image.mean)}, deviation ${short(image.std)}, from ${short(image.min)} to`
      + ` ${short(image.max)}.`));
  } else if (image.url && !image.exact) caption.push(" shown as JPEG");
  frame.append(make("figcaption", null, caption));
  return frame;
}

function part(one, document) {
  if (one.image !== undefined) return picture(document.images[one.image], one.image);
  return make("p", { class: "part" + (one.loss ? "" : " context") }, one.text,
    one.loss ? null : make("span", { class: "tag" }, "context only"));
}

// Long content is cut, and a button shows the rest.
function clamp(element, long) {
  if (!long) return [element];
  element.classList.add("clamped");
  const button = make("button", { type: "button", click: () => {
    const cut = element.classList.toggle("clamped");
    button.textContent = cut ? "Show all of it" : "Show less";
  } }, "Show all of it");
  return [element, button];
}

function card(one, i) {
  const chips = make("div", { class: "chips", "data-document-chips": i }, one.chips.map(chip));
  const parts = make("div", { class: "parts" }, one.parts.map((p) => part(p, one)));
  const length = one.parts.reduce((sum, p) => sum + (p.text ?? "").length, 0);
  return make("article", { class: `card document ${one.kind}-kind`, id: `document-${i}`,
    "data-document": "" },
    make("div", { class: "title" }, make("b", null, `Document ${i + 1}`),
      make("span", null, dot(one.kind), one.kind),
      make("span", { class: "soft" }, several(one.length, "token")),
      make("a", { href: `#row-${one.row}` }, `row ${one.row + 1}, segment ${one.segment}`),
      one.ends ? null : make("span", { class: "tag" }, "cut here, goes on elsewhere"),
      one.id ? make("span", { class: "soft mono" }, one.id) : null),
    clamp(parts, length > 1500), clamp(chips, one.chips.length > 260));
}

function documents() {
  const sample = (text, kind, loss, weight = "100%") => {
    const element = make("span", { class: `chip ${kind} ${loss}` }, text);
    element.style.setProperty("--weight", weight);
    return element;
  };
  const item = (...parts) => make("span", null, ...parts);
  const legend = make("div", { class: "legend" },
    item(sample("word", "text", ""), "text"),
    item(sample("boi", "special", ""), "special token"),
    item(sample("4*4", "size", ""), "size of the image"),
    item(sample("image \u00d7 16", "image", ""), "tokens of an image"),
    item(sample("word", "text", "cross"), "cross-entropy is taken"),
    item(sample("image", "image", "flow"), "flow loss is taken"),
    item(sample("word", "text", "zero"), "weight 0: context only"));
  const count = data.documents.length;
  return section("documents", "Documents", `The first ${number(count)} of`
    + ` ${number(data.totals.documents)} documents: text and images in the order in which the`
    + " model reads them, then its tokens. Point at a token, or tap it, for its position, id and"
    + " weights.", legend, data.documents.map(card));
}

// The box with details

function details() {
  const tip = make("div", { id: "tip", role: "status", hidden: "" });
  let marked = null;
  const content = (target) => {
    if (target.dataset.tip !== undefined) return [[target.dataset.tip]];
    const chips = data.documents[target.parentElement.dataset.documentChips].chips;
    return chipTip(chips[target.dataset.chip]);
  };
  const show = (target) => {
    marked?.classList.remove("on");
    marked = target;
    tip.hidden = !target;
    if (!target) return;
    target.classList.add("on");
    tip.replaceChildren(...content(target).map((line) => make("div", null, ...line)));
    const [box, own] = [target.getBoundingClientRect(), tip.getBoundingClientRect()];
    const left = Math.min(box.left, innerWidth - own.width - 8);
    const above = box.top - own.height - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
  };
  const find = (event) => event.target.closest?.("[data-document-chips] .chip, .block") ?? null;
  addEventListener("pointerover", (event) => show(find(event)));
  addEventListener("click", (event) => show(find(event)));
  addEventListener("focusin", (event) => show(find(event)));
  addEventListener("scroll", () => show(null), { passive: true });
  return tip;
}

const footer = make("footer", { class: "soft" }, "The numbers of this page are in it as JSON:"
  + " the script element with the id preview-data.");
document.title = data.title;
document.body.append(...header(), make("main", null, tiles(), problems(), mixture(), charts(),
  rows(), documents(), footer), details());
const drawn = { rows: "row", documents: "document", images: "image", chips: "chip" };
for (const [name, mark] of Object.entries(drawn)) {
  document.documentElement.dataset[name] = document.querySelectorAll(`[data-${mark}]`).length;
}
document.documentElement.dataset.drawn = "yes";
"""
