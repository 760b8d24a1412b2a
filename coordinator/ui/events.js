// What nodes told unasked, the newest first; older ones page by page.
import { byId, make, request } from "./dom.js";
import { clock, cut, pill } from "./words.js";

const PAGE = 50;
const MOST = 1000; // in the page
let first = 0; // the oldest that is shown
let last = null; // the newest

export async function showEvents(newest, read) {
  if (newest === last) return;
  const isGap = last === null || newest < last || newest - last > 200; // at the beginning, another record, or long away
  const answer = await read(isGap ? `/events?limit=${PAGE}` : `/events?after=${last}&limit=200`);
  if (!answer.ok) return;
  const events = await answer.json();
  if (isGap) byId("events").replaceChildren();
  last = newest;
  if (events.length === 0) return;
  last = Math.max(newest, events.at(-1).number);
  if (isGap) first = events[0].number;
  byId("events").prepend(...events.reverse().map(entry));
  while (byId("events").children.length > MOST) {
    byId("events").lastElementChild.remove();
    first = Number(byId("events").lastElementChild.dataset.number);
  }
  tidy(isGap ? events.length : PAGE);
}

function tidy(came) {
  byId("events-empty").hidden = byId("events").children.length > 0;
  byId("events-older").hidden = first <= 1 || came < PAGE || byId("events").children.length >= MOST;
}

function entry(event) {
  return make("li", { "data-number": String(event.number) },
    make("time", { dateTime: event.ts, textContent: clock(event.ts) }), pill(event.sev), make("strong", { textContent: event.node }),
    make("span", { textContent: event.class }), make("span", { className: "data", textContent: dataWords(event.data ?? {}) }));
}

// `message` and `reason` are for people; all else is told as it is.
function dataWords({ message, reason, ...rest }) {
  const others = Object.keys(rest).length ? JSON.stringify(rest) : "";
  return cut([message, reason, others].filter(Boolean).map(String).join(" · "), 400);
}

byId("events-older").addEventListener("click", async () => {
  const button = byId("events-older");
  button.disabled = true;
  try {
    const answer = await request(`/events?before=${first}&limit=${PAGE}`, { signal: AbortSignal.timeout(10000) });
    if (!answer.ok) return;
    const events = await answer.json();
    if (events.length) first = events[0].number;
    byId("events").append(...events.reverse().map(entry));
    tidy(events.length);
  } catch {
    // the page says already that the coordinator does not answer
  } finally {
    button.disabled = false;
  }
});
