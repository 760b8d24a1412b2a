// A Motion JPEG stream by fetch, for where a key must be sent: an image element cannot. Ends with the stream, or when `signal` says so.
import { request } from "./dom.js";

const HEAD_BYTES_MAX = 4096;
const PICTURE_BYTES_MAX = 32 << 20;

export async function* pictures(path, signal) {
  const answer = await request(path, { signal });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const reader = answer.body.getReader();
  let waiting = new Uint8Array(0);
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting = joined(waiting, value);
      let newest = null; // of several that have come, only the last is worth showing
      for (let part = first(waiting); part; part = first(waiting)) {
        newest = part.picture;
        waiting = waiting.subarray(part.end);
      }
      if (newest) yield new Blob([newest], { type: "image/jpeg" });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function joined(one, other) {
  const both = new Uint8Array(one.length + other.length);
  both.set(one);
  both.set(other, one.length);
  return both;
}

// The first whole part: its picture, and where it ends.
function first(bytes) {
  const head = new TextDecoder("latin1").decode(bytes.subarray(0, HEAD_BYTES_MAX));
  const begin = head.indexOf("\r\n\r\n") + 4;
  if (begin < 4) {
    if (bytes.length >= HEAD_BYTES_MAX) throw new Error("this is no Motion JPEG");
    return null;
  }
  const length = Number(/content-length: *(\d+)/i.exec(head.slice(0, begin))?.[1] ?? NaN);
  if (!(length <= PICTURE_BYTES_MAX)) throw new Error("a part without a length, or too large");
  const end = begin + length;
  return bytes.length < end + 2 ? null : { picture: bytes.slice(begin, end), end: end + 2 };
}
