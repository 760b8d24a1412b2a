// One node in detail: what it runs, what it is, what is wanted of it, what it was told, and what it can be told from here.
import { byId, changed, make } from "./dom.js";
import { wantedWords } from "./nodes.js";
import { ORDERS, drawOrder, hasOpenOrder, order, orderKey } from "./orders.js";
import { AWAY, URGENCY, ago, cell, clock, cut, pill, span, tone, troubleList } from "./words.js";

const PERIOD_MS = 10000; // without a change that the list shows
const OUTPUT_CHARACTERS = 20000;
const dialog = byId("node-dialog");
let open = null; // its name
let detail = null;
let wish = null; // the desired document
let seen = "";
let askedMs = 0;

export function openNode(name) {
  [open, detail, wish, seen] = [name, null, null, ""];
  byId("node-name").textContent = name;
  byId("node-parts").replaceChildren(make("p", { className: "quiet", textContent: "Asking the coordinator …" }));
  if (!dialog.open) dialog.showModal();
}

dialog.addEventListener("close", () => { open = null; });
byId("node-close").addEventListener("click", () => dialog.close());

// Asks again when its row has changed, while an order runs, and now and then.
export async function freshNode(fleet, read) {
  const node = open && fleet.nodes.find((one) => one.node === open);
  if (!node) return;
  const { silence_s: _, lease_left_s: __, said_at: ___, ...rest } = node;
  const key = JSON.stringify([open, rest, orderKey()]);
  if (key === seen && performance.now() - askedMs < PERIOD_MS) return;
  const path = `/fleet/${encodeURIComponent(open)}`, name = open;
  const answer = await read(path);
  if (!answer.ok) return;
  const fresh = await answer.json();
  const told = node.desired && node.desired.wanted !== wish?.rev ? await read(`${path}/desired`) : null;
  const newer = told?.ok ? await told.json() : wish;
  if (open !== name) return; // another one meanwhile
  [detail, wish, seen, askedMs] = [fresh, node.desired ? newer : null, key, performance.now()];
  drawNode(fleet);
}

export function drawNode(fleet) {
  if (!open) return;
  const node = fleet.nodes.find((one) => one.node === open);
  byId("node-state").textContent = !node ? "forgotten" : node.is_online ? node.mode : AWAY[node.presence] ?? node.presence;
  byId("node-state").dataset.tone = node?.is_online ? tone(node.mode) : "bad";
  drawActions(node);
  drawOrder(open);
  if (!node) return;
  if (changed("node-troubles", [node.troubles, node.urgency])) {
    byId("node-troubles").hidden = node.troubles.length === 0;
    byId("node-troubles").replaceChildren(...troubleList(node.troubles, URGENCY[node.urgency]));
  }
  drawFacts(node);
  if (detail) drawParts();
}

// Each part by itself: what somebody has unfolded in one stays so while another changes.
const PARTS = [models, cameras, commands, wished, hardware];
function drawParts() {
  const given = [detail.state?.models, detail.state?.pipelines, detail.commands, wish, [detail.meta, detail.heartbeat?.temp_c]];
  const places = byId("node-parts");
  if (places.children.length !== PARTS.length) places.replaceChildren(...PARTS.map(() => make("div")));
  PARTS.forEach((part, index) => {
    if (changed(`node-part ${index}`, [open, given[index]]) || places.children[index].childElementCount === 0) {
      places.children[index].replaceChildren(...[part()].filter(Boolean));
    }
  });
}

function drawActions(node) {
  const known = detail?.meta?.ops ?? [];
  const shown = Object.keys(ORDERS).filter((op) => node && known.includes(op));
  if (changed("node-actions", [open, shown])) {
    byId("node-actions").replaceChildren(...shown.map((op) => {
      const button = make("button", { type: "button", className: "plain", textContent: ORDERS[op].label, "data-op": op });
      button.addEventListener("click", () => order(open, op));
      return button;
    }));
  }
  for (const button of byId("node-actions").children) button.disabled = hasOpenOrder();
}

function drawFacts(node) {
  const beat = detail?.heartbeat;
  const facts = {
    Lease: node.lease && node.lease_left_s > 0 ? `${node.lease}, ${span(node.lease_left_s)} left` : "none",
    Epoch: String(node.epoch),
    Drained: node.is_drained ? "yes" : "no",
    Wanted: wantedWords(node.desired),
    Heard: node.silence_s === null ? "not since this coordinator began" : ago(node.silence_s),
    "Chat model": node.is_ready ? "serves" : "none serves",
    Requests: beat?.http ? `${beat.http.inflight} now, ${beat.http.rps.toFixed(1)} per s` : "–",
    Power: beat?.power_w ? `${beat.power_w.toFixed(1)} W` : "–",
    Waiting: beat?.outbox ? `${beat.outbox.n} messages, ${beat.outbox.dropped} dropped` : "–",
  };
  if (!changed("node-facts", facts)) return;
  byId("node-facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
}

function section(title, ...children) {
  return make("section", { "aria-label": title }, make("h3", { textContent: title }), ...children);
}

function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col", textContent: name })));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function models() {
  const known = detail.state?.models ?? [];
  if (known.length === 0) return section("Models", make("p", { className: "quiet", textContent: "None." }));
  return section("Models", table(["Model", "Task", "Status", "What it says"], known.map((model) => make("tr", {},
    make("td", {}, make("strong", { textContent: model.name })), cell("Task", model.task ?? ""), cell("Status", pill(model.status)),
    cell("Says", model.message ?? "")))));
}

function cameras() {
  const known = detail.state?.pipelines ?? [];
  if (known.length === 0) return null;
  return section("Cameras", table(["Camera", "Status", "Frames", "What it says"], known.map((camera) => make("tr", {},
    make("td", {}, make("strong", { textContent: camera.id })), cell("Status", pill(camera.status)),
    cell("Frames", typeof camera.fps === "number" ? `${camera.fps.toFixed(1)} per s${camera.is_slowed ? ", slowed for requests" : ""}` : ""),
    cell("Says", camera.message ?? "")))));
}

function commands() {
  if (detail.commands.length === 0) return section("Orders", make("p", { className: "quiet", textContent: "None yet." }));
  return section("Orders, the newest first", table(["Given", "Order", "Status", "Result"], detail.commands.map((command) => {
    const { error, output, step } = command.result ?? {};
    const said = error ? `${error.code}: ${error.message}` : (!command.is_final && step) || "";
    return make("tr", {},
      make("td", { textContent: clock(command.issued_at) }), cell("Order", command.op), cell("Status", pill(command.status)),
      cell("Result", said, output && Object.keys(output).length ? folded("output", output) : ""));
  })));
}

function folded(name, value) {
  return make("details", {}, make("summary", { textContent: name }), make("pre", { textContent: cut(JSON.stringify(value, null, 1), OUTPUT_CHARACTERS) }));
}

function wished() {
  if (!wish) return null;
  const names = wish.models.map((model) => model.name).join(", ") || "no model";
  const pipelines = wish.pipelines.map((one) => make("li", { textContent: `${one.id}: ${one.source}, ${one.model}` }));
  return section(`Wanted: revision ${wish.rev}`, make("p", { textContent: names }), make("ul", { className: "problems" }, ...pipelines),
    folded("the document", wish));
}

function hardware() {
  const { meta, heartbeat: beat } = detail;
  if (!meta) return null;
  const facts = [
    ["Device", [meta.hw?.module, meta.hw?.mem_mb && `${(meta.hw.mem_mb / 1024).toFixed(1)} GB`].filter(Boolean).join(", ")],
    ["Address", meta.endpoint ? `${meta.endpoint.host}:${meta.endpoint.port}` : "none"],
    ["Agent", meta.agent],
    ["Certificate", meta.cert_exp ? `until ${meta.cert_exp.slice(0, 10)}` : "–"],
    ["Temperatures", Object.entries(beat?.temp_c ?? {}).map(([zone, degrees]) => `${zone} ${Math.round(degrees)} °C`).join(", ") || "–"],
    ...Object.entries(meta.sw ?? {}),
  ];
  return section("Hardware and software", make("dl", {}, ...facts.map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })))));
}
