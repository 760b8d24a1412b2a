// Small things that every part of the page uses. Text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("data-") || name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

// A state in one word, its colour by what it means.
const TONES = {
  serving: "good", ready: "good", running: "good", streaming: "good", starting: "warn", preparing: "warn", building: "warn", paused: "warn",
  failed: "bad", lost: "bad", quarantined: "bad", stopped: "bad", warning: "warn", error: "bad",
};
export const tone = (word) => TONES[word] || "";
export const pill = (status) => make("span", { className: "pill", textContent: status, "data-tone": tone(status) });
export const small = (text) => (text ? make("small", { textContent: text }) : "");

// True once for each new value of a part: what did not change is not drawn again.
const drawn = new Map();
export function changed(part, value) {
  const text = JSON.stringify(value);
  if (drawn.get(part) === text) return false;
  drawn.set(part, text);
  return true;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} days`;
}

// Requests carry the API key of this tab, if it has one; `wantsKey` is called on 401.
let askForKey = () => {};
export const onKeyWanted = (call) => { askForKey = call; };
export const apiKey = () => sessionStorage.getItem("hotspare-key");

export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) askForKey();
  return answer;
}

export const postJson = (path, body, signal) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
