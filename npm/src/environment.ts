/**
 * The differences between a page and Node.js: how workers start, what a bare string source means, how files are read.
 */
import { type ErrorCode, toWeblaneError, WeblaneError } from "./errors.js";
import type { FromWorker, ToWorker } from "./protocol.js";

/** A worker as the client sees it. */
export interface Port {
  post(message: ToWorker, transfer?: readonly Transferable[]): void;
  /** Whether the process should stay alive for this worker (Node.js only; a page needs nothing of the kind). */
  keepAlive(on: boolean): void;
  terminate(): void;
}

/** What a worker tells its owner. */
export interface PortEvents {
  onMessage(message: FromWorker): void;
  /** The script could not be loaded (`network`), threw, or sent something unreadable (`internal`). */
  onFailure(text: string, code: ErrorCode): void;
}

/** Starts the worker of this package. Tests put a fake in its place. */
export type Spawn = (events: PortEvents) => Port;

// The parts of node:worker_threads and node:process that are used, so that the package needs no Node.js types.
interface NodeWorker {
  on(event: string, listener: (value: unknown) => void): void;
  postMessage(message: unknown, transfer?: readonly Transferable[]): void;
  ref(): void;
  unref(): void;
  terminate(): Promise<number>;
}
interface NodeModules {
  "node:worker_threads": {
    Worker: new (url: URL) => NodeWorker;
    parentPort: {
      on(event: "message", listener: (m: unknown) => void): void;
      postMessage: Worker["postMessage"];
    } | null;
  };
  "node:fs": { createReadStream(url: URL): AsyncIterable<Uint8Array>; statSync(url: URL): { size: number } };
  "node:os": { availableParallelism(): number };
  "node:v8": { setFlagsFromString(flags: string): void };
  "node:url": { pathToFileURL(path: string): URL };
}

/** A built-in module of Node.js, or `undefined` in a page. No import statement, since bundlers would follow it. */
export function nodeModule<K extends keyof NodeModules>(name: K): NodeModules[K] | undefined {
  const process = (
    globalThis as { process?: { getBuiltinModule?: (n: string) => unknown; versions?: { node?: string } } }
  ).process;
  // Some bundlers provide a `process` in pages; only the real one knows its version and its modules.
  if (process?.versions?.node === undefined || typeof process.getBuiltinModule !== "function")
    return undefined;
  return process.getBuiltinModule(name) as NodeModules[K] | undefined;
}

/** Starts the worker that stands next to this module. */
export const spawnWorker: Spawn = (events) => {
  const threads = nodeModule("node:worker_threads");
  return threads ? spawnNodeWorker(threads.Worker, events) : spawnWebWorker(events);
};

const HINT = 'behind Vite\'s development server, set optimizeDeps: { exclude: ["weblane"] }';

function spawnWebWorker(events: PortEvents): Port {
  // In two steps, since bundlers would take this for a second copy of the worker.
  const base = import.meta.url;
  const address = new URL("worker.js", base).href;
  let blobUrl: string | undefined;
  let worker: Worker;
  try {
    // Bundlers recognise exactly this expression.
    worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "SecurityError")) throw error;
    // Loaded from another origin (a CDN): a worker must come from the page's own, but may import from elsewhere.
    const script = `import ${JSON.stringify(address)};`;
    blobUrl = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    worker = new Worker(blobUrl, { type: "module" });
  }
  worker.onmessage = (event: MessageEvent<FromWorker>) => events.onMessage(event.data);
  worker.onmessageerror = () => events.onFailure("a message from the worker could not be read", "internal");
  worker.onerror = (event) => {
    event.preventDefault();
    // A script that cannot be loaded gives an event without a message.
    if (event.message) events.onFailure(event.message, "internal");
    else events.onFailure(`its script could not be loaded from ${address}; ${HINT}`, "network");
  };
  return {
    post: (message, transfer = []) => worker.postMessage(message, transfer as Transferable[]),
    keepAlive() {},
    terminate() {
      worker.onmessage = worker.onerror = worker.onmessageerror = null;
      worker.terminate();
      if (blobUrl !== undefined) URL.revokeObjectURL(blobUrl);
    },
  };
}

function spawnNodeWorker(NodeWorker: NodeModules["node:worker_threads"]["Worker"], events: PortEvents): Port {
  const base = import.meta.url;
  const worker = new NodeWorker(new URL("worker.js", base));
  let ended = false;
  worker.on("message", (message) => events.onMessage(message as FromWorker));
  worker.on("messageerror", () =>
    events.onFailure("a message from the worker could not be read", "internal"),
  );
  worker.on("error", (error) =>
    events.onFailure(error instanceof Error ? error.message : String(error), "internal"),
  );
  worker.on("exit", (code) => {
    if (!ended) events.onFailure(`the worker ended with code ${String(code)}`, "internal");
  });
  return {
    post: (message, transfer) => worker.postMessage(message, transfer),
    keepAlive: (on) => (on ? worker.ref() : worker.unref()),
    terminate() {
      ended = true;
      void worker.terminate();
    },
  };
}

/** The absolute address of a source string: relative to the page, or to the working directory in Node.js. */
export function absoluteUrl(source: string): string {
  const url = nodeModule("node:url");
  if (url !== undefined) {
    // A drive letter is no scheme.
    return /^[a-z][a-z0-9+.-]+:/i.test(source) ? source : url.pathToFileURL(source).href;
  }
  return new URL(source, globalThis.document?.baseURI ?? globalThis.location?.href).href;
}

/** The response to a GET request, if it is a good one. */
export async function fetchOk(url: string, signal?: AbortSignal): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(url, signal ? { signal } : {});
  } catch (error) {
    throw toWeblaneError(error, signal?.aborted ? "aborted" : "network", `${url} could not be fetched: `);
  }
  if (!response.ok) {
    throw new WeblaneError(
      "network",
      `${url} could not be fetched: the server answered ${response.status} ${response.statusText}`.trim(),
    );
  }
  return response;
}

/** A file of Node.js for reading. */
export function openNodeFile(url: URL) {
  const fs = nodeModule("node:fs");
  if (fs === undefined) throw new WeblaneError("network", `${url} cannot be read here`);
  try {
    return { total: fs.statSync(url).size, isHtml: false, chunks: fs.createReadStream(url) };
  } catch (error) {
    throw toWeblaneError(error, "network");
  }
}

/** The bytes of a file of Node.js. */
export async function readNodeFile(url: URL): Promise<Uint8Array<ArrayBuffer>> {
  const { total, chunks } = openNodeFile(url);
  const bytes = new Uint8Array(total);
  let at = 0;
  for await (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.byteLength;
  }
  return bytes;
}
