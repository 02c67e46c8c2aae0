/// <reference lib="esnext.disposable" preserve="true" />
/**
 * A loaded model.
 */
import type { CallOptions } from "./client.js";
import { download, READ_BYTES, readError } from "./download.js";
import { nodeModule, type Spawn } from "./environment.js";
import { abortError, toWeblaneError, WeblaneError } from "./errors.js";
import { decodeTensor, encodeFeeds, type Feeds, show } from "./feeds.js";
import { areLike, type Described, describe, describeInputs, type Mailbox, openMailbox } from "./mailbox.js";
import type {
  LoadProgress,
  ModelInfo,
  NodeTiming,
  Out,
  RunProgress,
  RuntimeInfo,
  ValueInfo,
  WireTensor,
} from "./protocol.js";
import { type Engine, type Runtime, type RuntimeOptions, startEngine, unlessAborted } from "./runtime.js";
import { type ModelSource, openSource } from "./source.js";
import type { Tensor } from "./tensor.js";
import { SpareBuffers } from "./transfer.js";

/** Files of external data: by location, or a function from location to source. */
export type ExternalData =
  | Readonly<Record<string, ModelSource>>
  | ((location: string) => ModelSource | Promise<ModelSource>);

/** How {@link Session.load} loads. */
export interface LoadOptions extends RuntimeOptions {
  /** Stops the load. */
  readonly signal?: AbortSignal | undefined;
  /** Hears how far the load has come. */
  readonly onProgress?: ((progress: LoadProgress) => void) | undefined;
  /** `"none"` runs the graph as it was written, for experiments and for narrowing down a problem. */
  readonly optimize?: "all" | "none" | undefined;
  /**
   * `"fast"` (the default) lets 3 x 3 convolutions be computed with fewer products by Winograd's method; the error of
   * a convolution is then at most 4e-6 of its largest output. `"exact"` computes every product: 8e-7.
   */
  readonly precision?: "fast" | "exact" | undefined;
  /**
   * The files that hold a model's weights when the model file does not. Without this they are fetched from beside the
   * model's address.
   */
  readonly externalData?: ExternalData | undefined;
  /** A worker to share with other sessions. It decides threads, variant and wasmPaths. */
  readonly runtime?: Runtime | undefined;
}

/** How {@link Session.run} runs. */
export interface RunOptions {
  /** Stops the run; the session can be used afterwards. */
  readonly signal?: AbortSignal | undefined;
  /** Milliseconds after which the run is stopped; the session can be used afterwards. */
  readonly timeout?: number | undefined;
  /** Names of the wanted outputs; all by default. */
  readonly outputs?: readonly string[] | undefined;
  /**
   * Gives the inputs' buffers to the worker instead of copying them; the caller's arrays are empty afterwards. Inputs that
   * are in the engine are freed after the run.
   */
  readonly transfer?: boolean | undefined;
  /** Hears how far a long run has come. */
  readonly onProgress?: ((progress: RunProgress) => void) | undefined;
  /**
   * Names of outputs that stay in the engine, for inputs of later runs: the caches of a decoder, the output of an encoder.
   * They come, beside those that `outputs` names, as tensors without elements here ({@link Tensor.location}). A run that
   * takes them as inputs copies nothing, and with `transfer` it frees them.
   *
   * ```ts
   * const { logits, ...present } = await session.run({ input_ids, ...past }, { keep: caches, transfer: true });
   * ```
   */
  readonly keep?: readonly string[] | undefined;
  /** Measures every node: the run gives a {@link Profile}, whose `outputs` are what it gives otherwise. */
  readonly profile?: boolean | undefined;
}

/** What a session knows about itself. */
export interface SessionInfo extends ModelInfo, RuntimeInfo {
  /** Bytes of WebAssembly memory, of all sessions that share the runtime. */
  readonly memory: number;
}

/** Outputs of a run with the time of every node. */
export interface Profile {
  /** Output name -> tensor. */
  readonly outputs: Record<string, Tensor>;
  /** Milliseconds in the engine. */
  readonly totalMs: number;
  /** Times of the nodes of the optimised graph, in the order of execution. */
  readonly nodes: readonly NodeTiming[];
}

/**
 * A model, ready to run.
 *
 * ```ts
 * const session = await Session.load("/models/mobilenet_v2.onnx", { signal, onProgress });
 * const { logits } = await session.run({ input }, { signal, timeout: 2000 });
 * await session.dispose();
 * ```
 */
export class Session {
  readonly #engine: Engine;
  readonly #owned: boolean;
  readonly #id: number;
  readonly #model: ModelInfo;
  readonly #runtime: RuntimeInfo;
  readonly #spare = new SpareBuffers();
  #mailbox: Mailbox | undefined;
  /** The inputs of the last run that could have gone through a mailbox. */
  #small: readonly Described[] | undefined;
  /** What the worker last said of the outputs in the mailbox. */
  #described: readonly Described[] = [];
  /** Runs that have not ended. */
  #running = 0;
  #disposed = false;

  private constructor(engine: Engine, owned: boolean, id: number, model: ModelInfo, runtime: RuntimeInfo) {
    this.#engine = engine;
    this.#owned = owned;
    this.#id = id;
    this.#model = model;
    this.#runtime = runtime;
  }

  /**
   * Loads a model. The bytes flow into the engine as they arrive.
   *
   * @throws WeblaneError; {@link ERROR_CODES} says which codes there are
   */
  static load(source: ModelSource, options: LoadOptions = {}): Promise<Session> {
    return Session.loadWith(source, options);
  }

  /** @internal Lets tests put a fake in the place of the worker. */
  static async loadWith(source: ModelSource, options: LoadOptions, spawn?: Spawn): Promise<Session> {
    const { signal, onProgress, runtime } = options;
    checkLoadOptions(options);
    if (signal?.aborted) throw abortError(signal, "the load");
    const engine = runtime?.engine ?? startEngine(options, onProgress, spawn);
    const id = engine.nextSession();
    try {
      const work = transfer(engine, id, source, options);
      const [model, info] = await unlessAborted(work, signal, "the load");
      return new Session(engine, runtime === undefined, id, model, info);
    } catch (error) {
      const reason = toWeblaneError(error);
      if (runtime === undefined) engine.client.close(reason);
      else engine.client.call("close", { session: id }).catch(() => {});
      throw reason;
    }
  }

  /** Inputs of the model. */
  get inputs(): readonly ValueInfo[] {
    return this.#model.inputs;
  }

  /** Outputs of the model. */
  get outputs(): readonly ValueInfo[] {
    return this.#model.outputs;
  }

  /**
   * Runs the model. Runs of one session follow one another in the order of the calls.
   *
   * @param feeds - input name to value; copied unless `transfer` is set
   * @returns output name to tensor
   * @throws WeblaneError, also for wrong inputs; the session can be used afterwards
   */
  run(feeds: Feeds, options: RunOptions & { readonly profile: true }): Promise<Profile>;
  run(
    feeds: Feeds,
    options?: RunOptions & { readonly profile?: false | undefined },
  ): Promise<Record<string, Tensor>>;
  run(feeds: Feeds, options?: RunOptions): Promise<Record<string, Tensor> | Profile>;
  async run(feeds: Feeds, options: RunOptions = {}): Promise<Record<string, Tensor> | Profile> {
    if (options.profile === true) return this.profile(feeds, options);
    return this.#tensors((await this.#run(feeds, options, false)).outputs);
  }

  /**
   * Runs the model and measures every node, which takes a little longer than {@link Session.run}. The same as `run`
   * with `profile: true`.
   */
  async profile(feeds: Feeds, options: RunOptions = {}): Promise<Profile> {
    const reply = await this.#run(feeds, options, true);
    return { outputs: this.#tensors(reply.outputs), totalMs: reply.totalMs, nodes: reply.nodes };
  }

  /** Facts about the model, the WebAssembly build and the memory. */
  async info(): Promise<SessionInfo> {
    if (this.#disposed) throw disposed();
    const memory = await this.#engine.client.call("memory", undefined);
    return { ...this.#model, ...this.#runtime, memory };
  }

  /** Ends the session; its memory returns. Runs that have not ended are rejected with `disposed`. Twice is fine. */
  async dispose(): Promise<void> {
    if (this.#disposed) return;
    this.#disposed = true;
    if (this.#owned) this.#engine.client.close(disposed());
    else if (!this.#engine.client.closed) await this.#engine.client.call("close", { session: this.#id });
  }

  /** The same as {@link Session.dispose}, for `await using`. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  async #run(feeds: Feeds, options: RunOptions, profile: false): Promise<Pick<Out<"run">, "outputs">>;
  async #run(feeds: Feeds, options: RunOptions, profile: true): Promise<Out<"run">>;
  async #run(feeds: Feeds, options: RunOptions, profile: boolean): Promise<Pick<Out<"run">, "outputs">> {
    if (this.#disposed) throw disposed();
    const { signal, timeout, outputs, keep = [], transfer = false, onProgress } = options;
    if (timeout !== undefined && !(typeof timeout === "number" && timeout >= 0)) {
      throw new WeblaneError("invalid_option", `timeout must be a number of milliseconds, not ${timeout}`);
    }
    for (const name of [...(outputs ?? []), ...keep]) {
      if (!this.outputs.some((output) => output.name === name)) {
        throw new WeblaneError(
          "unknown_input",
          `the model has no output "${name}"; it gives ${this.outputs.map(show).join(", ")}`,
        );
      }
    }
    // An aborted run must not take the caller's buffers.
    if (signal?.aborted) throw abortError(signal, "the run");
    const { client } = this.#engine;
    const wire = encodeFeeds(this.inputs, feeds, transfer, this.#spare, client);
    const call: CallOptions<"run"> = { transfer: wire.transfer, signal, timeout, onProgress };
    const { inputs, lent } = wire;
    const plain =
      !profile &&
      !transfer &&
      keep.length === 0 &&
      (outputs ?? signal ?? timeout ?? onProgress) === undefined;
    const kept = new Set(keep);
    const names = outputs ?? this.outputs.map(({ name }) => name);
    const here = kept.size === 0 ? outputs : names.filter((name) => !kept.has(name));
    // The mailbox has room for one run; those that overlap with it must not come before it either.
    const mails = plain && this.#running === 0;
    this.#running++;
    try {
      if (mails) {
        const mailed = this.#mail(inputs);
        if (mailed !== undefined) return { outputs: await mailed };
      }
      const progress = onProgress !== undefined;
      const reply = await client.call(
        "run",
        { session: this.#id, inputs, lent, outputs: here, keep: [...kept], profile, progress },
        call,
      );
      this.#spare.put(reply.returned);
      return reply;
    } finally {
      this.#running--;
      for (const kept of wire.kept) kept.done();
    }
  }

  #tensors(outputs: readonly WireTensor[]): Record<string, Tensor> {
    // No prototype: a model may call an output "constructor".
    const named: Record<string, Tensor> = Object.create(null);
    for (const output of outputs) named[output.name] = decodeTensor(output, this.#engine.client);
    return named;
  }

  /** A run through the mailbox, for inputs that can go there. */
  #mail(inputs: readonly WireTensor[]): Promise<readonly WireTensor[]> | undefined {
    const known = this.#mailbox?.fits(inputs) === true;
    if (!known) {
      // The second run alike makes one: sequences that grow from run to run would make a new one for each.
      const before = this.#small;
      this.#small = describeInputs(inputs);
      if (this.#small === undefined || before === undefined || !areLike(inputs, before)) return undefined;
      this.#mailbox = openMailbox(this.#small);
    }
    const mailbox = this.#mailbox as Mailbox;
    mailbox.writeInputs(inputs);
    return this.#post(mailbox, known);
  }

  async #post(mailbox: Mailbox, known: boolean): Promise<readonly WireTensor[]> {
    const params = { session: this.#id, mailbox: known ? undefined : mailbox.init };
    const outputs = await this.#engine.client.call("mail", params, {
      // The bell says nothing but the id.
      ring: known ? (id) => mailbox.ring(id) : undefined,
    });
    if (outputs === undefined) return mailbox.readOutputs(this.#described);
    this.#described = outputs.map(describe);
    return outputs;
  }
}

function disposed(): WeblaneError {
  return new WeblaneError("disposed", "the session was disposed of");
}

function checkLoadOptions({ optimize, precision, runtime, threads, variant, wasmPaths }: LoadOptions): void {
  if (optimize !== undefined && optimize !== "all" && optimize !== "none") {
    throw new WeblaneError(
      "invalid_option",
      `optimize must be "all" or "none", not ${JSON.stringify(optimize)}`,
    );
  }
  if (precision !== undefined && precision !== "fast" && precision !== "exact") {
    throw new WeblaneError(
      "invalid_option",
      `precision must be "fast" or "exact", not ${JSON.stringify(precision)}`,
    );
  }
  if (runtime !== undefined && (threads ?? variant ?? wasmPaths) !== undefined) {
    throw new WeblaneError(
      "invalid_option",
      "threads, variant and wasmPaths belong to the runtime that was given",
    );
  }
}

/** Brings a model and its external data into the worker and finishes it there. */
async function transfer(
  engine: Engine,
  session: number,
  source: ModelSource,
  options: LoadOptions,
): Promise<[ModelInfo, RuntimeInfo]> {
  const { client } = engine;
  const { signal, onProgress, optimize = "all", precision = "fast", externalData } = options;
  const opened = client.call("open", { session, options: { optimize, precision } }, { signal });
  const model = sendFile(engine, session, "", source, options);
  // The file flows while the build compiles. The first failure counts; the others follow from it.
  const [info, , url] = await Promise.all([engine.ready, opened, model]);
  onProgress?.({ phase: "parse", loaded: 0, total: 1 });
  const finish = () => client.call("finish", { session }, { signal, onProgress });
  let done = await finish();
  if ("externals" in done) {
    for (const location of done.externals) {
      const file = await externalSource(location, externalData, url);
      await sendFile(engine, session, location, file, options);
    }
    done = await finish();
  }
  if ("externals" in done) throw new WeblaneError("internal", "the engine asks for external data twice");
  onProgress?.({ phase: "optimize", loaded: 1, total: 1 });
  return [done.model, info];
}

/** Sends one file; returns its address, if it has one. @internal */
export async function sendFile(
  engine: Engine,
  session: number,
  file: string,
  source: ModelSource,
  options: Pick<LoadOptions, "signal" | "onProgress">,
): Promise<string | undefined> {
  const { client } = engine;
  const { signal, onProgress } = options;
  const open = await openSource(source, signal);
  if ("url" in open) {
    // Its script alone takes a worker a tenth of a second, in which the page can have the file come.
    if (!engine.started && nodeModule("node:fs") === undefined) {
      await sendDownload(engine, session, file, open.url, options);
    } else await client.call("fetch", { session, file, url: open.url }, { signal, onProgress });
    return open.url;
  }
  let loaded = 0;
  const report = () =>
    onProgress?.({ phase: "download", loaded, total: loaded > open.total ? 0 : open.total });
  report();
  for await (const bytes of open.pieces()) {
    // The buffer moves away with the message, and its length with it.
    const { byteLength } = bytes;
    const total = loaded === 0 && open.total > 0 ? open.total : undefined;
    const chunk = { session, file, bytes, total, left: 0, lent: false };
    await client.call("push", chunk, { signal, transfer: [bytes.buffer] });
    loaded += byteLength;
    report();
  }
  return undefined;
}

/** Bytes that are on their way to a worker at most. */
const WINDOW_BYTES = 32 << 20;
/** Buffers that are kept for the next reads. */
const SPARE = 8;

/** Reads a file here, and sends on what has come. */
async function sendDownload(
  { client, ready }: Engine,
  session: number,
  file: string,
  url: string,
  { signal, onProgress }: Pick<LoadOptions, "signal" | "onProgress">,
): Promise<void> {
  const spare: ArrayBuffer[] = [];
  const take = () => spare.pop() ?? new ArrayBuffer(READ_BYTES);
  const { total, isHtml, chunks } = await download(url, signal, take).catch(async (error: unknown) => {
    // When the build cannot be started either, that is what gets reported.
    await ready;
    throw error;
  });
  let loaded = 0;
  const report = () => onProgress?.({ phase: "download", loaded, total: loaded > total ? 0 : total });
  report();
  const sent = new Set<Promise<void>>();
  let underWay = 0;
  let failure: unknown;
  try {
    for await (const bytes of chunks) {
      const { byteLength } = bytes;
      loaded += byteLength;
      const first = loaded === byteLength && total > 0;
      const chunk = {
        session,
        file,
        bytes,
        total: first ? total : undefined,
        left: total - loaded,
        lent: true,
      };
      underWay += byteLength;
      const push = client
        .call("push", chunk, { signal, transfer: [bytes.buffer] })
        .then(
          (buffer) => {
            if (buffer?.byteLength === READ_BYTES && spare.length < SPARE) spare.push(buffer);
          },
          (error: unknown) => {
            failure ??= error;
          },
        )
        .finally(() => {
          underWay -= byteLength;
          sent.delete(push);
        });
      sent.add(push);
      while (underWay > WINDOW_BYTES && failure === undefined) await Promise.race(sent);
      if (failure !== undefined) throw failure;
      report();
    }
    await Promise.all(sent);
    if (failure !== undefined) throw failure;
  } catch (error) {
    throw readError(error, url, isHtml);
  }
}

/** The source of a file of external data. @internal */
export async function externalSource(
  location: string,
  given: ExternalData | undefined,
  modelUrl: string | undefined,
): Promise<ModelSource> {
  if (typeof given === "function") return given(location);
  if (given !== undefined) {
    // Writers differ in whether they put "./" before a name.
    const name = location.replace(/^\.\//, "");
    for (const key of [location, name, `./${name}`]) {
      if (Object.hasOwn(given, key)) return given[key] as ModelSource;
    }
    throw new WeblaneError(
      "external_data",
      `the model's weights are in "${location}", which externalData does not have; it has ${Object.keys(given).join(", ")}`,
    );
  }
  // A model must not make the page fetch from just anywhere: only from its own directory and below.
  const inside = !/^([a-z][a-z0-9+.-]*:|[\\/])|(^|[\\/])\.\.([\\/]|$)/i.test(location);
  if (modelUrl === undefined || !/^(https?|file):/.test(modelUrl) || !inside) {
    throw new WeblaneError(
      "external_data",
      `the model's weights are in "${location}"; pass them as externalData`,
    );
  }
  return new URL(location.split("/").map(encodeURIComponent).join("/"), modelUrl);
}
