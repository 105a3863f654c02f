// The page's form: what is asked, how it is sent, and what the server says it has. Nothing is kept anywhere.

import { byId, el, many, milliseconds } from "./dom.js";
import { Photos } from "./photos.js";
import { fail, show } from "./results.js";
import { METHODS, SCOPES } from "./words.js";

const PATIENCE_MS = 2000; // between two looks at a server that is starting
const MAX_NAME = 256;
const MOST_PREDICTIONS = 50_000; // of one answer
const TOLD = 25; // classes of each photo that are asked for
const NUMBERS = { steps: "steps", views: "views", budget: "budget_ms", seed: "seed" };

const here = (path) => new URL(path, document.baseURI).href;
const form = byId("ask");
const photos = new Photos(advise);
let facts = null; // what /info said
let meetings = 0;
let running = null; // the request under way

// ---- what the server has ----

async function meet() {
  const turn = (meetings += 1);
  let answer;
  try {
    answer = await fetch(here("info"), { headers: credentials(), cache: "no-store" });
  } catch {
    byId("model").textContent = "The server can't be reached.";
    if (turn === meetings) setTimeout(meet, PATIENCE_MS);
    return;
  }
  if (turn !== meetings) return; // another key has been typed since
  if (answer.status === 401) {
    byId("key-block").hidden = false;
    byId("model").textContent = byId("key").value ? "This key is not valid here." : "This server wants an API key.";
    if (!byId("key").value) byId("key").focus();
  } else if (answer.status === 503) {
    byId("model").textContent = "The model is being loaded\u2026";
    setTimeout(meet, PATIENCE_MS);
  } else if (answer.ok) {
    facts = await answer.json();
    introduce(facts);
  } else {
    byId("model").textContent = `The server would not say what it has (status ${answer.status}).`;
  }
}

function introduce({ model, limits, version }) {
  byId("model").textContent = `${model.name} on ${model.device}, GRAM ${version}`;
  photos.limited(limits);
  const own = [...model.methods].filter((name) => name in METHODS);
  byId("method").replaceChildren(
    ...own.map((name) => {
      const usual = name === model.default_method;
      return new Option(usual ? `${name} (default)` : name, name, usual, usual);
    }),
  );
  byId("steps").max = limits.max_steps;
  byId("views").max = limits.max_views;
  byId("tip").textContent =
    `Joint tuning works from ${model.batch_from} photos on; with fewer the answer is zero-shot, and says so.`;
  fit();
}

const key = () => byId("key").value.trim();
const sendable = () => /^[\x21-\x7e]*$/.test(key()); // others fit into no header
const credentials = () => (key() && sendable() ? { Authorization: `Bearer ${key()}` } : {});

// ---- the form ----

/** Class names in order: NFC and trimmed, as the server reads them. */
const classes = () =>
  byId("classes")
    .value.split("\n")
    .map((line) => line.normalize("NFC").trim())
    .filter(Boolean);

/** Options that go with the method, and what they are when left open. */
function fit() {
  const method = byId("method").value;
  byId("method-note").textContent = METHODS[method] ?? "";
  const known = SCOPES[method] ?? ["auto", "image", "batch"];
  for (const option of byId("scope").options) option.disabled = !known.includes(option.value);
  if (byId("scope").selectedOptions[0].disabled) byId("scope").value = "auto";
  byId("scope-field").hidden = known.length === 1;
  const usual = facts?.model.defaults[method] ?? {};
  const single = method === "tpt" || byId("scope").value === "image";
  for (const name of ["steps", "views"]) {
    byId(name).disabled = method === "none";
    byId(name).placeholder = usual[name] === undefined || (single && usual.scope === "batch") ? "as usual" : usual[name];
  }
  byId("budget").disabled = method === "none";
  advise();
}

/** What to know before sending: counts, and where fewer photos mean no tuning. */
function advise() {
  const names = classes();
  const repeated = names.length - new Set(names).size;
  const commas = names.some((name) => name.includes(","));
  byId("split").hidden = !commas;
  byId("class-note").textContent = names.length
    ? many(names.length, "class", "classes") + (repeated ? `, ${repeated} of them repeated` : "")
    : "Any words will do. A pasted list is split at its commas.";
  const [method, scope] = [byId("method").value, byId("scope").value];
  const least = facts?.model.batch_from;
  const few = photos.all.length > 0 && photos.all.length < least && scope === "auto" && ["gram", "infomax"].includes(method);
  const other = method === "gram" ? "Choose \u201ceach photo alone\u201d" : "Choose \u201call together\u201d";
  byId("scope-note").textContent = few ? `With fewer than ${least} photos this answers zero-shot. ${other} to tune all the same.` : "";
}

/** What is wrong with the form, as [sentence, where to look], or null. */
function wrong(names) {
  const limits = facts?.limits ?? {};
  if (!sendable()) return ["This is no API key: it holds a space or a letter that keys don't have.", "key"];
  if (!photos.all.length) return ["Add at least one photo.", "files"];
  const unfit = photos.unfit();
  if (unfit.length) return [`${many(unfit.length, "photo")} will not be accepted: ${photos.problem(unfit[0])}.`, "unfit"];
  if (photos.together()) return [photos.together(), "files"];
  if (names.length < 2) return ["Give at least two class names: with fewer there is nothing to choose.", "classes"];
  const twice = names.find((name, n) => names.indexOf(name) !== n);
  if (twice !== undefined) return [`Class \u201c${twice}\u201d is there twice.`, "classes"];
  if (names.length > limits.max_classes) return [`${names.length} classes, the server takes ${limits.max_classes}.`, "classes"];
  const long = names.findIndex((name) => [...name].length > MAX_NAME);
  if (long >= 0) return [`Class ${long + 1} is longer than ${MAX_NAME} characters.`, "classes"];
  const template = byId("template").value;
  if (template && (template.split("{}").length !== 2 || /[{}]/.test(template.replace("{}", "")))) {
    return ["The template needs {} exactly once, where the name goes, and no other braces.", "template"];
  }
  for (const name of Object.keys(NUMBERS)) {
    const field = byId(name);
    if (!field.disabled && !field.checkValidity()) {
      return [`${field.labels[0].textContent}: a whole number from ${field.min}${field.max ? ` to ${field.max}` : ""}.`, name];
    }
  }
  return null;
}

function complain([sentence, where]) {
  byId("problem").replaceChildren(el("p", {}, sentence));
  byId("problem").hidden = false;
  if (where === "unfit") {
    const leave = el("button", { type: "button" }, photos.unfit().length === 1 ? "Leave it out" : "Leave them out");
    leave.addEventListener("click", () => {
      photos.removeAll(photos.unfit());
      byId("problem").hidden = true;
      byId("files").focus();
    });
    byId("problem").append(leave);
    leave.focus();
    return;
  }
  const field = byId(where);
  const folded = field.closest("details");
  if (folded) folded.open = true;
  field.focus();
}

/** The form as [name, text] pairs: what is sent, and what a copied command sends. */
function fields(names) {
  const pairs = names.map((name) => ["classes", name]);
  if (byId("template").value) pairs.push(["templates", byId("template").value]);
  if (byId("method").value) pairs.push(["method", byId("method").value]);
  if (byId("scope").value !== "auto") pairs.push(["scope", byId("scope").value]);
  for (const [id, name] of Object.entries(NUMBERS)) {
    if (byId(id).value && !byId(id).disabled) pairs.push([name, String(byId(id).valueAsNumber)]);
  }
  const most = Math.max(1, Math.min(names.length, TOLD, Math.floor(MOST_PREDICTIONS / photos.all.length)));
  pairs.push(["top_k", String(most)], ["errors", "per_item"]);
  if (byId("explain").checked) pairs.push(["explain", "true"]);
  return pairs;
}

// ---- one request ----

function ask() {
  if (running) return;
  const names = classes();
  const fault = wrong(names);
  byId("problem").hidden = true;
  if (fault) {
    complain(fault);
    return;
  }
  const pairs = fields(names);
  const chosen = [...photos.all];
  const body = new FormData();
  for (const photo of chosen) body.append("image", photo.file, photo.name);
  for (const [name, text] of pairs) body.append(name, text);
  const sent = {
    photos: chosen,
    classes: names,
    towerSize: facts?.model.image_size ?? 224,
    batchFrom: facts?.model.batch_from,
    request: { url: here("v1/classify"), names: chosen.map((photo) => photo.name), fields: pairs, keyed: key() !== "" },
  };
  send(sent, body);
}

function send(sent, body) {
  const call = (running = new XMLHttpRequest()); // fetch can't tell how much has been sent
  const began = performance.now();
  const clock = setInterval(() => (byId("clock").textContent = milliseconds(performance.now() - began)), 100);
  const ended = (said) => {
    running = null;
    clearInterval(clock);
    busy(false);
    byId("status").textContent = said;
  };
  busy(true);
  call.upload.onprogress = ({ loaded, total }) => progress(loaded, total);
  call.upload.onload = () => progress(1, 1);
  call.onabort = () => ended("Cancelled.");
  call.onerror = () => refused({ code: "unreachable", status: 0, retryable: true });
  call.onload = () => {
    let said = null;
    try {
      said = JSON.parse(call.responseText);
    } catch {
      said = null;
    }
    if (call.status === 200 && said?.results) {
      ended(show(said, sent));
      reveal();
    } else {
      const seconds = Number(call.getResponseHeader("Retry-After"));
      const known = said?.error ?? { code: "unreadable", request_id: call.getResponseHeader("X-Request-Id") };
      refused({ ...known, status: call.status, seconds });
    }
  };
  function refused(error) {
    if (error.code === "unauthenticated") byId("key-block").hidden = false;
    fail(error, sent, ask);
    ended("");
    reveal();
  }
  call.open("POST", sent.request.url);
  for (const [name, value] of Object.entries(credentials())) call.setRequestHeader(name, value);
  call.send(body);
}

function progress(loaded, total) {
  if (loaded < total) {
    byId("progress").value = loaded / total;
    byId("doing").textContent = `Sending, ${Math.round((100 * loaded) / total)} %.`;
  } else {
    byId("progress").removeAttribute("value");
    byId("doing").textContent = "The model is looking and tuning.";
  }
}

function busy(on) {
  form.setAttribute("aria-busy", String(on));
  byId("answers").classList.toggle("stale", on);
  byId("go").disabled = on;
  byId("go").textContent = on ? "Classifying\u2026" : "Classify";
  byId("cancel").hidden = byId("running").hidden = !on;
  byId("clock").textContent = "";
  if (on) {
    byId("status").textContent = "Classifying.";
    byId("doing").textContent = "Sending.";
    byId("progress").removeAttribute("value");
  }
}

/** Results lie below the form on a narrow page, and further up where someone has read on. */
function reveal() {
  const { top } = byId("answers").getBoundingClientRect();
  if (top >= 0 && top < innerHeight * 0.4) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  byId("answers").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

// ---- wiring ----

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
form.addEventListener("input", () => {
  byId("problem").hidden = true;
});
byId("cancel").addEventListener("click", () => {
  running?.abort();
  byId("go").focus();
});
byId("clear").addEventListener("click", () => {
  photos.removeAll(photos.all);
  byId("files").focus();
});
byId("key").addEventListener("change", meet);
byId("files").addEventListener("change", () => {
  photos.add(byId("files").files);
  byId("files").value = ""; // the same file may be chosen again
});
byId("classes").addEventListener("input", advise);
for (const id of ["method", "scope"]) byId(id).addEventListener("change", fit);

const listed = (text) => text.split(/[,\n]/).map((part) => part.trim()).filter(Boolean).join("\n");
byId("split").addEventListener("click", () => {
  byId("classes").value = listed(byId("classes").value);
  advise();
  byId("classes").focus();
});
byId("classes").addEventListener("paste", (event) => {
  const text = event.clipboardData.getData("text/plain");
  if (!text.includes(",") || text.includes("\n")) return; // several lines say themselves what a name is
  event.preventDefault();
  const field = byId("classes");
  field.setRangeText(listed(text), field.selectionStart, field.selectionEnd, "end");
  advise();
});

document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  photos.add(event.clipboardData.files);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

let inside = 0; // dragenter and dragleave come for every element on the way
const hovering = (on) => byId("drop").classList.toggle("over", on);
document.addEventListener("dragenter", () => hovering((inside += 1) > 0));
document.addEventListener("dragleave", () => hovering((inside -= 1) > 0));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  hovering(false);
  photos.add(event.dataTransfer.files);
});

fit();
meet();
