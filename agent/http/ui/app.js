// Asks /node once a second while somebody looks, and draws what changed.
import { closeCamera } from "./camera.js";
import { showCameras } from "./cameras.js";
import { showModels } from "./chat.js";
import { byId, changed, duration, make, onKeyWanted, pill, postJson, request, small, tone } from "./dom.js";
import { showSightings } from "./events.js";
import { drawModels } from "./models.js";
import { showSla } from "./sla.js";

const PERIOD_MS = 1000;
let timer = null;
let failures = 0;

async function look() {
  clearTimeout(timer);
  try {
    const answer = await request("/node", { signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(`the node answers with status ${answer.status}`);
    draw(await answer.json());
    failures = 0;
    byId("banner").hidden = true;
  } catch (error) {
    failures += 1;
    if (failures > 1) lost(error);
  }
  if (!document.hidden) timer = setTimeout(look, Math.min(PERIOD_MS * Math.max(1, failures), 5000));
}

function lost(error) {
  byId("banner").textContent = `The node cannot be reached: ${error.message}. This page goes on trying.`;
  byId("banner").hidden = false;
  drawMode("offline", "");
  closeCamera();
}

function draw(now) {
  drawMode(now.mode, now.node);
  byId("node").textContent = now.node;
  drawState(now);
  drawDemo(now.demo);
  showCameras(now.pipelines);
  showSightings(now.pipelines);
  showModels(now.models);
  drawModels(now.models);
  showSla();
  if (changed("workers", now.workers)) byId("workers").replaceChildren(...now.workers.map(workerRow));
  if (changed("events", now.events)) byId("events").replaceChildren(...[...now.events].sort((a, b) => b.number - a.number).map(eventRow));
  byId("version").textContent = `Hotspare ${now.version}`;
}

function drawMode(mode, node) {
  if (!changed("mode", [mode, node])) return;
  byId("mode").textContent = mode;
  byId("mode").dataset.mode = mode;
  document.title = `${mode} · ${node || "Hotspare"}`;
}

function drawState(now) {
  const serves = now.mode === "standby" ? "Ready to serve" : "Serving requests";
  byId("serving").textContent = now.serving ? serves : "Not serving requests";
  byId("reason").textContent = now.reason_words;
  const lease = now.lease_left_s === null ? "none" : `${now.lease_kind === "contingent" ? "contingent, " : ""}${duration(now.lease_left_s)}`;
  const facts = { Lease: lease, Epoch: now.epoch, Uplink: now.uplink, "Up for": duration(now.uptime_s), Device: deviceWords(now.device) };
  const list = byId("facts");
  if (list.children.length === 0) {
    list.append(...Object.keys(facts).map((name) => make("div", {}, make("dt", { textContent: name }), make("dd", { "data-fact": name }))));
  }
  for (const entry of list.querySelectorAll("dd")) entry.textContent = facts[entry.dataset.fact];
}

// What is measured: a PC says less than a Jetson.
function deviceWords(device) {
  const hottest = Math.max(...Object.values(device.temperatures_c));
  const words = [
    device.cpu_percent !== null && `CPU ${Math.round(device.cpu_percent)} %`,
    device.gpu_percent !== null && `GPU ${Math.round(device.gpu_percent)} %`,
    device.memory_total_mb && `${(device.memory_used_mb / 1024).toFixed(1)} of ${(device.memory_total_mb / 1024).toFixed(1)} GB`,
    Number.isFinite(hottest) && `${Math.round(hottest)} °C`,
    device.power_w !== null && `${device.power_w.toFixed(1)} W`,
    device.is_throttled && "throttled",
  ];
  return words.filter(Boolean).join(" · ") || "not measured";
}

function drawDemo(demo) {
  byId("demo").hidden = !demo || demo.primary_is_on === null;
  if (!demo || demo.primary_is_on === null || !changed("demo", demo)) return;
  byId("primary").setAttribute("aria-checked", String(demo.primary_is_on));
  byId("primary-words").textContent = demo.primary_is_on
    ? "Answers. Switch it off: this node takes over."
    : "Off: its requests fail. Switch it on: this node steps down.";
}

byId("primary").addEventListener("click", async (event) => {
  const button = event.currentTarget;
  button.disabled = true;
  try {
    await postJson("/demo/primary", { on: button.getAttribute("aria-checked") !== "true" });
  } finally {
    button.disabled = false;
  }
  look();
});

const cell = (label, ...children) => make("td", { "data-label": label }, ...children);

function workerRow(worker) {
  return make("tr", {},
    make("td", {}, make("strong", { textContent: worker.name }), small(worker.message)), cell("Status", pill(worker.status)),
    cell("Process", String(worker.pid ?? "–")), cell("Memory", `${Math.round(worker.memory_bytes / 1048576)} MiB`),
    cell("Restarts", String(worker.restarts)));
}

function eventRow(event) {
  const time = new Date(event.at);
  const clock = Number.isNaN(time.getTime()) ? event.at : time.toLocaleTimeString([], { hour12: false });
  return make("li", { "data-tone": tone(event.severity) }, make("time", { dateTime: event.at, textContent: clock }),
    make("span", { className: "kind", textContent: event.kind }), make("span", { textContent: event.message }));
}

onKeyWanted(() => {
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
});
byId("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("hotspare-key", byId("key").value);
  byId("key").value = "";
  look();
});
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.hidden) closeCamera();
  else look();
});
look();
