// The chat: a conversation with this very node over /v1/chat/completions, streamed.
import { byId, changed, make, postJson } from "./dom.js";

const KEPT_MESSAGES = 20;
const talk = byId("talk");
const prompt = byId("prompt");
const send = byId("send");
let messages = [];
let running = null;

export function showModels(models) {
  const names = models.filter((model) => model.task === "generation").flatMap((model) => [model.name, ...model.aliases]);
  if (!changed("chat-models", names)) return;
  const select = byId("model");
  const before = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
  if (names.includes(before)) select.value = before;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (prompt.value.trim()) ask(prompt.value.trim());
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) byId("ask").requestSubmit();
  }
});
byId("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  talk.replaceChildren();
  prompt.focus();
});

async function ask(question) {
  byId("hint")?.remove();
  prompt.value = "";
  add("say user", question);
  const bubble = add("say node", "");
  running = new AbortController();
  send.textContent = "Stop";
  talk.setAttribute("aria-busy", "true"); // a reader is told the whole answer, not each piece
  const conversation = [...messages, { role: "user", content: question }].slice(-KEPT_MESSAGES);
  try {
    const answer = await stream(conversation, bubble);
    if (answer) messages = [...conversation, { role: "assistant", content: answer }];
  } catch (error) {
    if (error.name === "AbortError") add("by quiet", "stopped");
    else refuse(bubble, "The node did not answer", String(error.message || error));
  } finally {
    running = null;
    send.textContent = "Send";
    talk.removeAttribute("aria-busy");
  }
}

async function stream(conversation, bubble) {
  const started = performance.now();
  const body = { model: byId("model").value, messages: conversation, stream: true, stream_options: { include_usage: true }, max_tokens: 512 };
  const answer = await postJson("/v1/chat/completions", body, running.signal);
  if (!answer.ok) {
    await explain(answer, bubble);
    return "";
  }
  let text = "", usage = null, firstMs = 0, failure = null;
  for await (const chunk of events(answer.body)) {
    if (chunk.error) failure = chunk.error;
    usage = chunk.usage || usage;
    const piece = chunk.choices?.[0]?.delta?.content;
    if (!piece) continue;
    firstMs = firstMs || performance.now() - started;
    text += piece;
    const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
    bubble.textContent = text;
    if (follows) talk.scrollTop = talk.scrollHeight;
  }
  if (failure) refuse(null, "The answer broke off", failure.message);
  else add("by quiet", byline(answer, usage, firstMs, performance.now() - started));
  return failure ? "" : text;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function byline(answer, usage, firstMs, wholeMs) {
  const words = [`answered by ${answer.headers.get("X-Served-By") || "unknown"}`];
  if (usage) {
    const tokens = usage.completion_tokens;
    words.push(`${tokens} tokens`);
    if (tokens > 1 && wholeMs > firstMs) words.push(`${((tokens - 1) / ((wholeMs - firstMs) / 1000)).toFixed(1)} tokens/s`);
  }
  words.push(`first after ${(firstMs / 1000).toFixed(2)} s`);
  return words.join(" · ");
}

async function explain(answer, bubble) {
  const error = (await answer.json().catch(() => null))?.error;
  const mode = answer.headers.get("X-Hotspare-Mode");
  const again = answer.headers.get("Retry-After");
  const title = mode ? `This node is in ${mode} and does not serve` : `Refused with status ${answer.status}`;
  const words = (error?.message || answer.statusText).replace(/^this node does not serve now \(mode \w+\): /, "");
  refuse(bubble, title, words + (again ? ` · ask again in ${again} s` : ""));
}

function refuse(bubble, title, words) {
  const element = make("div", { className: "say refused" }, make("strong", { textContent: title }), `\n${words}`);
  if (bubble) bubble.replaceWith(element);
  else talk.append(element);
  talk.scrollTop = talk.scrollHeight;
}

function add(className, text) {
  const element = make("div", { className, textContent: text });
  talk.append(element);
  talk.scrollTop = talk.scrollHeight;
  return element;
}
