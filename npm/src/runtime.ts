/// <reference lib="esnext.disposable" preserve="true" />
/**
 * A worker with a WebAssembly build in it. Every session has one of its own unless sessions are told to share.
 */
import { compileEarly } from "./builds.js";
import { Client } from "./client.js";
import { absoluteUrl, type Spawn, spawnWorker } from "./environment.js";
import { abortError, toWeblaneError, WeblaneError } from "./errors.js";
import type { LoadProgress, RuntimeInfo } from "./protocol.js";
import { VARIANTS, type Variant } from "./variant.js";

/** Where the WebAssembly files are: a directory, or an address for each build. */
export type WasmPaths = string | URL | Readonly<Partial<Record<Variant, string | URL>>>;

/** How a worker is set up. */
export interface RuntimeOptions {
  /**
   * Threads to use. By default one per logical processor, eight at most; one when the page is not cross-origin
   * isolated, since memory cannot be shared then.
   */
  readonly threads?: number | undefined;
  /** A certain WebAssembly build instead of the best one for this browser. */
  readonly variant?: Variant | "auto" | undefined;
  /** Where the WebAssembly files are, if not next to the worker's script. */
  readonly wasmPaths?: WasmPaths | undefined;
}

/** How {@link Runtime.create} reports and is stopped. */
export interface RuntimeCreateOptions extends RuntimeOptions {
  /** Stops the start. */
  readonly signal?: AbortSignal | undefined;
  /** Hears of the `compile` phase. */
  readonly onProgress?: ((progress: LoadProgress) => void) | undefined;
}

/** A started worker, for the modules of this package. */
export interface Engine {
  readonly client: Client;
  /** Settles when the WebAssembly build runs. */
  readonly ready: Promise<RuntimeInfo>;
  /** Whether it does. */
  readonly started: boolean;
  /** A number that no other session of this worker has. */
  nextSession(): number;
}

/** Starts a worker. Calls may be made at once; they wait for the WebAssembly build. */
export function startEngine(
  options: RuntimeOptions,
  onProgress?: (progress: LoadProgress) => void,
  spawn: Spawn = spawnWorker,
): Engine {
  const urls = wasmUrls(options.wasmPaths);
  // The page compiles while the worker's script is loaded. There is no worker to do it for in the place of a fake.
  const early = spawn === spawnWorker ? compileEarly(options, urls) : undefined;
  const client = new Client(spawn);
  void early?.module.then((module) => client.handOver(module));
  const start = {
    threads: options.threads ?? 0,
    variant: options.variant ?? "auto",
    wasmUrls: urls,
    early: early?.variant,
  };
  let started = false;
  const ready = client.call("start", start, { onProgress }).then(({ info, stop }) => {
    started = true;
    if (stop !== undefined) client.useStopWords(stop);
    return info;
  });
  // Whoever waits for it gets the rejection; nobody may be waiting yet.
  ready.catch(() => {});
  let sessions = 0;
  return {
    client,
    ready,
    get started() {
      return started;
    },
    nextSession: () => ++sessions,
  };
}

/** The absolute address of each build whose place the caller gave. */
export function wasmUrls(paths: WasmPaths | undefined): Partial<Record<Variant, string>> {
  if (paths === undefined) return {};
  const urls: Partial<Record<Variant, string>> = {};
  if (typeof paths === "string" || paths instanceof URL) {
    const directory = absoluteUrl(String(paths)).replace(/\/?$/, "/");
    for (const variant of VARIANTS) urls[variant] = new URL(`weblane_${variant}.wasm`, directory).href;
    return urls;
  }
  for (const [variant, path] of Object.entries(paths)) {
    if (!VARIANTS.includes(variant as Variant)) {
      throw new WeblaneError(
        "invalid_option",
        `wasmPaths names "${variant}"; the builds are ${VARIANTS.join(", ")}`,
      );
    }
    if (path !== undefined) urls[variant as Variant] = absoluteUrl(String(path));
  }
  return urls;
}

/**
 * A worker that several sessions share. Sessions on one runtime share its threads and its memory, and take turns;
 * sessions without a common runtime never wait for each other.
 *
 * ```ts
 * const runtime = await Runtime.create({ threads: 4 });
 * const detector = await Session.load("/detector.onnx", { runtime });
 * const classifier = await Session.load("/classifier.onnx", { runtime });
 * ```
 */
export class Runtime {
  /** @internal */
  readonly engine: Engine;
  /** The build that runs, the number of threads, and why. */
  readonly info: RuntimeInfo;

  private constructor(engine: Engine, info: RuntimeInfo) {
    this.engine = engine;
    this.info = info;
  }

  /**
   * Starts a worker.
   *
   * @throws WeblaneError `unsupported_platform`, `network` or `invalid_option` when it cannot start, `aborted`
   */
  static async create(options: RuntimeCreateOptions = {}): Promise<Runtime> {
    const { signal, onProgress } = options;
    if (signal?.aborted) throw abortError(signal, "the start");
    const engine = startEngine(options, onProgress);
    try {
      return new Runtime(engine, await unlessAborted(engine.ready, signal, "the start"));
    } catch (error) {
      const reason = toWeblaneError(error);
      engine.client.close(reason);
      throw reason;
    }
  }

  /** Ends the worker and all of its sessions; their memory returns. Twice is fine. */
  async dispose(): Promise<void> {
    this.engine.client.close(new WeblaneError("disposed", "the runtime was disposed of"));
  }

  /** The same as {@link Runtime.dispose}, for `await using`. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }
}

/** `work`, or a rejection with `aborted` as soon as the signal says so. */
export function unlessAborted<T>(
  work: Promise<T>,
  signal: AbortSignal | undefined,
  what: string,
): Promise<T> {
  if (signal === undefined) return work;
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(abortError(signal, what));
    if (signal.aborted) onAbort();
    signal.addEventListener("abort", onAbort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener("abort", onAbort));
  });
}
