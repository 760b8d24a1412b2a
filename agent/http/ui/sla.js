// How well clients were served: two promises as numbers with their targets, and who answered in each of the last 48 hours.
import { byId, changed, make, request, small } from "./dom.js";

const PERIOD_MS = 5000;
const ANSWERS = ["primary", "cache", "local", "continued", "failed"];
const HOURS = 48;
const [WIDTH, HEIGHT] = [480, 96];
let asked = -Infinity;

// Called with each look at the node; asks seldom, and hides what a node without a record cannot tell.
export async function showSla() {
  if (performance.now() - asked < PERIOD_MS) return;
  asked = performance.now();
  try {
    const answer = await request("/sla", { signal: AbortSignal.timeout(5000) });
    const sla = answer.ok ? await answer.json() : null;
    byId("sla-card").hidden = sla === null;
    if (sla !== null) draw(sla);
  } catch {
    // The page's own banner says that the node cannot be reached.
  }
}

function draw(sla) {
  if (!changed("sla", { ...sla, primary: sla.primary && { ...sla.primary, since_s: 0, retry_s: 0 } })) return;
  byId("sla-primary").textContent = sla.primary ? primaryWords(sla.primary) : "";
  const day = sla.last_24_hours, month = sla.last_31_days, targets = sla.targets;
  byId("sla-facts").replaceChildren(
    promise("Availability, 24 hours", day.availability, targets.availability, 3),
    promise("Availability, 31 days", month.availability, targets.availability, 3),
    promise("Cloud calls saved, 24 hours", day.saved_share, targets.saved_share, 1),
    promise("Cloud calls saved, 31 days", month.saved_share, targets.saved_share, 1),
    fact("Answers, 24 hours", String(day.requests), ""),
    fact("First token, 95 %", day.first_token_ms.p95 === null ? "–" : `${Math.round(day.first_token_ms.p95)} ms`, ""));
  drawChart(sla.hours);
  byId("sla-legend").replaceChildren(...ANSWERS.filter((name) => month[name] > 0).map((name) =>
    make("li", { className: `sla-${name}`, textContent: `${name} ${month[name]}` })));
}

function primaryWords(primary) {
  if (primary.state === "closed") return "The primary answers.";
  return `The primary is not asked: ${primary.cause || "it is being tried"}.`;
}

function promise(label, share, target, digits) {
  if (share === null) return fact(label, "–", `target ${100 * target} %`);
  const value = Math.floor(share * 100 * 10 ** digits) / 10 ** digits;  // never rounded up to a promise
  return fact(label, `${value.toFixed(digits)} %`, `target ${100 * target} %, ${share >= target ? "met" : "missed"}`);
}

const fact = (label, value, words) =>
  make("div", {}, make("dt", { textContent: label }), make("dd", { textContent: value, "data-sla": label }, small(words ? ` ${words}` : "")));

function drawChart(hours) {
  const most = Math.max(1, ...hours.map((hour) => hour.requests));
  const last = hours.length ? Date.parse(hours.at(-1).from) : 0;
  const bars = hours.flatMap((hour) => {
    const x = (HOURS - 1 - (last - Date.parse(hour.from)) / 3600e3) * (WIDTH / HOURS);
    let y = HEIGHT;
    return ANSWERS.filter((name) => hour[name] > 0).map((name) => {
      const height = (hour[name] / most) * HEIGHT;
      y -= height;
      return bar(name, x, y, height, `${hour.from}: ${hour[name]} ${name}`);
    });
  });
  byId("sla-chart").replaceChildren(byId("sla-chart-title"), ...bars);
}

function bar(name, x, y, height, words) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = words;
  element.append(title);
  for (const [key, value] of Object.entries({ x: x + 0.5, y, width: WIDTH / HOURS - 1, height, class: `sla-${name}` })) element.setAttribute(key, value);
  return element;
}
