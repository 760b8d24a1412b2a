// Zones, lines and masks over the live picture, and drawing them: clicks set points, the form names them, Save sends a change of settings.
import { byId, make, request } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const NEAR = 0.02; // share of the width within which a click meets a point
const stage = byId("shapes");
const form = byId("shape-editor");
let camera = null;
let draft = null; // what is being edited: {shapes, selected, pending, drag, isSaving}

export const isDrawing = () => draft !== null;

export function drawShapes(now) {
  if (draft === null) camera = now;
  else if (now && now.id === camera?.id) camera = { ...now, settings: camera.settings };
  paint();
}

export function stopDrawing() {
  draft = null;
  form.hidden = true;
  byId("edit-shapes").hidden = !camera?.settings;
  paint();
}

// ── what is there ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const KINDS = {
  zone: (zone) => ({ kind: "zone", points: zone.points, ...names(zone), inertia_frames: zone.inertia_frames, loitering_s: zone.loitering_s }),
  mask: (mask) => ({ kind: "mask", points: mask.points, name: mask.name }),
  line: (line) => ({ ...line, kind: "line", name: line.name ?? "line", points: [line.start ?? [0.5, 0], line.end ?? [0.5, 1]] }),
};
const names = (shape) => ({ name: shape.name, labels: shape.labels ?? [] });

function shapesOf(settings) {
  const lines = [...(settings.line ? [settings.line] : []), ...(settings.lines ?? [])];
  return [...(settings.zones ?? []).map(KINDS.zone), ...lines.map(KINDS.line), ...(settings.masks ?? []).map(KINDS.mask)];
}

function settingsOf(shapes) {
  const of = (kind) => shapes.filter((shape) => shape.kind === kind);
  const rounded = (points) => points.map((point) => point.map((value) => Math.round(value * 1e4) / 1e4));
  const plain = ({ kind, points, ...rest }) => Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== undefined && value !== null));
  return {
    zones: of("zone").map((zone) => ({ ...plain(zone), points: rounded(zone.points) })),
    masks: of("mask").map((mask) => ({ name: mask.name, points: rounded(mask.points) })),
    line: null,
    lines: of("line").map((line) => ({ ...plain(line), start: rounded(line.points)[0], end: rounded(line.points)[1] })),
  };
}

// ── painting ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function paint() {
  const shapes = draft ? draft.shapes : camera?.settings ? shapesOf(camera.settings) : [];
  const width = camera?.width || 640;
  const height = camera?.height || 360;
  stage.setAttribute("viewBox", `0 0 ${width} ${height}`);
  stage.toggleAttribute("hidden", !camera || (!draft && shapes.length === 0));
  stage.classList.toggle("editing", draft !== null);
  const parts = shapes.flatMap((shape, index) => paintShape(shape, index, width, height));
  if (draft?.pending) parts.push(...paintPending(draft.pending, width, height));
  stage.replaceChildren(...parts);
}

function paintShape(shape, index, width, height) {
  const isSelected = draft?.selected === index;
  const at = (point) => `${point[0] * width},${point[1] * height}`;
  const counts = shape.kind === "zone" ? Object.values(camera.zones?.[shape.name] ?? {}).reduce((sum, count) => sum + count, 0) : 0;
  // Of lines the live picture shows its own, with counts: here they are only for editing.
  if (shape.kind === "line" && !draft) return [];
  const body = element(shape.kind === "line" ? "polyline" : "polygon",
    { points: shape.points.map(at).join(" "), class: `shape ${shape.kind}${isSelected ? " selected" : ""}${counts ? " occupied" : ""}`, "data-shape": index });
  if (shape.kind === "mask" && !draft) return [];
  const [x, y] = top(shape.points);
  const label = element("text", { x: x * width + 5, y: Math.max(14, y * height - 5), class: "shape-name", "font-size": Math.max(11, height / 28) });
  label.textContent = counts ? `${shape.name}: ${counts}` : shape.name;
  const handles = isSelected ? shape.points.map((point, number) =>
    element("circle", { cx: point[0] * width, cy: point[1] * height, r: height / 60, class: "handle", "data-point": number })) : [];
  return [body, label, ...handles];
}

function paintPending({ kind, points }, width, height) {
  const at = points.map((point) => `${point[0] * width},${point[1] * height}`).join(" ");
  return [element("polyline", { points: at, class: `shape pending ${kind}` }), ...points.map((point, number) =>
    element("circle", { cx: point[0] * width, cy: point[1] * height, r: height / 60, class: number === 0 ? "handle first" : "handle" }))];
}

function element(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const top = (points) => points.reduce((best, point) => (point[1] < best[1] ? point : best));

// ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

byId("edit-shapes").addEventListener("click", () => {
  if (!camera?.settings) return;
  draft = { shapes: shapesOf(camera.settings), selected: null, pending: null, drag: null };
  form.hidden = false;
  byId("edit-shapes").hidden = true;
  byId("shape-reset").hidden = !(camera.origin === "order" && camera.is_configured);
  tell("");
  refresh();
});

for (const kind of ["zone", "line", "mask"]) {
  byId(`draw-${kind}`).addEventListener("click", () => {
    draft.pending = { kind, points: [] };
    draft.selected = null;
    tell(kind === "line" ? "Click where the line begins and where it ends." : "Click its corners on the picture; click the first one again to finish.");
    refresh();
  });
}

function share(event) {
  const matrix = stage.getScreenCTM();
  if (!matrix) return null;
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
  const [, , width, height] = stage.getAttribute("viewBox").split(" ").map(Number);
  const clamp = (value) => Math.min(1, Math.max(0, value));
  return [clamp(point.x / width), clamp(point.y / height)];
}

const isNear = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]) < NEAR;

stage.addEventListener("pointerdown", (event) => {
  const point = draft && share(event);
  if (!point) return;
  event.preventDefault();
  if (draft.pending) {
    addPoint(point);
  } else if (event.target.dataset.point !== undefined) {
    draft.drag = Number(event.target.dataset.point);
    stage.setPointerCapture(event.pointerId);
  } else {
    draft.selected = event.target.dataset.shape === undefined ? null : Number(event.target.dataset.shape);
    refresh();
  }
});

stage.addEventListener("pointermove", (event) => {
  if (!draft || draft.drag === null || draft.selected === null) return;
  draft.shapes[draft.selected].points = draft.shapes[draft.selected].points.map((point, number) => (number === draft.drag ? share(event) : point));
  paint();
});

for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { if (draft) draft.drag = null; });

function addPoint(point) {
  const { kind, points } = draft.pending;
  const isClosing = kind !== "line" && points.length >= 3 && isNear(point, points[0]);
  if (!isClosing) points.push(point);
  if (isClosing || (kind === "line" && points.length === 2)) finish();
  else paint();
}

function finish() {
  const { kind, points } = draft.pending;
  const least = kind === "line" ? 2 : 3;
  if (points.length < least) return;
  draft.shapes.push({ kind, points, name: freeName(kind), ...(kind === "zone" ? { labels: [] } : {}) });
  draft.pending = null;
  draft.selected = draft.shapes.length - 1;
  tell("");
  refresh();
  byId("shape-name").focus();
  byId("shape-name").select();
}

function freeName(kind) {
  let number = 1;
  while (draft.shapes.some((shape) => shape.kind === kind && shape.name === `${kind} ${number}`)) number += 1;
  return `${kind} ${number}`;
}

document.addEventListener("keydown", (event) => {
  if (!draft) return;
  if (event.key === "Escape" && draft.pending) {
    draft.pending = null;
    tell("");
    refresh();
  } else if (event.key === "Enter" && draft.pending) {
    event.preventDefault();
    finish();
  }
});

// ── the form ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function refresh() {
  const shape = draft.selected === null ? null : draft.shapes[draft.selected];
  byId("shape-list").replaceChildren(...draft.shapes.map((each, index) => {
    const chip = make("button", { type: "button", className: "chip", textContent: each.name, "data-kind": each.kind, "aria-pressed": String(index === draft.selected) });
    chip.addEventListener("click", () => { draft.selected = index; draft.pending = null; refresh(); });
    return make("li", {}, chip);
  }));
  for (const kind of ["zone", "line", "mask"]) byId(`draw-${kind}`).setAttribute("aria-pressed", String(draft.pending?.kind === kind));
  byId("shape-fields").hidden = shape === null;
  for (const field of ["labels", "loitering", "inertia"]) byId(`shape-${field}-field`).hidden = shape?.kind !== "zone";
  byId("shape-anchor-field").hidden = shape?.kind !== "line";
  if (shape) {
    byId("shape-name").value = shape.name;
    byId("shape-labels").value = (shape.labels ?? []).join(", ");
    byId("shape-loitering").value = loiteringText(shape.loitering_s);
    byId("shape-loitering").setCustomValidity("");
    byId("shape-inertia").value = shape.inertia_frames ?? "";
    byId("shape-anchor").value = shape.anchor ?? "centre";
  }
  paint();
}

const edit = (id, take) => byId(id).addEventListener("input", (event) => {
  if (draft?.selected === null || !draft) return;
  take(draft.shapes[draft.selected], event.target.value);
  const chip = byId("shape-list").children[draft.selected]?.firstChild;
  if (chip) chip.textContent = draft.shapes[draft.selected].name;
  paint();
});
edit("shape-name", (shape, text) => { shape.name = text; });
edit("shape-labels", (shape, text) => { shape.labels = text.split(",").map((label) => label.trim()).filter(Boolean); });
edit("shape-loitering", (shape, text) => {
  const seconds = loiteringOf(text);
  byId("shape-loitering").setCustomValidity(seconds === null ? "seconds, such as 30, or by class: person 10, car 120" : "");
  if (seconds !== null) shape.loitering_s = seconds;
});
edit("shape-inertia", (shape, text) => { shape.inertia_frames = text === "" ? undefined : Number(text); });
edit("shape-anchor", (shape, text) => { shape.anchor = text; });

function loiteringText(seconds) {
  if (typeof seconds === "number") return String(seconds);
  return Object.entries(seconds ?? {}).map(([label, limit]) => `${label} ${limit}`).join(", ");
}

// A number for everybody, an object for some classes, undefined for never; null: it is none of these.
function loiteringOf(text) {
  const parts = text.split(",").map((part) => part.trim()).filter(Boolean);
  if (parts.length === 0) return undefined;
  if (parts.length === 1 && Number(parts[0]) > 0) return Number(parts[0]);
  const found = parts.map((part) => /^(.+?)[\s:=]+(\d+(?:\.\d+)?)$/.exec(part));
  return found.every((each) => each && Number(each[2]) > 0) ? Object.fromEntries(found.map((each) => [each[1], Number(each[2])])) : null;
}

byId("shape-remove").addEventListener("click", () => {
  draft.shapes.splice(draft.selected, 1);
  draft.selected = null;
  refresh();
});
byId("shape-cancel").addEventListener("click", stopDrawing);

// All that was ordered of this camera is forgotten, not only its shapes: the node's configuration file counts again.
byId("shape-reset").addEventListener("click", async () => {
  const answer = await request(`/cameras/${encodeURIComponent(camera.id)}/changes`, { method: "DELETE" });
  if (answer.ok) stopDrawing();
  else tell((await answer.json()).error?.message ?? `the node answered with status ${answer.status}`, true);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!draft || byId("shape-save").disabled) return;
  byId("shape-save").disabled = true;
  tell("Saving …");
  try {
    const answer = await request(`/cameras/${encodeURIComponent(camera.id)}`,
      { method: "PATCH", headers: { "Content-Type": "application/json" }, body: JSON.stringify(settingsOf(draft.shapes)) });
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.error?.message ?? `the node answered with status ${answer.status}`);
    camera = told;
    stopDrawing();
  } catch (error) {
    tell(error.message, true);
  } finally {
    byId("shape-save").disabled = false;
  }
});

function tell(text, isWrong = false) {
  byId("shape-words").textContent = text;
  byId("shape-words").classList.toggle("wrong", isWrong);
}
