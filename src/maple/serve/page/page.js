"use strict";

const MAX_IMAGES = 50;
const AT_ONCE = 4;
const SHOWN = 5;
const TRIES = 6;

const at = (id) => document.getElementById(id);
const state = { model: null, token: null, images: [], names: null, asked: 0, round: 0 };

try { state.token = sessionStorage.getItem("maple-token"); } catch { /* not allowed to keep it */ }

class Refusal extends Error {
  constructor(status, code, message) { super(message); this.status = status; this.code = code; }
}

async function ask(path, options = {}) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new Refusal(0, "unreachable", "The server does not respond. Is it still running?");
  }
  if (response.ok) return response;
  let error;
  try { error = (await response.json()).error; } catch { error = null; }
  throw new Refusal(response.status, error?.code ?? "unknown", error?.message ?? `The server responded with status ${response.status}.`);
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function setText(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

const sentence = (text) => text + (/[.!?]$/.test(text) ? "" : ".");
const size = (bytes) => bytes >= 1048576 ? `${(bytes / 1048576).toFixed(1)} MiB` : `${Math.ceil(bytes / 1024)} KiB`;
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

// ---- the model and the token

async function begin() {
  try {
    state.model = await (await ask("v1/model")).json();
  } catch (error) {
    if (error.status === 401) return askForToken();
    setText(at("model"), sentence(error.message));
    return undefined;
  }
  at("entry").hidden = true;
  at("main").hidden = false;
  const { title, class_names: names } = state.model;
  setText(at("model"), `${title}: ${names.length} ${names.length === 1 ? "class" : "classes"}.`);
  resetNames();
  work();
  return showExamples();
}

function askForToken() {
  const wrong = state.token !== null;
  state.token = null;
  try { sessionStorage.removeItem("maple-token"); } catch { /* it was not kept */ }
  setText(at("model"), "");
  at("main").hidden = true;
  at("entry").hidden = false;
  setText(at("refused"), wrong ? "This is not the server's token." : "");
  at("token").focus();
}

at("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = at("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) {
    setText(at("refused"), "A token has no spaces and no letters beyond ASCII.");
    return;
  }
  state.token = given;
  try { sessionStorage.setItem("maple-token", given); } catch { /* asked again next time */ }
  begin();
});

// ---- class names

// Commas or new lines between; a name that holds a comma is in double quotes, as in CSV.
const ONE_NAME = /[^\S\n]*(?:"([^"]*(?:""[^"]*)*)"[^\S\n]*(?=[,\n]|$)|([^,\n]+))/g;

function namesNow() {
  return [...at("names").value.matchAll(ONE_NAME)]
    .map(([, quoted, plain]) => (quoted?.replaceAll('""', '"').replaceAll("\n", " ") ?? plain).trim()).filter(Boolean);
}

function inQuotes(name) {
  return `"${name.replaceAll('"', '""')}"`;
}

function resetNames() {
  const words = state.model.class_names.map((name) => name.replaceAll("_", " "));
  at("names").value = words.map((name) => (/^"|,/.test(name) ? inQuotes(name) : name)).join("\n");
  namesChanged(true);
}

function wrongNames(names) {
  const { classes, name_chars: chars } = state.model.limits;
  if (!names.length) return "Give at least one class name.";
  if (names.length > classes) return `${names.length} class names are more than the allowed ${classes}.`;
  const long = names.find((name) => [...name].length > chars);
  if (long) return `“${long.slice(0, 40)}…” is longer than the allowed ${chars} characters.`;
  return null;
}

let typing;
function namesChanged(trained = false) {
  clearTimeout(typing);
  const names = namesNow();
  at("count").textContent = names.length === 1 ? "1 name" : `${names.length} names`;
  typing = setTimeout(() => {
    const wrong = trained ? null : wrongNames(names);
    setText(at("problem"), wrong);
    if (wrong) return;
    const before = JSON.stringify(state.names);
    state.names = trained ? null : names;
    if (JSON.stringify(state.names) === before) return;
    setText(at("note"), "");
    state.round += 1;
    state.images.forEach((image) => { image.due = true; });
    work();
  }, trained ? 0 : 700);
}

at("names").addEventListener("input", () => namesChanged());
at("reset").addEventListener("click", resetNames);

// ---- the threshold

function threshold() {
  const percentage = at("reject").valueAsNumber;
  return Number.isNaN(percentage) ? null : percentage / 100;
}

function wrongThreshold() {
  const { badInput } = at("reject").validity;
  const value = threshold();
  return badInput || (value !== null && !(value > 0 && value < 1)) ? "The threshold must be above 0 and below 100 %." : null;
}

let choosing;
at("reject").addEventListener("input", () => {
  clearTimeout(choosing);
  choosing = setTimeout(() => {
    const wrong = wrongThreshold();
    setText(at("problem"), wrong);
    if (wrong) return;
    state.round += 1;
    state.images.forEach((image) => { image.due = true; });
    work();
  }, 400);
});

// ---- images in

function add(files) {
  setText(at("problem"), "");
  for (const file of files.reverse()) {
    if (state.images.length >= MAX_IMAGES) {
      setText(at("problem"), `Only ${MAX_IMAGES} images are shown at once; remove some first.`);
      break;
    }
    const image = { file, name: file.name || "pasted image", due: true, card: card(file) };
    image.card.querySelector("h3").textContent = image.name;
    image.card.querySelector(".remove").setAttribute("aria-label", `Remove ${image.name}`);
    image.card.querySelector(".remove").addEventListener("click", () => remove(image));
    image.card.querySelector("img").alt = image.name;
    state.images.unshift(image);
    at("images").prepend(image.card);
  }
  counted();
  if (files.length) showPredictions();
  work();
}

// In one column the predictions are below the fold, and a choice would seem to have no effect.
function showPredictions() {
  if (!matchMedia("(max-width: 52rem)").matches) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  at("predictions").focus({ preventScroll: true });
  at("predictions").scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
}

function card(file) {
  const made = at("card").content.cloneNode(true).firstElementChild;
  const image = made.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.addEventListener("error", () => { image.hidden = true; made.querySelector(".nothing").hidden = false; });
  return made;
}

function remove(image) {
  image.gone = true;
  URL.revokeObjectURL(image.card.querySelector("img").src);
  const next = image.card.nextElementSibling ?? image.card.previousElementSibling;
  image.card.remove();
  state.images = state.images.filter((other) => other !== image);
  counted();
  (next?.querySelector(".remove") ?? at("predictions")).focus();
}

function counted() {
  at("main").classList.toggle("answering", state.images.length > 0);
  at("empty").hidden = state.images.length > 0;
  at("clear").hidden = state.images.length < 2;
  if (!state.images.length) setText(at("note"), "");
}

at("clear").addEventListener("click", () => { [...state.images].forEach(remove); at("predictions").focus(); });
at("files").addEventListener("change", () => { add([...at("files").files]); at("files").value = ""; });

const ready = () => !at("main").hidden;
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length && ready()) { event.preventDefault(); add(files); }
});
let depth = 0;
const over = (change) => { depth = Math.max(0, depth + change); document.body.classList.toggle("over", depth > 0); };
const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => { if (holdsFiles(event)) over(1); });
document.addEventListener("dragleave", (event) => { if (holdsFiles(event)) over(-1); });
document.addEventListener("dragover", (event) => { if (holdsFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  over(-depth);
  if (!ready()) return;
  const folders = [...event.dataTransfer.items].filter((item) => item.webkitGetAsEntry?.()?.isDirectory).length;
  const entries = [...event.dataTransfer.items].filter((item) => item.kind === "file" && !item.webkitGetAsEntry?.()?.isDirectory);
  add(entries.map((item) => item.getAsFile()).filter(Boolean));
  if (folders) setText(at("problem"), "Folders are not read; drop the images in them.");
});

// ---- examples

async function showExamples() {
  let list;
  try { list = await (await ask("v1/examples")).json(); } catch { return; }
  at("tries").hidden = !list.examples.length;
  at("origin").textContent = list.source ? `From ${list.source}.` : "";
  at("examples").replaceChildren();
  for (const { id, class_name: name, trained } of list.examples) {
    let content;
    try { content = await (await ask(`v1/examples/${id}`)).blob(); } catch { continue; }
    const button = make("button");
    button.type = "button";
    button.title = `${name}${trained ? "" : ", not a trained class"}`;
    const image = make("img");
    image.src = URL.createObjectURL(content);
    image.alt = `Example: ${button.title}`;
    button.append(image);
    button.addEventListener("click", () => add([new File([content], `${name}.png`, { type: "image/png" })]));
    const item = make("li");
    item.append(button);
    at("examples").append(item);
  }
}

// ---- predictions

async function work() {
  while (state.asked < AT_ONCE && ready()) {
    const image = state.images.find((image) => image.due && !image.busy);
    if (!image) return;
    image.due = false;
    image.busy = true;
    state.asked += 1;
    classify(image).finally(() => { state.asked -= 1; image.busy = false; work(); });
  }
}

async function classify(image) {
  const { round, token } = state;
  const place = image.card.querySelector(".state");
  image.card.querySelector(".both").classList.add("again");
  try {
    if (image.file.size > state.model.limits.upload_bytes - 4096) {
      throw new Refusal(413, "too_large", `${size(image.file.size)} is more than the allowed ${size(state.model.limits.upload_bytes)}`);
    }
    const result = await (await requestPrediction(image)).json();
    if (image.gone || round !== state.round) return;
    setText(at("note"), result.note ? `Note: ${result.note}.` : "");
    place.hidden = true;
    show(image, result.predictions[0]);
  } catch (error) {
    if (error.status === 401) {
      image.due = true;
      // Others that were under way may be refused after a new token was given.
      if (state.token === token) askForToken();
      return;
    }
    if (image.gone || round !== state.round) return;
    image.card.querySelector(".both").hidden = true;
    image.card.querySelector(".none").hidden = true;
    place.className = "state problem";
    setText(place, sentence(error.message));
    at("status").textContent = `${image.name}: ${error.message}`;
  }
}

async function requestPrediction(image) {
  for (let attempt = 1; ; attempt += 1) {
    const form = new FormData();
    form.append("images", image.file, image.name);
    const names = state.names ?? [];
    // A single field may hold several names, so a single name is quoted.
    for (const name of names) form.append("class_names", names.length === 1 ? inQuotes(name) : name);
    form.append("top", SHOWN);
    form.append("zero_shot", state.model.zero_shot);
    if (threshold() !== null && !wrongThreshold()) form.append("reject", threshold());
    try {
      return await ask("v1/predict", { method: "POST", body: form });
    } catch (error) {
      if (error.status !== 503 || attempt >= TRIES) throw error;
      await pause(attempt * (0.5 + Math.random()));
    }
  }
}

function show(image, prediction) {
  const both = image.card.querySelector(".both");
  both.replaceChildren(bars("tuned", `Tuned: ${state.model.about.title ?? "the trained method"}`, prediction.best));
  if (prediction.zero_shot) both.append(bars("frozen", "Zero-shot CLIP", prediction.zero_shot));
  setText(image.card.querySelector(".none"), prediction.rejected ? "None of these." : "");
  both.hidden = false;
  both.classList.remove("again");
  const first = ({ class: name, probability }) => `${name}, ${percent(probability)}`;
  const comparison = prediction.zero_shot ? `; zero-shot CLIP: ${first(prediction.zero_shot[0])}` : "";
  const answer = prediction.rejected ? "none of these; first " : "";
  at("status").textContent = `${image.name}: ${answer}${first(prediction.best[0])}${comparison}`;
}

function bars(kind, title, ranked) {
  const block = make("div", kind);
  const list = make("ol", "bars");
  for (const { class: name, probability } of ranked) {
    const row = make("li");
    const track = make("span", "track");
    const fill = make("div", "fill");
    track.setAttribute("aria-hidden", "true");
    fill.style.width = `${100 * probability}%`;
    track.append(fill);
    row.append(make("span", "name", name), make("span", "value", percent(probability)), track);
    list.append(row);
  }
  block.append(make("h4", "", title), list);
  return block;
}

begin();
