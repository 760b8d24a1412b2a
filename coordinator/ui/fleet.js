// Asks /fleet every two seconds while somebody looks, one request at a time, and for more only where there is more.
import { byId, changed, onKeyWanted, request } from "./dom.js";
import { showEvents } from "./events.js";
import { drawNode, freshNode, openNode } from "./node.js";
import { drawNodes, onChosen } from "./nodes.js";
import { followOrder, hasOpenOrder } from "./orders.js";
import { drawPrimary, showPast } from "./primary.js";

const PERIOD_MS = 2000;
const ORDER_MS = 500; // while an order is under way
const DEADLINE_MS = 10000;

let timer = null;
let isLooking = false;
let isWanted = false; // somebody asked for a look meanwhile
let askedMs = -Infinity;
let fleet = null;

export async function read(path) {
  const answer = await request(path, { signal: AbortSignal.timeout(DEADLINE_MS) });
  if (answer.status === 401) throw new Refused();
  return answer;
}

class Refused extends Error {}

async function look(now = false) {
  clearTimeout(timer);
  if (isLooking || byId("key-dialog").open) {
    isWanted ||= now;
    return;
  }
  isLooking = true;
  try {
    if (now || performance.now() - askedMs >= PERIOD_MS - 50) await lookAtFleet();
    if (fleet) {
      await showPast(fleet.primary, read);
      await showEvents(fleet.last_event, read);
      await followOrder(read);
      await freshNode(fleet, read);
    }
    found();
  } catch (error) {
    if (!(error instanceof Refused)) lost(error);
  } finally {
    isLooking = false;
  }
  if (isWanted) {
    isWanted = false;
    look(true);
  } else if (!document.hidden) {
    timer = setTimeout(look, hasOpenOrder() ? ORDER_MS : PERIOD_MS);
  }
}

async function lookAtFleet() {
  askedMs = performance.now();
  const answer = await read("/fleet");
  if (!answer.ok) throw new Error(`it answers with status ${answer.status}`);
  fleet = await answer.json();
  draw();
}

function draw() {
  if (changed("name", fleet.coordinator)) byId("about").textContent = `coordinator ${fleet.coordinator}`;
  drawPrimary(fleet);
  drawNodes(fleet);
  drawNode(fleet);
}

// Said once, not with each failed look: it is read aloud.
let answeredAt = null;
function found() {
  answeredAt = new Date();
  byId("banner").hidden = true;
  document.querySelector("main").classList.remove("stale");
}

function lost(error) {
  if (!byId("banner").hidden) return;
  const since = answeredAt ? ` What is shown is from ${answeredAt.toLocaleTimeString([], { hour12: false })}.` : "";
  byId("banner").textContent = `The coordinator does not answer: ${error.message}.${since} This page goes on trying.`;
  byId("banner").hidden = false;
  byId("badge").textContent = "no answer";
  byId("badge").dataset.tone = "bad";
  changed("badge", null);
  document.querySelector("main").classList.add("stale");
}

onKeyWanted(() => {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  if (sessionStorage.getItem("hotspare-key")) byId("key-words").textContent = "The coordinator does not take this token. Give the one in its file.";
  dialog.showModal();
});
byId("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("hotspare-key", byId("key").value);
  byId("key").value = "";
});
byId("key-dialog").addEventListener("close", () => look(true));
onChosen((name) => {
  openNode(name);
  if (fleet) drawNode(fleet);
  look(true);
});
addEventListener("look", () => look(true)); // from where an order was given
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : look(true)));
look(true);
