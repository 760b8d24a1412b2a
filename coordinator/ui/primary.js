// The primary in words, and its last hour as a strip: each probe's answer above, who answered its clients below.
import { byId, changed, make } from "./dom.js";
import { cut, span } from "./words.js";

const COLUMNS = 240; // of 15 s
const HOUR_S = 3600;
const [TOP, BAND_Y, BAND] = [50, 54, 10];
let shown = null;

export function drawPrimary(fleet) {
  const { primary } = fleet;
  const verdict = primary.is_down ? "down" : "up";
  if (changed("badge", verdict)) {
    byId("badge").textContent = `primary ${verdict}`;
    byId("badge").dataset.tone = primary.is_down ? "bad" : "good";
    document.title = `primary ${verdict} · Hotspare fleet`;
  }
  const probe = primary.last_probe;
  const online = fleet.nodes.filter((node) => node.is_online);
  const serving = online.filter((node) => node.mode === "active" || node.mode === "autonomous");
  byId("primary").textContent = primary.is_down ? "The primary is down" : "The primary answers";
  byId("probe").textContent = primary.is_down
    ? `${serving.length ? `${serving.length} ${serving.length === 1 ? "node answers" : "nodes answer"} for it.` : "No node answers for it."}`
    : primary.is_certain ? "Its clients are served by it." : "Taken for up until enough probes say so.";
  const facts = {
    "Last probe": probe ? `${cut(probe.reason, 100)}${probe.latency_ms ? `, ${Math.round(probe.latency_ms)} ms` : ""}` : "none yet",
    Certain: primary.is_certain ? "yes" : "not yet",
    Broker: fleet.broker_connected ? "connected" : "not connected",
    Term: String(fleet.term),
    "Nodes online": `${online.length} of ${fleet.nodes.length}`,
    Serving: String(serving.length),
  };
  if (changed("facts", facts)) {
    byId("facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { "data-fact": name, textContent: value }))));
  }
  drawProblems(fleet);
}

function drawProblems({ problems, rival, messages_dropped: dropped, broker_connected: isConnected }) {
  const named = Object.entries(problems).filter(([subject]) => subject !== "rival");
  if (rival) named.unshift(["rival", `coordinator ${rival} acts for this fleet; orders are given there`]);
  if (!isConnected && !problems.broker) named.unshift(["broker", "not connected; orders wait"]);
  if (dropped) named.push(["messages", `${dropped} could not be used and were dropped; the log says why`]);
  if (!changed("problems", named)) return;
  byId("problems").hidden = named.length === 0;
  byId("problems").replaceChildren(...named.slice(0, 20).map(([subject, words]) =>
    make("li", { "data-tone": subject === "messages" ? "warn" : "bad" }, make("b", { textContent: `${subject}: ` }), words)));
}

// Asked for only when there is news: a new stretch, another verdict.
export async function showPast(primary, read) {
  const key = `${primary.newest} ${primary.is_down}`;
  if (key === shown) return;
  const answer = await read("/primary");
  if (!answer.ok) return;
  drawPast(await answer.json());
  shown = key;
}

function drawPast({ past, now, interval_s: intervalS, url }) {
  const end = Date.parse(now);
  const least = Math.max(15, intervalS * 1.1);
  const seen = past.map((stretch) => ({ ...stretch, ageS: (end - Date.parse(stretch.began_at)) / 1000 })).filter(({ ageS }) => ageS <= HOUR_S);
  const slowest = Math.max(200, ...seen.map((stretch) => stretch.latency_ms ?? 0));
  const shapes = seen.flatMap((stretch, index) => {
    const untilS = index + 1 < seen.length ? seen[index + 1].ageS : 0;
    const width = (Math.min(stretch.ageS - untilS, 4 * least) || 1) * (COLUMNS / HOUR_S);
    const x = COLUMNS * (1 - stretch.ageS / HOUR_S);
    return columns(stretch, x, Math.max(0.8, width), slowest);
  });
  byId("past").replaceChildren(byId("past-title"), ...shapes);
  const probes = seen.reduce((sum, stretch) => sum + stretch.probes, 0);
  const failed = seen.reduce((sum, stretch) => sum + stretch.failed, 0);
  const reason = seen.findLast((stretch) => stretch.reason)?.reason;
  const since = seen.length ? `In the last ${span(Math.min(HOUR_S, seen[0].ageS))}` : "So far";
  const words = `${since}: ${probes} ${probes === 1 ? "probe" : "probes"} of ${url}, ${failed} failed${failed ? ` (last: ${reason})` : ""}.`;
  byId("past-words").textContent = words;
  byId("past-title").textContent = `The primary's last hour. ${words}`;
}

// Failed ones fill their share from above; the rest is as high as the slowest answer took long.
function columns(stretch, x, width, slowest) {
  const share = stretch.probes ? stretch.failed / stretch.probes : 0;
  const height = (1 - share) * Math.max(6, (TOP * (stretch.latency_ms ?? 0)) / slowest);
  const who = stretch.serving ? "node" : stretch.is_down ? "nobody" : "primary";
  const nodes = `${stretch.names.join(", ")}${stretch.serving > stretch.names.length ? ` and ${stretch.serving - stretch.names.length} more` : ""}`;
  const title = [
    new Date(stretch.began_at).toLocaleTimeString([], { hour12: false }),
    `${stretch.probes - stretch.failed} of ${stretch.probes} answered`,
    stretch.latency_ms === null ? "" : `${Math.round(stretch.latency_ms)} ms`,
    stretch.reason,
    stretch.serving ? `served by ${nodes}` : stretch.is_down ? "nobody served" : "",
  ].filter(Boolean).join(" · ");
  const parts = [rect(`past-${who}`, x, BAND_Y, width, BAND, title)];
  if (share > 0) parts.push(rect("past-failed", x, 0, width, share * TOP, title));
  if (share < 1) parts.push(rect("past-good", x, TOP - height, width, height, title));
  return parts;
}

const SVG = "http://www.w3.org/2000/svg";
function rect(name, x, y, width, height, words) {
  const element = document.createElementNS(SVG, "rect");
  const title = document.createElementNS(SVG, "title");
  title.textContent = words;
  element.append(title);
  for (const [key, value] of Object.entries({ x, y, width, height, class: name })) element.setAttribute(key, value);
  return element;
}
