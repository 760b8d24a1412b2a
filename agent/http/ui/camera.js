// The live picture of one camera: a Motion JPEG stream at a time, none while nobody looks; what is drawn on it and counted below it.
import { apiKey, byId, changed, make, request } from "./dom.js";
import { pictures } from "./mjpeg.js";
import { drawShapes, isDrawing, stopDrawing } from "./zones.js";

const picture = byId("picture");
const words = byId("camera-words");
let chosen = null;
let isOpen = false;
let retryMs = 1000;
let timer = null;
let blobUrl = null;
let stream = null; // what ends a stream that is fetched

export const chosenCamera = () => chosen;

// `health` says in words how each camera is.
export function showCamera(pipelines, health) {
  if (!pipelines.some((pipeline) => pipeline.id === chosen)) chooseCamera(pipelines.length ? pipelines[0].id : null);
  const now = pipelines.find((pipeline) => pipeline.id === chosen);
  if (changed("camera-title", chosen)) byId("camera-title").textContent = chosen ? `Camera ${chosen}` : "Camera";
  drawFigures(now);
  const runs = now && now.status === "streaming";
  if (runs && !isOpen && !timer && !document.hidden) open();
  if (!runs) close(now ? health.get(now.id) ?? `Camera ${now.id} is ${now.status}. ${now.message}` : "No camera pipeline runs on this node.");
}

// How the chosen camera was told to see: its zones, lines and masks are drawn over the picture.
export function showDetails(camera) {
  byId("edit-shapes").hidden = !camera?.settings || isDrawing();
  const pause = byId("pause");
  pause.hidden = !camera?.settings;
  if (camera?.settings) pause.textContent = camera.settings.enabled === false ? "Resume" : "Pause";
  drawShapes(camera);
}

export function closeCamera() {
  close("Paused.");
}

export function chooseCamera(id) {
  if (id === chosen) return;
  close("");
  stopDrawing();
  chosen = id;
}

function open() {
  isOpen = true;
  words.hidden = false;
  words.textContent = "Waiting for the first picture …";
  const path = `/cameras/${encodeURIComponent(chosen)}`;
  if (apiKey()) watch(`${path}/stream.mjpg`); // an image element cannot send a key
  else picture.src = `${path}/stream.mjpg?t=${Date.now()}`;
  picture.hidden = false;
  picture.alt = `Live picture of camera ${chosen} with detected objects`;
}

async function watch(path) {
  const ours = stream = new AbortController();
  try {
    for await (const shown of pictures(path, ours.signal)) {
      if (ours.signal.aborted) return;
      const fresh = URL.createObjectURL(shown);
      picture.src = fresh;
      if (blobUrl) URL.revokeObjectURL(blobUrl);
      blobUrl = fresh;
    }
  } catch {
    // as when it ends
  }
  if (!ours.signal.aborted) failed();
}

byId("pause").addEventListener("click", async () => {
  const enabled = byId("pause").textContent === "Resume";
  byId("pause").disabled = true;
  try {
    const answer = await request(`/cameras/${encodeURIComponent(chosen)}`,
      { method: "PATCH", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ enabled }) });
    const told = await answer.json();
    if (answer.ok) showDetails(told);
    else byId("camera-health").textContent = told.error?.message ?? `the node answered with status ${answer.status}`;
  } finally {
    byId("pause").disabled = false;
  }
});

function close(text) {
  clearTimeout(timer);
  timer = null;
  isOpen = false;
  stream?.abort();
  stream = null;
  picture.hidden = true;
  picture.removeAttribute("src");
  words.hidden = false;
  words.textContent = text;
}

function failed() {
  if (!isOpen) return;
  close("The picture stream broke off; trying again …");
  timer = setTimeout(() => { timer = null; }, retryMs); // the next look at the node opens it
  retryMs = Math.min(retryMs * 2, 15000);
}

picture.addEventListener("error", failed);
picture.addEventListener("load", () => {
  words.hidden = true;
  retryMs = 1000;
});

function counted(count, truth) {
  if (count === undefined && truth === undefined) return "in view";
  return `in view · ${count ?? 0} counted${truth === undefined ? "" : ` of ${truth}`}`;
}

function drawFigures(now) {
  const figures = now && now.status === "streaming" ? `${now.model} · ${now.fps.toFixed(1)} frames/s · ${now.latency_ms.toFixed(0)} ms` : "";
  if (changed("camera-figures", figures)) byId("camera-figures").textContent = figures;
  const { objects, counts } = now || { objects: {}, counts: {} };
  const truth = Object.keys(counts).length > 0 ? now.truth : null; // without a line nothing is counted
  if (!changed("counts", [objects, counts, truth])) return;
  const names = [...new Set([...Object.keys(objects), ...Object.keys(counts), ...Object.keys(truth || {})])].sort();
  byId("counts").replaceChildren(...names.map((name) =>
    make("li", {}, make("span", { textContent: name }), make("b", { textContent: objects[name] ?? 0 }),
      make("span", { className: "quiet", textContent: counted(counts[name], truth?.[name]) }))));
}
