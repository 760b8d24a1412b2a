// Orders to a node: asked about first where they change something, then followed to their final result. One at a time.
import { byId, make, postJson } from "./dom.js";
import { tone } from "./words.js";

const REASON = "from the fleet's page";
export const ORDERS = {
  drain: {
    label: "Drain", deadlineS: 90, args: { reason: REASON },
    words: "It finishes the requests that it has, and takes none until it is told to stand by.",
  },
  standby: { label: "Standby", deadlineS: 90, args: { reason: REASON }, words: "It ends its lease, and is again among those that may be called." },
  "agent.restart": {
    label: "Restart", deadlineS: 180, args: { reason: REASON },
    words: "Its service ends as for an update and is started again: requests are finished first, cameras stand still meanwhile.",
  },
  ping: { label: "Ping", deadlineS: 20, args: {} },
};
let last = null; // { node, op, id, status, isFinal, words }

export const hasOpenOrder = () => last !== null && !last.isFinal;

export const orderKey = () => (last ? `${last.id} ${last.status}` : "");

export async function order(node, op) {
  if (hasOpenOrder() || (ORDERS[op].words && !(await isMeant(node, op)))) return;
  const { args, deadlineS } = ORDERS[op];
  last = { node, op, id: null, status: "sending", isFinal: false, words: "" };
  drawOrder(node);
  try {
    const body = { op, args, deadline_s: deadlineS };
    const answer = await postJson(`/fleet/${encodeURIComponent(node)}/commands`, body, AbortSignal.timeout(10000));
    const told = await answer.json();
    if (!answer.ok) throw new Error(typeof told.detail === "string" ? told.detail : `status ${answer.status}`);
    Object.assign(last, { id: told.id, status: "issued", words: told.is_sent ? "" : "the coordinator has no broker now; the order waits for it" });
  } catch (error) {
    Object.assign(last, { status: "not given", isFinal: true, words: error.message });
  }
  drawOrder(node);
  dispatchEvent(new Event("look"));
}

function isMeant(node, op) {
  const dialog = byId("confirm-dialog");
  byId("confirm-title").textContent = `${ORDERS[op].label} ${node}?`;
  byId("confirm-words").textContent = ORDERS[op].words;
  byId("confirm-yes").textContent = ORDERS[op].label;
  byId("confirm-yes").className = op === "standby" ? "" : "danger";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export async function followOrder(read) {
  if (!hasOpenOrder() || !last.id) return;
  const followed = last;
  const answer = await read(`/commands/${encodeURIComponent(followed.id)}`);
  if (answer.status === 404) Object.assign(followed, { status: "forgotten", isFinal: true, words: "the coordinator no longer knows it" });
  if (!answer.ok) return;
  const { status, is_final: isFinal, result } = await answer.json();
  const progress = typeof result?.progress === "number" && !isFinal ? `${Math.round(result.progress * 100)} %` : "";
  const words = result?.error ? `${result.error.code}: ${result.error.message}` : [progress, isFinal ? "" : result?.step].filter(Boolean).join(" ");
  Object.assign(followed, { status, isFinal, words: words || (status === "issued" ? followed.words : "") });
  if (status === "expired") followed.words = "nobody answered in time";
  drawOrder(followed.node);
}

export function drawOrder(node) {
  const line = byId("node-order");
  const text = last?.node === node ? `${ORDERS[last.op].label}: ` : "";
  const status = text ? last.status.replaceAll("_", " ") : "";
  const words = text && last.words ? ` · ${last.words}` : "";
  if (line.textContent === text + status + words) return;
  line.replaceChildren(...(text ? [text, make("b", { textContent: status, "data-tone": tone(last.status) || (last.status === "not given" ? "bad" : "") }), words] : []));
}
