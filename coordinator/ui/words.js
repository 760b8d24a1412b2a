// Words for what nodes and orders are in, and the tone of each: a colour never stands alone.
import { make } from "./dom.js";

export const URGENCY = ["", "", "warn", "bad"];
export const AWAY = { will: "lost", silent: "silent", unknown: "unknown", shutdown: "away", update: "away", reboot: "away" };
const TONES = {
  active: "good", degraded: "bad", autonomous: "warn", draining: "warn", starting: "warn", standby: "calm",
  serving: "good", ready: "good", running: "good", building: "warn", paused: "warn", stopped: "warn", failed: "bad", previous: "",
  succeeded: "good", rejected: "bad", timed_out: "bad", expired: "bad", cancelled: "warn", info: "", warning: "warn", error: "bad",
};
export const tone = (word) => (Object.hasOwn(TONES, word) ? TONES[word] : "");
export const pill = (word, tint = tone(word)) => make("span", { className: "pill", textContent: word.replaceAll("_", " "), "data-tone": tint });
export const cell = (label, ...children) => make("td", { "data-label": label }, ...children);

// Numbers and their units stay on one line.
export const ago = (seconds) => (seconds < 1 ? "now" : `${span(seconds)} ago`);
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 120) return `${whole}\u00a0s`;
  if (whole < 7200) return `${Math.floor(whole / 60)}\u00a0min`;
  if (whole < 172800) return `${Math.floor(whole / 3600)}\u00a0h`;
  return `${Math.floor(whole / 86400)}\u00a0days`;
}

export function clock(stamp) {
  const time = new Date(stamp);
  if (Number.isNaN(time.getTime())) return String(stamp);
  const today = time.toDateString() === new Date().toDateString();
  const hours = time.toLocaleTimeString([], { hour12: false });
  return today ? hours : `${time.toLocaleDateString([], { month: "short", day: "numeric" })} ${hours}`;
}

export const cut = (text, most) => (text.length > most ? `${text.slice(0, most)} …` : text);

// One list item for each trouble, coloured as urgent as the node is.
export const troubleList = (words, tint) => words.map((text) => make("li", { textContent: text, "data-tone": tint }));
