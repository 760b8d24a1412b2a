// What the cameras saw: pictures, clips and facts, the newest first, in pages.
import { mediaSource } from "./cameras.js";
import { byId, changed, duration, make, request } from "./dom.js";

const PERIOD_MS = 3000;
const PAGE = 12;
const MOST = 192; // that are renewed together: what goes on in them may change
const SVG = "http://www.w3.org/2000/svg";
const cards = new Map();
const known = { camera: new Set(), label: new Set(), zone: new Set() };
let older = null; // cursor of the next page
let pages = 1;
let hasNothing = true;
let isAsking = false;
let askedMs = 0;

// Called once a second while somebody looks.
export function showSightings(pipelines) {
  hasNothing = pipelines.length === 0;
  if (!isAsking && Date.now() - askedMs >= PERIOD_MS) look();
}

async function look() {
  isAsking = true;
  askedMs = Date.now();
  try {
    const page = await read(null, Math.min(pages * PAGE, MOST));
    byId("sightings-card").hidden = hasNothing && page.data.length === 0;
    const fresh = page.data.map((event) => event.id);
    take(page.data);
    if (pages * PAGE <= MOST) {
      older = page.next;
      for (const id of [...cards.keys()]) if (!fresh.includes(id)) forget(id);
    }
    draw();
  } catch {
    // the page says already that the node cannot be reached
  } finally {
    isAsking = false;
  }
}

async function read(cursor, limit) {
  const query = new URLSearchParams({ limit: String(limit) });
  for (const name of Object.keys(known)) if (byId(`filter-${name}`).value) query.set(name, byId(`filter-${name}`).value);
  if (cursor) query.set("cursor", cursor);
  const answer = await request(`/events?${query}`, { signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

function take(events) {
  for (const event of events) {
    known.camera.add(event.camera);
    known.label.add(event.label);
    for (const zone of event.zones) known.zone.add(zone);
    const before = cards.get(event.id);
    if (before && JSON.stringify(before.event) === JSON.stringify(event)) continue;
    cards.set(event.id, { event, element: card(event, before) });
  }
}

function forget(id) {
  const source = cards.get(id).element.querySelector("image")?.getAttribute("href");
  if (source?.startsWith("blob:")) URL.revokeObjectURL(source);
  cards.delete(id);
}

function draw() {
  const shown = [...cards.values()].sort((a, b) => (a.event.began_at < b.event.began_at ? 1 : -1)).map((each) => each.element);
  const list = byId("sightings");
  if (shown.length !== list.children.length || shown.some((element, index) => list.children[index] !== element)) list.replaceChildren(...shown);
  byId("sightings-empty").hidden = shown.length > 0;
  byId("sightings-older").hidden = !older;
  for (const [name, values] of Object.entries(known)) {
    const sorted = [...values].sort();
    const select = byId(`filter-${name}`);
    if (changed(`filter ${name}`, sorted)) {
      const chosen = select.value;
      select.replaceChildren(make("option", { value: "", textContent: `every ${name}` }), ...sorted.map((value) => make("option", { value, textContent: value })));
      select.value = chosen;
    }
    select.hidden = sorted.length < (name === "zone" ? 1 : 2);
  }
}

function card(event, before) {
  const button = make("button", { type: "button", className: "sighting", "data-event": event.id, "aria-label": `${event.label} on ${event.camera}, show the picture` },
    make("span", { className: "frame" }, ...thumbnail(event, before), ...badges(event)),
    make("strong", { textContent: event.label }),
    make("small", { className: "quiet", textContent: `${event.camera} · ${clock(event.began_at)} · ${span(event)}` }),
    make("span", { className: "tags" }, ...tags(event)));
  button.addEventListener("click", () => open(event));
  return make("li", {}, button);
}

// The part of the snapshot around the object, in the shape of a film frame.
function thumbnail(event, before) {
  if (!event.snapshot) return [];
  const image = shape("image", { width: event.width, height: event.height });
  const earlier = before?.element.querySelector("image");
  if (earlier && before.event.score === event.score && before.event.state === event.state) image.setAttribute("href", earlier.getAttribute("href"));
  // The best picture so far may change while the event is open: the address must, too.
  else mediaSource(`${event.snapshot}?score=${event.score}`).then((source) => image.setAttribute("href", source));
  const [x0, y0, x1, y1] = event.snapshot_box ?? [0, 0, event.width, event.height];
  const height = Math.min(event.height, Math.max(1.7 * (y1 - y0), (1.7 * (x1 - x0) * 9) / 16, event.height / 4));
  const width = Math.min(event.width, (height * 16) / 9);
  const within = (middle, size, limit) => Math.min(Math.max(0, middle - size / 2), limit - size);
  const drawing = shape("svg", { viewBox: `${within((x0 + x1) / 2, width, event.width)} ${within((y0 + y1) / 2, height, event.height)} ${width} ${height}`, preserveAspectRatio: "xMidYMid slice" });
  drawing.append(image);
  return [drawing];
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function badges(event) {
  return [event.state === "open" ? make("b", { className: "now", textContent: "now" }) : "", event.clip ? make("b", { className: "play", textContent: "▶ clip" }) : ""];
}

function tags(event) {
  return [
    ...event.zones.map((zone) => make("span", { className: "tag", textContent: zone })),
    ...event.loitering.map((zone) => make("span", { className: "tag loiters", textContent: `stays in ${zone}` })),
    ...event.crossed.map(({ line, direction }) => make("span", { className: "tag", textContent: `${direction === "forward" ? "→" : "←"} ${line}` })),
  ];
}

const clock = (iso) => new Date(iso).toLocaleTimeString([], { hour12: false });
const ENDS = { worker_lost: "cut off: the worker died", node_restarted: "cut off: the node was restarted" };
const span = (event) => (event.state === "open" ? "in view" : ENDS[event.ended_by] ?? duration(event.seen_for_s));

// ── one event, large ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

async function open(event) {
  const dialog = byId("sighting");
  dialog.dataset.event = event.id;
  byId("sighting-title").textContent = `${event.label} · ${event.camera} · ${new Date(event.began_at).toLocaleString([], { hour12: false })}`;
  byId("sighting-facts").textContent = facts(event);
  byId("sighting-media").replaceChildren();
  if (!dialog.open) dialog.showModal();
  if (event.snapshot) byId("sighting-media").replaceChildren(await large(event));
  // A clip is complete some seconds after its event: until then the picture is what there is.
  let now = event;
  while (now.clip_is_coming && dialog.open && dialog.dataset.event === event.id) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    const answer = await request(`/events/${encodeURIComponent(event.id)}`);
    if (!answer.ok) return;
    now = await answer.json();
    byId("sighting-facts").textContent = facts(now);
  }
  if (now.clip && dialog.open && dialog.dataset.event === event.id) await film(now);
}

async function large(event) {
  const image = make("img", { alt: `${event.label} as camera ${event.camera} saw it`, src: await mediaSource(`${event.snapshot}?score=${event.score}`) });
  const frame = make("div", { className: "stage" }, image);
  if (event.snapshot_box) {
    const [x0, y0, x1, y1] = event.snapshot_box;
    const drawing = shape("svg", { viewBox: `0 0 ${event.width} ${event.height}` });
    drawing.append(shape("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, class: "shape box" }));
    frame.append(drawing);
  }
  return frame;
}

async function film(event) {
  const video = make("video", { controls: true, autoplay: true, muted: true, loop: true, playsInline: true, src: await mediaSource(event.clip) });
  video.addEventListener("loadeddata", () => byId("sighting-media").replaceChildren(make("div", { className: "stage" }, video)));
}

function facts(event) {
  const parts = [`score ${event.score.toFixed(2)}`, span(event)];
  if (event.clip_is_coming) parts.push("its clip is still being written");
  for (const [zone, seconds] of Object.entries(event.dwell_s)) parts.push(`${duration(seconds)} in ${zone}`);
  for (const { line, direction } of event.crossed) parts.push(`crossed ${line} ${direction}`);
  return parts.join(" · ");
}

byId("sighting").addEventListener("close", () => {
  byId("sighting-media").replaceChildren();
});
byId("sighting-close").addEventListener("click", () => byId("sighting").close());
byId("sighting").addEventListener("click", (event) => { if (event.target === byId("sighting")) byId("sighting").close(); });

byId("sightings-older").addEventListener("click", async (event) => {
  event.currentTarget.disabled = true;
  try {
    const page = await read(older, PAGE);
    pages += 1;
    older = page.next;
    take(page.data);
    draw();
  } finally {
    byId("sightings-older").disabled = false;
  }
});

for (const name of Object.keys(known)) {
  byId(`filter-${name}`).addEventListener("change", () => {
    cards.clear();
    pages = 1;
    older = null;
    look();
  });
}
