"use strict";

const at = (id) => document.getElementById(id);

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

// Descriptions hold one kind of markup: `code`.
function marked(tag, text) {
  const element = document.createElement(tag);
  (text ?? "").split("`").forEach((part, index) => element.append(index % 2 ? make("code", part) : part));
  return element;
}

function table(head, rows) {
  const header = make("tr", "", ...head.map((text) => make("th", text)));
  header.querySelectorAll("th").forEach((cell) => { cell.scope = "col"; });
  const body = make("tbody", "", ...rows.map((cells) => make("tr", "", ...cells)));
  return make("table", "", make("thead", "", header), body);
}

const nameOf = (reference) => reference.split("/").at(-1);
const anchor = (method, path) => `${method}-${path}`.replace(/[^a-z0-9]+/gi, "-");

function link(reference) {
  const element = make("a", nameOf(reference));
  element.href = `#${nameOf(reference)}`;
  return element;
}

// ---- schemas

const BOUNDS = {
  minimum: "at least", exclusiveMinimum: "above", maximum: "at most", exclusiveMaximum: "below",
  minLength: "length at least", maxLength: "length at most", minItems: "items at least", maxItems: "items at most",
};

function typeOf(schema) {
  const cell = document.createElement("span");
  if (schema.$ref) { cell.append(link(schema.$ref)); return cell; }
  const options = schema.anyOf ?? schema.oneOf;
  if (options) {
    options.forEach((option, index) => cell.append(index ? " or " : "", typeOf(option)));
    return cell;
  }
  if (schema.enum) { cell.append(schema.enum.map((value) => JSON.stringify(value)).join(", ")); return cell; }
  if ("const" in schema) { cell.append(JSON.stringify(schema.const)); return cell; }
  const form = schema.format ?? schema.contentMediaType;
  const bounds = Object.entries(BOUNDS).filter(([key]) => key in schema).map(([key, words]) => `${words} ${schema[key]}`);
  cell.append(`${[schema.type ?? "any value"].flat().join(" or ")}${form ? `, ${form}` : ""}${bounds.length ? ` (${bounds.join(", ")})` : ""}`);
  if (schema.items) cell.append(" of ", typeOf(schema.items));
  return cell;
}

function fields(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, property]) => {
    const meaning = marked("td", property.description);
    if (property.default !== undefined && property.default !== null) meaning.append(` Default: ${JSON.stringify(property.default)}.`);
    const title = make("td", "", make("code", name));
    if (schema.required?.includes(name)) title.append(" (required)");
    return [title, make("td", "", typeOf(property)), meaning];
  });
  return table(["field", "type", "meaning"], rows);
}

// ---- operations

function operation(method, path, { summary, description, parameters = [], requestBody, responses, security }) {
  const section = document.createElement("section");
  section.id = anchor(method, path);
  const title = make("h2", "", make("span", method.toUpperCase()), " ", make("code", path));
  title.firstChild.className = "method";
  section.append(title, marked("p", `${summary ?? ""}.`));
  if (description) section.append(marked("p", description));
  if (security) section.append(make("p", "Needs the header Authorization: Bearer TOKEN."));
  if (parameters.length) {
    const rows = parameters.map(({ name, in: where, schema, description: meaning }) =>
      [make("td", "", make("code", name)), make("td", "", typeOf(schema)), marked("td", meaning ?? `In the ${where}.`)]);
    section.append(make("h3", "Parameters"), table(["name", "type", "meaning"], rows));
  }
  for (const [type, { schema }] of Object.entries(requestBody?.content ?? {})) {
    section.append(make("h3", "", "Body, ", make("code", type)));
    section.append(schema.$ref ? make("p", "", link(schema.$ref)) : fields(schema));
  }
  if (path.endsWith("/predict")) section.append(make("h3", "Example"), make("pre", example(path, security)));
  const rows = Object.entries(responses).map(([status, { description: meaning, content = {} }]) => {
    const body = make("td", "");
    Object.entries(content).forEach(([type, { schema }]) => body.append(schema?.$ref ? link(schema.$ref) : type));
    return [make("td", "", make("code", status)), body, marked("td", meaning)];
  });
  section.append(make("h3", "Responses"), table(["status", "body", "meaning"], rows));
  return section;
}

function example(path, security) {
  const address = new URL(`.${path}`, document.baseURI);
  const token = security ? '-H "Authorization: Bearer $MAPLE_TOKEN" ' : "";
  return `curl ${token}-F images=@cat.jpg -F top=3 ${address}`;
}

async function begin() {
  let api;
  try {
    const response = await fetch("openapi.json", { cache: "no-store" });
    if (!response.ok) throw new Error(`status ${response.status}`);
    api = await response.json();
  } catch (error) {
    at("version").textContent = `The description cannot be loaded (${error.message}). Is the server still running?`;
    return;
  }
  at("version").textContent = `${api.info.title} ${api.info.version}`;
  at("description").append(...api.info.description.split("\n\n").map((text) => marked("p", text)));
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, described] of Object.entries(methods)) {
      const kind = make("span", method.toUpperCase());
      kind.className = "method";
      const entry = make("a", "", make("code", path));
      entry.href = `#${anchor(method, path)}`;
      at("contents").append(make("li", "", kind, " ", entry, ` ${described.summary ?? ""}`));
      at("operations").append(operation(method, path, described));
    }
  }
  for (const [name, schema] of Object.entries(api.components?.schemas ?? {})) {
    const title = make("h3", name);
    title.id = name;
    at("schemas").append(title, marked("p", schema.description), schema.properties ? fields(schema) : typeOf(schema));
  }
  at("schemas").hidden = false;
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

begin();
