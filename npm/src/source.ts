/**
 * Where a model comes from: addresses are fetched (see `session.ts`), everything else is handed over piece by piece.
 */
import { lengthOf } from "./download.js";
import { absoluteUrl } from "./environment.js";
import { toWeblaneError, WeblaneError } from "./errors.js";
import { describe } from "./tensor.js";

/** A model file: its address, its bytes, or something that gives its bytes. */
export type ModelSource =
  | string
  | URL
  | Request
  | Response
  | Blob
  | ArrayBuffer
  | SharedArrayBuffer
  | ArrayBufferView
  | ReadableStream<Uint8Array>;

/** A source, reduced to the two ways there are. */
export type OpenSource =
  | { readonly url: string }
  /** `total` is 0 when it is not known. Pieces own their buffers, so that these can be transferred. */
  | { readonly total: number; readonly pieces: () => AsyncIterable<Uint8Array<ArrayBuffer>> };

/** Bytes of one message: few enough to keep memory flat, enough to make the messages' cost vanish. */
export const PIECE_BYTES = 4 << 20;

/**
 * Classifies a source; a Request is sent.
 *
 * @throws WeblaneError `invalid_input` for what is no source, `network` for a response that is an error
 */
export async function openSource(source: ModelSource, signal?: AbortSignal): Promise<OpenSource> {
  if (typeof source === "string" || source instanceof URL) return { url: resolve(source) };
  if (isA("Request", source)) {
    try {
      return fromResponse(await fetch(source as Request, signal ? { signal } : {}));
    } catch (error) {
      throw toWeblaneError(error, "network", `${(source as Request).url} could not be fetched: `);
    }
  }
  if (isA("Response", source)) return fromResponse(source as Response);
  if (isA("Blob", source)) {
    const blob = source as Blob;
    return {
      total: blob.size,
      pieces: () => slices(blob.size, (from, to) => blob.slice(from, to).arrayBuffer()),
    };
  }
  if (source instanceof ArrayBuffer || isA("SharedArrayBuffer", source)) {
    return fromBytes(new Uint8Array(source as ArrayBuffer));
  }
  if (ArrayBuffer.isView(source)) {
    return fromBytes(new Uint8Array(source.buffer, source.byteOffset, source.byteLength));
  }
  if (typeof (source as ReadableStream | null)?.getReader === "function") {
    return { total: 0, pieces: () => read(source as ReadableStream<Uint8Array>) };
  }
  throw new WeblaneError(
    "invalid_input",
    `a model is loaded from an address, bytes, a Blob, a Response or a stream, not from ${describe(source)}`,
  );
}

function resolve(source: string | URL): string {
  try {
    return absoluteUrl(String(source));
  } catch (error) {
    throw new WeblaneError("invalid_input", `${describe(String(source))} is not an address`, {
      cause: error,
    });
  }
}

// By name, since a worker of Node.js or a test may lack some of these classes.
function isA(name: "Request" | "Response" | "Blob" | "SharedArrayBuffer", value: unknown): boolean {
  const Class = (globalThis as Record<string, unknown>)[name];
  return typeof Class === "function" && value instanceof Class;
}

function fromResponse(response: Response): OpenSource {
  if (!response.ok) {
    throw new WeblaneError(
      "network",
      `${response.url || "the response"} is no model: the server answered ${response.status} ${response.statusText}`.trim(),
    );
  }
  const body = response.body;
  if (body === null) return { total: 0, pieces: () => slices(0, async () => new ArrayBuffer(0)) };
  return { total: lengthOf(response), pieces: () => read(body) };
}

function fromBytes(bytes: Uint8Array): OpenSource {
  return {
    total: bytes.length,
    // slice copies out of shared memory and out of buffers that the caller keeps.
    pieces: () => slices(bytes.length, async (from, to) => bytes.slice(from, to).buffer as ArrayBuffer),
  };
}

async function* slices(
  total: number,
  cut: (from: number, to: number) => Promise<ArrayBuffer>,
): AsyncGenerator<Uint8Array<ArrayBuffer>> {
  for (let from = 0; from < total; from += PIECE_BYTES) {
    yield new Uint8Array(await cut(from, Math.min(total, from + PIECE_BYTES)));
  }
}

async function* read(stream: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array<ArrayBuffer>> {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      if (!(value instanceof Uint8Array)) {
        throw new WeblaneError(
          "invalid_input",
          `the stream of the model gave ${describe(value)} instead of a Uint8Array`,
        );
      }
      yield value.slice();
    }
  } finally {
    reader.cancel().catch(() => {});
    reader.releaseLock();
  }
}
