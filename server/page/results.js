// An answer as a person reads it: a summary, and a card for each photo.

import { byId, el, many, milliseconds, percent, svg } from "./dom.js";
import { curl, python } from "./snippets.js";
import { FACTS, STAGES, kindly, noted, told } from "./words.js";

const SHOWN = 5; // classes of a card that are open at once
const MOST = 25; // with those that are folded
const CUT = 12; // views shown as pictures
const WORKING = 4; // gram_core.views: the short side that views are cut from, in inputs of the image tower
let urls = [];

/** Show one answer, and say it in a line; `sent` is what was asked, and what is known of the model. */
export function show(answer, sent) {
  clear();
  byId("summary").replaceChildren(summary(answer, sent));
  byId("results").replaceChildren(...answer.results.map((result) => card(result, sent)));
  return byId("summary").querySelector("h2").textContent;
}

export function clear() {
  for (const url of urls) URL.revokeObjectURL(url);
  urls = [];
  byId("notice").replaceChildren();
  byId("summary").replaceChildren();
  byId("results").replaceChildren();
  byId("empty").hidden = true;
}

/** An error, with what to do about it; `again` is offered where asking again may help. */
export function fail({ code, status, message, param, request_id: id, retryable, seconds }, sent, again) {
  clear();
  const [title, advice] = kindly(code, status);
  const place = /^classes\.(\d+)$/.exec(param ?? "");
  const name = place && shortened(sent.classes[Number(place[1])]);
  const more = [
    message?.includes(advice) ? null : advice,
    seconds ? `It asks for ${many(seconds, "second")}.` : null,
  ].filter(Boolean);
  const facts = [code, status ? `status ${status}` : null, param ? `field ${param}` : null, id ? `request ${id}` : null];
  const retry = retryable && el("button", { type: "button" }, "Try again");
  if (retry) retry.addEventListener("click", again);
  byId("notice").replaceChildren(
    el(
      "div",
      { class: "card oops" },
      el("h2", {}, title),
      message ? el("p", {}, message) : null,
      name ? el("p", {}, "It is about \u201c", el("b", {}, name), "\u201d.") : null,
      more.length ? el("p", {}, more.join(" ")) : null,
      el("p", { class: "hint facts" }, facts.filter(Boolean).join(" \u00b7 ")),
      retry,
    ),
  );
}

const shortened = (name) => (name?.length > 80 ? `${name.slice(0, 79)}\u2026` : name);

// ---- summary ----

function summary(answer, sent) {
  const results = answer.results.filter((result) => !result.error);
  const changed = results.filter((result) => result.adaptation.label_changed).length;
  const failed = answer.results.length - results.length;
  const zero = results.filter(({ adaptation }) => !used(adaptation)).length;
  const head =
    `${many(answer.results.length, "photo")}, ${many(answer.class_set.size, "class", "classes")}, ` +
    `${milliseconds(answer.timings_ms.total)}: ${changed ? many(changed, "label") : "no label"} changed`;
  const more = [
    failed ? `${many(failed, "photo")} could not be read` : null,
    zero && zero === results.length ? "Every answer is zero-shot" : zero ? `${zero} kept the zero-shot answer` : null,
    answer.usage.brownout ? "The server is busy and did less than asked" : null,
  ].filter(Boolean);
  return el(
    "div",
    { class: "card summary" },
    el("h2", {}, head),
    more.length ? el("p", { class: "hint" }, `${more.join(". ")}.`) : null,
    timings(answer.timings_ms),
    el("p", { class: "hint facts" }, `${answer.model.name} \u00b7 ${answer.id}`),
    copies(sent.request),
  );
}

const used = ({ accepted, status }) => accepted && status !== "skipped" && status !== "fallback";

function timings(times) {
  const spent = STAGES.map(([stage, word]) => [stage, word, times[stage] ?? 0]).filter(([, , ms]) => ms >= 0.05);
  const sum = spent.reduce((total, [, , ms]) => total + ms, 0) || 1;
  const bar = el("div", { class: "timeline", "aria-hidden": "true" });
  for (const [stage, , ms] of spent) {
    const piece = el("span", { class: `stage ${stage}` });
    piece.style.flexGrow = String(ms / sum);
    bar.append(piece);
  }
  const words = spent.map(([stage, word, ms]) =>
    el("li", {}, el("span", { class: `dot ${stage}`, "aria-hidden": "true" }), `${word} ${milliseconds(ms)}`),
  );
  return el("div", { class: "times" }, bar, el("ul", { "aria-label": "Time by stage" }, ...words));
}

function copies(request) {
  const code = el("code");
  const shown = el("pre", { hidden: true, tabIndex: 0, "aria-label": "Copied text" }, code);
  const said = el("p", { class: "hint", role: "status" });
  const button = (label, text) => {
    const made = el("button", { type: "button" }, label);
    made.addEventListener("click", async () => {
      code.textContent = text;
      shown.hidden = false;
      said.textContent = (await copied(text, code))
        ? "Copied. Run it where the photos lie under these names."
        : "Select the text and copy it. Run it where the photos lie under these names.";
      if (request.keyed) said.textContent += " $API_KEY stands for your key.";
    });
    return made;
  };
  return el(
    "div",
    { class: "copies" },
    el("div", { class: "row" }, button("Copy as curl", curl(request)), button("Copy as Python", python(request))),
    said,
    shown,
  );
}

/** Browsers have a clipboard for pages on localhost or https only; elsewhere the older way may do. */
async function copied(text, node) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(node);
    try {
      return document.execCommand("copy");
    } catch {
      return false;
    }
  }
}

// ---- one photo ----

function card(result, sent) {
  const photo = sent.photos[result.index];
  if (result.error) return broken(result, photo);
  const { adaptation, baseline, explain } = result;
  const picture = new Picture(photo, result, sent.towerSize);
  const changed = adaptation.label_changed;
  return el(
    "li",
    { class: "card result" },
    el("div", { class: "photo" }, picture.figure, el("p", { class: "name hint" }, photo.name)),
    explain && picture.views(explain.views, adaptation),
    el(
      "div",
      { class: "told" },
      el(
        "h3",
        {},
        el("span", { class: "label" }, result.label),
        changed && el("span", { class: "changed" }, "changed, was ", el("b", {}, baseline.label)),
      ),
      el("p", { class: "did" }, told(adaptation, sent.batchFrom)),
      bars(result),
      el(
        "p",
        { class: "hint" },
        uncertainty(adaptation),
        adaptation.ms >= 0.05 && ` \u00b7 tuning took ${milliseconds(adaptation.ms)}`,
        ...result.image.notes.map((note) => ` \u00b7 ${noted(note)}`),
      ),
      explain && why(explain),
    ),
  );
}

function uncertainty(adaptation) {
  const [before, after] = [adaptation.entropy_before.toFixed(2), adaptation.entropy_after.toFixed(2)];
  if (used(adaptation)) return `uncertainty (entropy) ${before} \u2192 ${after} nats`;
  const tried = before === after ? "" : `; tuned it would have been ${after}`;
  return `uncertainty (entropy) ${before} nats${tried}`;
}

function broken(result, photo) {
  const [title] = kindly(result.error.code, 422);
  const { figure } = new Picture(photo, result, 0);
  return el(
    "li",
    { class: "card result oops" },
    el("div", { class: "photo" }, figure, el("p", { class: "name hint" }, photo.name)),
    el(
      "div",
      { class: "told" },
      el("h3", {}, title),
      el("p", {}, result.error.message),
      el("p", { class: "hint facts" }, result.error.code),
    ),
  );
}

/** The classes that either side gives most to; more of them stay folded. */
function bars({ predictions, baseline }) {
  const before = new Map(baseline.predictions.map((p) => [p.class_index, p]));
  const after = new Map(predictions.map((p) => [p.class_index, p]));
  const top = (index) => Math.max(before.get(index)?.score ?? 0, after.get(index)?.score ?? 0);
  const known = [...new Set([...predictions, ...baseline.predictions].map((p) => p.class_index))];
  known.sort((a, b) => top(b) - top(a));
  const first = known.slice(0, SHOWN).sort((a, b) => (after.get(b)?.score ?? 0) - (after.get(a)?.score ?? 0));
  const order = [...first, ...known.slice(SHOWN, MOST)];
  const rows = order.map((index) => {
    const label = (after.get(index) ?? before.get(index)).label;
    return el(
      "li",
      {},
      el("span", { class: "class" }, label),
      el("span", { class: "both" }, bar("before", before.get(index)), bar("after", after.get(index))),
    );
  });
  const key = el(
    "p",
    { class: "key hint", "aria-hidden": "true" },
    el("span", { class: "swatch before" }),
    "before",
    el("span", { class: "swatch after" }),
    "after",
  );
  return el("div", { class: "bars" }, key, el("ul", {}, ...rows.slice(0, SHOWN)), folded(rows.slice(SHOWN)));
}

function folded(rows) {
  if (!rows.length) return null;
  return el("details", {}, el("summary", {}, `${rows.length} more`), el("ul", {}, ...rows));
}

function bar(side, prediction) {
  const fill = el("span", { class: `fill ${side}` });
  fill.style.width = `${100 * (prediction?.score ?? 0)}%`;
  return el(
    "span",
    { class: "line" },
    el("span", { class: "quiet" }, `${side} `),
    el("span", { class: "track" }, fill),
    el("span", { class: "number" }, prediction ? percent(prediction.score) : "\u2013"),
  );
}

function why(explain) {
  const near = explain.prototypes.length
    ? el(
        "div",
        {},
        el("h4", {}, "Nearest prototypes"),
        el("ul", { class: "near" }, ...explain.prototypes.map(prototype)),
      )
    : null;
  const numbers = FACTS.filter(([name]) => explain[name] !== null && explain[name] !== undefined);
  const facts = numbers.length
    ? el(
        "details",
        {},
        el("summary", {}, "The numbers behind it"),
        el("dl", {}, ...numbers.flatMap(([name, word]) => [el("dt", {}, word), el("dd", {}, explain[name].toFixed(4))])),
      )
    : null;
  return near || facts ? el("div", { class: "reasons" }, near, facts) : null;
}

function prototype({ name, weight }) {
  const fill = el("span", { class: "fill near" });
  fill.style.width = `${100 * Math.min(1, weight)}%`;
  return el(
    "li",
    {},
    el("span", { class: "class" }, name),
    el("span", { class: "line" }, el("span", { class: "track" }, fill), el("span", { class: "number" }, percent(weight))),
  );
}

// ---- views ----

/** A photo, and over it the boxes of its views. */
class Picture {
  constructor(photo, result, towerSize) {
    const url = URL.createObjectURL(photo.file);
    urls.push(url);
    this.image = el("img", { src: url, alt: photo.name, decoding: "async" });
    this.figure = el("div", { class: "picture" }, this.image);
    this.size = result.image ? working(result.image, towerSize) : [1, 1];
  }

  views(views, adaptation) {
    const kept = views.map((view, n) => ({ ...view, n })).filter((view) => view.kept);
    if (!kept.length) return null;
    const [width, height] = this.size;
    const boxes = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true", class: "boxes" });
    this.figure.append(boxes);
    const shown = [...kept].sort((a, b) => a.entropy - b.entropy).slice(0, CUT);
    const crops = new Map();
    for (const view of kept) {
      const [top, left, tall, wide] = view.box ?? [0, 0, height, width];
      const box = svg("rect", { x: left, y: top, width: wide, height: tall, class: view.box ? "box" : "box whole" });
      boxes.append(box);
      if (shown.includes(view)) crops.set(view, this.crop(view, [left, top, wide, tall], box));
    }
    const whole = views.length >= adaptation.views; // an explanation tells of the first 64
    const head = `Tuned on ${whole ? kept.length : adaptation.views_kept} of ${many(Math.max(views.length, adaptation.views), "view")}`;
    const among = whole ? "" : ` of the first ${views.length}`;
    const which = kept.length > shown.length ? `The ${shown.length} surest${among}, with` : `Each${among} with`;
    return el(
      "div",
      { class: "views" },
      el("h4", {}, head),
      el("ul", { class: "crops" }, ...shown.map((view) => crops.get(view))),
      el("p", { class: "hint" }, `${which} the entropy of its own answer, in nats.`),
    );
  }

  /** A view as the model saw it: squeezed into a square, mirrored if it was. */
  crop(view, [left, top, wide, tall], box) {
    const side = 56 * Math.min(2, devicePixelRatio);
    const canvas = el("canvas", { width: side, height: side, role: "img" });
    const what = view.box ? `view ${view.n}` : "the whole photo";
    const said = `${what}${view.flip ? ", mirrored" : ""}, uncertainty ${view.entropy.toFixed(2)} nats`;
    canvas.setAttribute("aria-label", said);
    this.image.decode().then(
      () => {
        const { naturalWidth, naturalHeight } = this.image;
        const [x, y] = [naturalWidth / this.size[0], naturalHeight / this.size[1]];
        const draw = canvas.getContext("2d");
        if (view.flip) draw.setTransform(-1, 0, 0, 1, side, 0);
        draw.drawImage(this.image, left * x, top * y, wide * x, tall * y, 0, 0, side, side);
      },
      () => {},
    );
    const item = el("li", { title: said }, canvas, el("span", { class: "number" }, view.entropy.toFixed(2)));
    for (const [event, on] of [["pointerenter", true], ["pointerleave", false]]) {
      item.addEventListener(event, () => box.classList.toggle("lit", on));
    }
    return item;
  }
}

/** Width and height of the pixels that boxes count in. */
function working({ width, height }, towerSize) {
  const ratio = Math.min(1, (WORKING * towerSize) / Math.min(width, height));
  return [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
}
