/** A worker that reads a file as weblane's does, in one buffer over and over, and says how long it was. */
globalThis.onmessage = async ({ data: url }) => {
  const reader = (await fetch(url)).body.getReader({ mode: "byob" });
  let buffer = new ArrayBuffer(512 << 10);
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read(new Uint8Array(buffer));
    if (done) break;
    length += value.byteLength;
    buffer = value.buffer;
  }
  postMessage(length);
};
