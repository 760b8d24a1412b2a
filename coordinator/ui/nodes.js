// The table of all nodes: trouble first, filtered by words, a row drawn anew only when the node has changed.
import { byId, changed, make, small } from "./dom.js";
import { AWAY, URGENCY, ago, cell, clock, cut, pill, span } from "./words.js";

const PAGE = 100;
const rows = new Map();
let fleet = { nodes: [] };
let most = PAGE;
let choose = () => {};
export const onChosen = (call) => { choose = call; };

export function drawNodes(now) {
  fleet = now;
  const names = new Set(now.nodes.map((node) => node.node));
  for (const name of [...rows.keys()]) if (!names.has(name)) rows.delete(name);
  arrange();
}

function arrange() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const troubled = byId("only-trouble").checked;
  const fits = (node) => (!troubled || node.urgency > 1) && words.every((word) => haystack(node).includes(word));
  const fitting = fleet.nodes.filter(fits).sort((a, b) => b.urgency - a.urgency || (a.node < b.node ? -1 : 1));
  const wanted = fitting.slice(0, most).map(rowOf);
  place(byId("nodes"), wanted);
  const troubles = fleet.nodes.filter((node) => node.urgency > 1).length;
  const shown = fitting.length === fleet.nodes.length ? `${fitting.length}` : `${fitting.length} of ${fleet.nodes.length}`;
  const count = `${shown} ${fleet.nodes.length === 1 ? "node" : "nodes"}, ${troubles || "none"} with trouble`;
  if (changed("nodes-count", count)) byId("nodes-count").textContent = count;
  byId("nodes-table").hidden = fitting.length === 0;
  byId("nodes-empty").hidden = fitting.length > 0;
  byId("nodes-empty").textContent = fleet.nodes.length ? "No node fits the filter." : "No node has registered yet.";
  byId("nodes-more").hidden = fitting.length <= most;
  byId("nodes-more").textContent = `Show more (${fitting.length - most})`;
}

const haystack = (node) => [
  node.node, node.is_online ? "online" : `offline ${node.presence}`, node.mode, node.lease ?? "", node.agent ?? "", node.module ?? "",
  node.is_drained ? "drained" : "", ...node.troubles, ...node.model_states.flatMap(({ name, status }) => [name, status]), ...node.models,
].join(" ").toLowerCase();

// Elements that stay are left where they are, and who has the focus keeps it.
function place(body, wanted) {
  if (wanted.length === body.children.length && wanted.every((element, index) => body.children[index] === element)) return;
  const focused = document.activeElement;
  body.replaceChildren(...wanted);
  if (focused && focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
}

// What moves by itself is written into the row that is there.
function rowOf(node) {
  const { silence_s: _, lease_left_s: __, said_at: ___, cpu, gpu, hottest_c: hottest, mem_mb: used, ...rest } = node;
  const text = JSON.stringify(rest);
  let known = rows.get(node.node);
  if (known?.text !== text) {
    const button = known?.button ?? nameButton(node.node);
    known = { ...made(node, button), text, button };
    rows.get(node.node)?.element.replaceWith(known.element);
    rows.set(node.node, known);
  }
  const moving = JSON.stringify([cpu, gpu, hottest, used, node.lease_left_s === null ? null : Math.round(node.lease_left_s), heard(node)]);
  if (known.moving !== moving) {
    known.moving = moving;
    known.lease.replaceChildren(...leaseWords(node));
    known.device.replaceChildren(...deviceWords(node));
    known.heard.replaceChildren(heard(node));
  }
  return known.element;
}

function nameButton(name) {
  const button = make("button", { type: "button", className: "name", textContent: name });
  button.addEventListener("click", () => choose(name));
  return button;
}

function made(node, button) {
  const lease = cell("Lease"), device = cell("Device"), since = cell("Heard");
  const element = make("tr", { "data-urgency": String(node.urgency), "data-node": node.node },
    make("td", {}, button, small(node.module && node.module !== "unknown" ? node.module : "")),
    cell("State", ...stateWords(node)), lease, cell("Models", ...modelWords(node)), cell("Cameras", cameraWords(node)),
    device, cell("Wanted", wantedWords(node.desired)), cell("Agent", node.agent ?? "–"), since);
  return { element, lease, device, heard: since, moving: null };
}

function stateWords(node) {
  const tint = URGENCY[node.urgency];
  return [
    node.is_online ? pill(node.mode) : pill(AWAY[node.presence] ?? node.presence, tint || "warn"), node.is_drained ? " · drained" : "",
    ...node.troubles.map((words) => make("small", { className: "trouble", "data-tone": tint, textContent: cut(words, 200) })),
  ];
}

function leaseWords(node) {
  const left = node.lease_left_s;
  const lease = node.lease && left > 0 ? `${node.lease}, ${span(left)}` : "none";
  return [lease, small(`epoch ${node.epoch}`)];
}

function modelWords(node) {
  const states = node.model_states.map(({ name, status }) => make("div", {}, name, ...(status === "serving" ? [] : [" ", pill(status)])));
  const more = node.model_count - node.model_states.length;
  return states.length ? [...states, more > 0 ? small(`and ${more} more`) : ""] : ["–"];
}

const cameraWords = ({ pipelines }) => Object.entries(pipelines).map(([status, count]) => `${count} ${status}`).join(", ") || "–";

function deviceWords(node) {
  const words = [
    node.hottest_c !== null && `${Math.round(node.hottest_c)}\u00a0°C`, node.cpu !== null && `CPU\u00a0${Math.round(node.cpu)}\u00a0%`,
    node.gpu !== null && `GPU\u00a0${Math.round(node.gpu)}\u00a0%`,
  ].filter(Boolean).join(" · ");
  const gigabytes = (megabytes) => (megabytes / 1024).toFixed(1);
  const memory = node.mem_mb === null ? "" : `${gigabytes(node.mem_mb)}${node.mem_total_mb ? ` of ${gigabytes(node.mem_total_mb)}` : ""} GB`;
  return words || memory ? [words || memory, small(words ? memory : "")] : ["–"];
}

export function wantedWords(desired) {
  if (!desired) return "–";
  const { wanted, taken, applied } = desired;
  if (applied >= wanted) return `${wanted}, runs`;
  return taken >= wanted ? `${wanted}, taken` : `${wanted}, has ${taken}`;
}

function heard(node) {
  if (node.silence_s !== null) return ago(node.silence_s);
  return node.said_at ? clock(node.said_at) : "never";
}

for (const [id, kind] of [["filter", "input"], ["only-trouble", "change"]]) {
  byId(id).addEventListener(kind, () => {
    most = PAGE;
    arrange();
  });
}
byId("nodes-more").addEventListener("click", () => {
  most += PAGE;
  arrange();
});
