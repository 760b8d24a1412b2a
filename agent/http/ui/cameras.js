// All cameras: a tile for each with a fresh picture and how it is in words; the chosen one is shown large.
import { chooseCamera, chosenCamera, showCamera, showDetails } from "./camera.js";
import { apiKey, byId, make, request } from "./dom.js";

const PERIOD_MS = 2000;
const tiles = new Map();
const health = new Map();
let pipelines = [];
let isAsking = false;
let askedMs = 0;

// Called once a second with what /node says; the rest is asked for here, at its own pace.
export function showCameras(now) {
  pipelines = now;
  showCamera(pipelines, health);
  drawTiles();
  if (!document.hidden && Date.now() - askedMs >= PERIOD_MS) look();
}

// After an order: what is shown should be what is so.
export function lookAgain() {
  askedMs = 0;
  look();
}

async function look() {
  if (isAsking) return;
  isAsking = true;
  askedMs = Date.now();
  try {
    const [all, one] = await Promise.all([read("/cameras"), chosenCamera() ? read(`/cameras/${encodeURIComponent(chosenCamera())}`) : null]);
    for (const camera of all?.data ?? []) {
      health.set(camera.id, camera.health);
      const tile = tiles.get(camera.id);
      if (tile) tile.words.textContent = camera.health.replace(`${camera.id}: `, "");
    }
    byId("camera-health").textContent = health.get(chosenCamera()) ?? "";
    showDetails(one?.id === chosenCamera() ? one : null);
    await refreshTiles();
  } catch {
    // the page says already that the node cannot be reached
  } finally {
    isAsking = false;
  }
}

async function read(path) {
  const answer = await request(path, { signal: AbortSignal.timeout(5000) });
  return answer.ok ? answer.json() : null;
}

// Live streams hold a connection each, and a browser has six for one server: tiles take single pictures, one after the other.
async function refreshTiles() {
  if (tiles.size < 2) return;
  for (const [id, tile] of tiles) {
    const now = pipelines.find((pipeline) => pipeline.id === id);
    if (now?.status !== "streaming") continue;
    const answer = await request(`/cameras/${encodeURIComponent(id)}/snapshot.jpg`, { signal: AbortSignal.timeout(8000) });
    if (!answer.ok) continue;
    const before = tile.image.src;
    tile.image.src = URL.createObjectURL(await answer.blob());
    tile.image.hidden = false;
    if (before.startsWith("blob:")) URL.revokeObjectURL(before);
  }
}

function drawTiles() {
  for (const id of [...tiles.keys()]) if (!pipelines.some((pipeline) => pipeline.id === id)) tiles.delete(id);
  for (const { id } of pipelines) if (!tiles.has(id)) tiles.set(id, tile(id));
  const wanted = pipelines.length < 2 ? [] : pipelines.map((pipeline) => tiles.get(pipeline.id).element);
  const list = byId("tiles");
  list.hidden = wanted.length === 0;
  if (wanted.length !== list.children.length || wanted.some((element, index) => list.children[index] !== element)) list.replaceChildren(...wanted);
  for (const { id, status } of pipelines) {
    const { button } = tiles.get(id);
    button.setAttribute("aria-pressed", String(id === chosenCamera()));
    button.dataset.state = status;
  }
}

function tile(id) {
  const image = make("img", { alt: "", hidden: true });
  const words = make("small", { className: "quiet" });
  const button = make("button", { type: "button", className: "tile", "aria-label": `Show camera ${id}` },
    make("span", { className: "frame" }, image), make("strong", { textContent: id }), words);
  button.addEventListener("click", () => {
    chooseCamera(id);
    showDetails(null);
    showCamera(pipelines, health);
    drawTiles();
    lookAgain();
  });
  return { element: make("li", {}, button), button, image, words };
}

export const mediaSource = async (path) => {
  if (!apiKey()) return path; // elements load it themselves, in parts where they want
  const answer = await request(path);
  return answer.ok ? URL.createObjectURL(await answer.blob()) : "";
};
