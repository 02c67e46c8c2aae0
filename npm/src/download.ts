/**
 * A file as its bytes arrive, read by the worker or, while that is still starting, by the page.
 */
import { fetchOk } from "./environment.js";
import { toWeblaneError, WeblaneError } from "./errors.js";

/** A response whose bytes are being read. */
export interface Download {
  /** Bytes of the file, 0 when that is not known. */
  readonly total: number;
  /** Whether the server calls it a page. */
  readonly isHtml: boolean;
  /** Each in a buffer of its own, or in one that was given. */
  readonly chunks: AsyncIterable<Uint8Array<ArrayBuffer>>;
}

/** Bytes of one read: few enough to stay in a cache on their way, enough to make the cost of reads vanish. */
export const READ_BYTES = 512 << 10;

/**
 * Sends a request. Chunks are read into buffers that `take` gives, if the browser can do that.
 *
 * @throws WeblaneError `network`, `aborted`
 */
export async function download(
  url: string,
  signal: AbortSignal | undefined,
  take: () => ArrayBuffer,
): Promise<Download> {
  const response = await fetchOk(url, signal);
  const isHtml = (response.headers.get("content-type") ?? "").startsWith("text/html");
  return { total: lengthOf(response), isHtml, chunks: chunksOf(response, take) };
}

/** Bytes that a response will give, 0 when that is not known. */
export function lengthOf({ headers }: Response): number {
  // The length of a compressed transfer says nothing about the bytes that come out.
  const plain = headers.get("content-encoding") === null;
  return plain ? Number(headers.get("content-length") ?? 0) || 0 : 0;
}

/** What is said of a failure while the bytes of `url` were read and taken. */
export function readError(error: unknown, url: string, isHtml: boolean): WeblaneError {
  if (error instanceof WeblaneError && error.code === "not_onnx" && isHtml) {
    return new WeblaneError("not_onnx", `${url} is an HTML page, not a model`, { cause: error });
  }
  return toWeblaneError(error, "network", `${url} could not be read to its end: `);
}

async function* chunksOf(
  { body }: Response,
  take: () => ArrayBuffer,
): AsyncGenerator<Uint8Array<ArrayBuffer>> {
  if (body === null) return;
  const read = reader(body as ReadableStream<Uint8Array<ArrayBuffer>>, take);
  try {
    for (;;) {
      const { done, value } = await read.next();
      if (done || value === undefined) return;
      yield value;
    }
  } finally {
    // Ends the transfer when the consumer gave up early.
    read.cancel().catch(() => {});
  }
}

interface Reader {
  next(): Promise<{ done: boolean; value?: Uint8Array<ArrayBuffer> | undefined }>;
  cancel(): Promise<void>;
}

function reader(body: ReadableStream<Uint8Array<ArrayBuffer>>, take: () => ArrayBuffer): Reader {
  try {
    const reader = body.getReader({ mode: "byob" });
    return { next: () => reader.read(new Uint8Array(take())), cancel: () => reader.cancel() };
  } catch {
    // Streams that cannot fill buffers say so with a TypeError.
    const reader = body.getReader();
    return { next: () => reader.read(), cancel: () => reader.cancel() };
  }
}
