// The models of the node: what serves each, how it was proven, how far its next engine is; and orders about them.
import { byId, changed, make, pill, postJson, request, small } from "./dom.js";

const BUILD_WORDS = {
  building: (build) => `${build.phase || "begins"} ${Math.round((build.progress ?? 0) * 100)} %${build.message ? ` · ${build.message}` : ""}`,
  waiting: (build) => build.phase,
  failed: (build) => build.message,
  cancelled: () => "The build was cancelled.",
};

const SLEEP_WORDS = {
  idle: "Nobody asked for it; the next request loads it.",
  memory: "Memory was short; the next request loads it.",
};

const rows = new Map();

// A row is made anew only when more than the progress of its build has changed: a button that is pressed must not be replaced meanwhile.
export function drawModels(models) {
  for (const model of models) {
    const known = rows.get(model.name);
    if (changed(`model ${model.name}`, { ...model, build: model.build && settled(model.build) }) || !known) {
      rows.set(model.name, row(model));
    } else if (model.build?.status === "building") {
      known.querySelector("progress").value = model.build.progress ?? 0;
      known.querySelector(".step").textContent = step(model);
    }
  }
  for (const name of [...rows.keys()].filter((name) => !models.some((model) => model.name === name))) rows.delete(name);
  const wanted = models.map((model) => rows.get(model.name));
  const body = byId("models");
  if (wanted.length !== body.children.length || wanted.some((element, index) => body.children[index] !== element)) body.replaceChildren(...wanted);
}

// What a build says while it goes on changes without a new row; why one has failed does not.
const settled = (build) => (build.status === "building" ? { ...build, progress: null, phase: "", message: "" } : build);

function row(model) {
  return make("tr", {},
    make("td", {}, make("strong", { textContent: model.name }), small(model.aliases.length ? `also ${model.aliases.join(", ")}` : "")),
    cell("Task", model.task), make("td", { "data-label": "Status" }, pill(model.asleep ? "asleep" : model.status), small(SLEEP_WORDS[model.asleep] ?? ""), ...progress(model)),
    cell("Engine", model.engine), cell("Verification", ...verdict(model)), cell("Figures", figures(model)));
}

const cell = (label, ...children) => make("td", { "data-label": label }, ...children);

// What is going on with its engine: a bar and a button while it is built, the reason and a button when it was not.
function progress(model) {
  const build = model.build;
  if (!build) return [];
  const parts = [make("small", { className: "step", textContent: step(model) })];
  if (build.status === "building") {
    const bar = make("progress", { max: 1, value: build.progress ?? 0, "aria-label": `Build of ${model.name}` });
    parts.push(bar, button(model, "Cancel", () => request(`/v1/deployments/${encodeURIComponent(model.name)}`, { method: "DELETE" })));
  } else if (build.status !== "waiting") {
    parts.push(button(model, "Try again", () => postJson("/v1/deployments", { model: model.name })));
  }
  return parts;
}

const step = ({ status, build }) => (status === "serving" ? "next engine: " : "") + BUILD_WORDS[build.status](build);

function button(model, label, order) {
  const element = make("button", { type: "button", className: "plain", textContent: label, "data-order": `${model.name} ${label}` });
  element.setAttribute("aria-label", `${label}: ${model.name}`);
  element.addEventListener("click", async () => {
    element.disabled = true;
    try {
      const answer = await order();
      if (!answer.ok) tell((await answer.json()).error?.message ?? `the node answered with status ${answer.status}`);
      else tell("");
    } catch (error) {
      tell(error.message);
    } finally {
      element.disabled = false;
    }
  });
  return element;
}

function tell(text) {
  byId("models-words").textContent = text;
  byId("models-words").hidden = !text;
}

// The verdict in a word; what failed before it, on demand.
function verdict(model) {
  if (!model.verdict) return [];
  const refused = model.ladder.filter((attempt) => attempt.status !== "passed");
  const word = model.verdict === "failed" ? "not proven" : model.verdict;
  const notes = model.ladder.at(-1)?.notes;
  if (refused.length === 0) return notes ? [make("span", { textContent: word, title: notes })] : [word];
  const list = refused.map((attempt) => make("li", { textContent: `${attempt.precision}: ${attempt.reason || attempt.status}` }));
  return [make("details", {}, make("summary", { textContent: `${word}, after ${refused.length} refused` }), make("ul", {}, ...list))];
}

function figures(model) {
  return Object.entries(model.figures).map(([name, value]) => figure(name, value)).join(" · ");
}

// `latency_ms: 31.5` is read as "latency 31.5 ms": the unit is in the name. Shares are told by the names that verification gives them.
const UNITS = { ms: "ms", s: "s", mb: "MB", fps: "frames/s", bytes: "bytes" };
function figure(name, value) {
  const words = name.split("_");
  const unit = words.length > 1 ? UNITS[words.at(-1)] : undefined;
  if (words.includes("agreement") || words.includes("matched")) return `${words.join(" ")} ${short(value * 100)} %`;
  return unit ? `${words.slice(0, -1).join(" ")} ${short(value)} ${unit}` : `${words.join(" ")} ${short(value)}`;
}

function short(value) {
  if (typeof value !== "number" || Number.isInteger(value)) return value;
  return Math.abs(value) < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(4));
}
