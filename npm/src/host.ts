/**
 * The worker's side of the protocol: sessions, their queues, and runs in steps.
 */
import { readError } from "./download.js";
import { abortError, type ErrorShape, isErrorCode, toWeblaneError, WeblaneError } from "./errors.js";
import { LISTEN_MS, Mailbox } from "./mailbox.js";
import type { FromWorker, In, Method, Out, Progress, Request, RuntimeInfo, WireTensor } from "./protocol.js";
import { MIN_TRANSFER_BYTES } from "./transfer.js";
import { chooseVariant, type Platform, type Variant, type VariantChoice } from "./variant.js";
import { WarmUp } from "./warm.js";
import type { Wasm, WasmFiles, WasmOutput, WasmQuantizer, WasmSession } from "./wasm.js";

/**
 * How long a run keeps the worker before it looks for messages, in milliseconds. A turn of the event loop between two steps
 * costs up to 0.4 in Chromium; people notice an answer that is a tenth of a second late. Where memory is shared, an abort
 * does not wait for it.
 */
export const STEP_BUDGET_MS = 50;

/** Bytes of a file that are read ahead while the build compiles. */
const EARLY_BYTES = 32 << 20;

/**
 * How long the rest of a file has to take for the warm-up to begin, in milliseconds: longer where the warm-up keeps a
 * processor from what brings the bytes. On two processors and from near, a model of 14 to 23 MB had its first result up to 10%
 * later with it, one of 100 MB 5% earlier.
 */
const WARM_UP_REST_MS = { few: 150, many: 30 };

/** Milliseconds between two reports of a download: one for each chunk took the worker 7% of a load of 14 MB. */
const REPORT_MS = 50;

/**
 * With so few processors, workers of the pool that start during a load take time from it: on two, a tenth of the time to the
 * first result of a model of 4 to 14 MB. So they start after the first run there.
 */
const FEW_PROCESSORS = 2;

/** A model of so many bytes has enough to pack and to run for helpers from the start: with 25 MB they gain a fifth. */
const HELPED_BYTES = 20 << 20;

/** How long helpers wait after a load for the first run, in milliseconds. */
const FIRST_RUN_MS = 250;

/** How long a piece of the warm-up keeps the worker from the next bytes, in milliseconds. */
const WARM_UP_MS = 1;

/** What the host needs from its surroundings; tests give fakes. */
export interface HostEnvironment {
  readonly platform: Platform;
  /** Starts a build, and loads the script of so many helpers meanwhile; compiles it unless the page does so (`early`). */
  instantiate(variant: Variant, url: string | undefined, helpers: number, early: boolean): Promise<Wasm>;
  /** Opens a file for reading; `total` is 0 when its size is not known. A chunk is valid until the next one is taken. */
  open(
    url: string,
    signal: AbortSignal,
  ): Promise<{ total: number; isHtml: boolean; chunks: AsyncIterable<Uint8Array> }>;
  /** Lets the worker's event loop take messages. */
  breathe(): Promise<void>;
  post(message: FromWorker, transfer?: readonly Transferable[]): void;
}

interface Context<M extends Method> {
  readonly signal: AbortSignal;
  /** The same as `signal.aborted`, without the signal: most calls are over before anybody needs one. */
  readonly cancelled: boolean;
  progress(progress: Progress<M>): void;
}

/** A call that is being answered. */
class Call {
  cancelled = false;
  #controller: AbortController | undefined;

  get signal(): AbortSignal {
    this.#controller ??= new AbortController();
    if (this.cancelled) this.#controller.abort();
    return this.#controller.signal;
  }

  cancel(): void {
    this.cancelled = true;
    this.#controller?.abort();
  }
}

/** An input as the module has taken it, and where its elements go. */
interface Given {
  readonly name: string;
  readonly type: WireTensor["type"];
  readonly dims: readonly number[];
  readonly ptr: number;
  readonly length: number;
}

type Handlers = { [M in Method]: (params: In<M>, context: Context<M>) => Promise<Out<M>> };

interface SessionSlot {
  readonly wasm: WasmSession;
  /** The last piece of work of this session; the next one waits for it. */
  tail: Promise<unknown>;
  closed: boolean;
  /** The model file is complete, and it is known which files of external data there are. */
  parsed: boolean;
  /** The inputs of the last run, as long as they stand for the next one too. */
  given: readonly Given[] | undefined;
  /** The outputs of the last run. */
  outputs: readonly WasmOutput[];
  mailbox: Mailbox | undefined;
  /** What the page was last told of the outputs in the mailbox. */
  told: readonly WasmOutput[] | undefined;
  /** When the last run through the mailbox was answered. */
  answered: number;
  /** That was within the time that a page takes to ask again. */
  inRow: boolean;
}

/** How a run is made. */
interface RunRequest {
  readonly inputs: readonly WireTensor[];
  readonly outputs?: readonly string[] | undefined;
  readonly profile: boolean;
  readonly progress: boolean;
  /** Called when the run has its inputs. */
  readonly begun?: () => void;
}

/** Answers the calls that arrive at one worker. */
export class Host {
  readonly #env: HostEnvironment;
  readonly #sessions = new Map<number, SessionSlot>();
  readonly #quantizers = new Map<number, WasmQuantizer>();
  readonly #running = new Map<number, Call>();
  /** Files can be read. */
  readonly #started: Promise<Wasm>;
  #onStarted!: (wasm: Wasm | PromiseLike<Wasm>) => void;
  #wasm: Wasm | undefined;
  /** The build with its threads, until the warm-up is over. */
  #cold: Wasm | undefined;
  #warming: WarmUp | undefined;
  /** When bytes came first, and how many have come. */
  #bytes = { since: 0, count: 0 };
  /** Starts the helpers that a start left for later, until that is done. */
  #startHelpers: (() => void) | undefined;
  #broken: WeblaneError | undefined;

  constructor(env: HostEnvironment) {
    this.#env = env;
    this.#started = new Promise((resolve) => {
      this.#onStarted = resolve;
    });
    // A failed start is reported to whoever waits for it; nobody may be waiting yet.
    this.#started.catch(() => {});
  }

  /** Takes a call and posts its result or its error. */
  async handle(request: Request): Promise<void> {
    const { id, method } = request;
    const call = new Call();
    this.#running.set(id, call);
    try {
      const handler = this.#handlers[method] as (
        params: unknown,
        context: Context<Method>,
      ) => Promise<Out<Method>>;
      const result = await handler(request.params, {
        get signal() {
          return call.signal;
        },
        get cancelled() {
          return call.cancelled;
        },
        progress: (progress) => {
          if (!call.cancelled) this.#env.post({ id, progress });
        },
      });
      this.#env.post({ id, result }, transferables(method, result));
      if (method === "run" || method === "mail") this.#startHelpers?.();
    } catch (error) {
      this.#env.post({ id, error: toWeblaneError(error).toJSON() });
    } finally {
      this.#running.delete(id);
    }
    if (request.method === "mail" && this.#running.size === 0) this.#listen(request.params.session);
  }

  /** The caller of `id` has lost interest. */
  cancel(id: number): void {
    this.#running.get(id)?.cancel();
  }

  readonly #handlers: Handlers = {
    start: async ({ threads, variant, wasmUrls, early }, { progress }) => {
      progress({ phase: "compile", loaded: 0, total: 1 });
      const starting = this.#start(threads, variant, wasmUrls, early);
      this.#onStarted(starting.then(([wasm]) => wasm));
      const [wasm, choice] = await starting;
      const info = await this.#startThreads(wasm, choice, { threads, variant });
      this.#cold = wasm;
      progress({ phase: "compile", loaded: 1, total: 1 });
      const { buffer } = wasm.memory;
      if (typeof SharedArrayBuffer === "undefined" || !(buffer instanceof SharedArrayBuffer)) return { info };
      // The pool is in place by now, so the buffer is long enough to hold both words.
      return { info, stop: { buffer, stop: wasm.stopWord(), running: wasm.runningWord() } };
    },

    open: async ({ session, options }) => {
      // The slot must exist before the session's next message; its module may still be compiling.
      const wasm = await this.#started;
      if (this.#sessions.has(session))
        throw new WeblaneError("internal", `session ${session} exists already`);
      this.#sessions.set(session, {
        wasm: this.#guard(() => new wasm.WasmSession(options)),
        tail: Promise.resolve(),
        closed: false,
        parsed: false,
        given: undefined,
        outputs: [],
        mailbox: undefined,
        told: undefined,
        answered: Number.NEGATIVE_INFINITY,
        inRow: false,
      });
      return undefined;
    },

    fetch: async ({ session, file, url }, { signal, progress }) => {
      let started = false;
      const start = this.#started.then(() => {
        started = true;
      });
      // Whoever waits for it gets the rejection; nobody may be waiting yet.
      start.catch(() => {});
      const { total, isHtml, chunks } = await this.#env.open(url, signal).catch(async (error: unknown) => {
        // When the build cannot be started either, that is what gets reported.
        await start;
        throw error;
      });
      let loaded = 0;
      let reported = 0;
      const report = () => {
        reported = performance.now();
        progress({ phase: "download", loaded, total: loaded > total ? 0 : total });
      };
      report();
      const early: Uint8Array[] = [];
      const flush = async () => {
        await start;
        if (loaded === 0 || early.length > 0) this.#expect(session, file, total);
        for (const bytes of early.splice(0)) this.#push(session, file, bytes);
      };
      try {
        for await (const bytes of chunks) {
          if (signal.aborted) throw abortError(signal, "load");
          if (!started && loaded + bytes.byteLength <= EARLY_BYTES) early.push(bytes.slice());
          else {
            await flush();
            this.#push(session, file, bytes);
          }
          loaded += bytes.byteLength;
          if (performance.now() - reported >= REPORT_MS) report();
          this.#whileBytesCome(bytes.byteLength, total - loaded);
        }
        await flush();
        report();
      } catch (error) {
        throw readError(error, url, isHtml);
      } finally {
        this.#endWarmUp();
      }
      return undefined;
    },

    push: async ({ session, file, bytes, total, left, lent }) => {
      await this.#started;
      if (total !== undefined) this.#expect(session, file, total);
      this.#push(session, file, bytes);
      this.#whileBytesCome(bytes.byteLength, left);
      return lent ? bytes.buffer : undefined;
    },

    finish: async ({ session }, { progress }) => {
      const slot = this.#slot(session);
      if (!slot.parsed) {
        const externals = this.#guard(() => [...slot.wasm.externals()]);
        slot.parsed = true;
        progress({ phase: "parse", loaded: 1, total: 1 });
        if (externals.length > 0) return { externals };
      }
      progress({ phase: "optimize", loaded: 0, total: 1 });
      const model = this.#guard(() => slot.wasm.finish());
      if (this.#startHelpers !== undefined) setTimeout(() => this.#startHelpers?.(), FIRST_RUN_MS);
      return { model };
    },

    run: async ({ session, lent, keep = [], ...request }, context) => {
      const last = request.inputs.flatMap(({ data }) => ("kept" in data && data.last ? [data.kept] : []));
      const begun = () => {
        for (const kept of last.splice(0)) this.#release(kept);
      };
      try {
        const slot = this.#slot(session);
        return await this.#run(slot, { ...request, begun }, context, (wasm, totalMs) => {
          const here = slot.outputs.map((output) => takeOutput(wasm.memory, output));
          const kept = keep.map((name) => keepOutput(slot.wasm, name));
          // One of them may be an input: that is not the place for the next one.
          if (kept.length > 0) slot.given = undefined;
          const nodes = request.profile ? [...slot.wasm.timings()] : [];
          return { outputs: [...here, ...kept], returned: lent, nodes, totalMs };
        });
      } finally {
        begun();
      }
    },

    mail: async ({ session, mailbox: init }, context) => {
      const slot = this.#slot(session);
      if (init !== undefined) {
        slot.mailbox = new Mailbox(init);
        slot.told = undefined;
      }
      const { mailbox } = slot;
      if (mailbox === undefined) throw new WeblaneError("internal", `session ${session} has no mailbox`);
      slot.inRow = performance.now() - slot.answered < LISTEN_MS;
      const request = { inputs: mailbox.inputs(), profile: false, progress: false };
      return this.#run(slot, request, context, ({ memory }) => {
        const { outputs } = slot;
        if (slot.told === outputs) {
          if (mailbox.writeOutputs(outputs.map(({ ptr, len }) => new Uint8Array(memory.buffer, ptr, len))))
            return undefined;
        } else {
          const small = outputs.every(({ strings }) => strings === undefined);
          slot.told = small ? outputs : undefined;
        }
        return outputs.map((output) => takeOutput(memory, output));
      });
    },

    openQuantizer: async ({ session, options }) => {
      const wasm = await this.#started;
      this.#quantizers.set(
        session,
        this.#guard(() => new wasm.WasmQuantizer(options)),
      );
      return undefined;
    },

    quantizerExternals: async ({ session }) => {
      const quantizer = this.#quantizer(session);
      return this.#guard(() => [...quantizer.externals()]);
    },

    sampleInputs: async ({ session }) => {
      const quantizer = this.#quantizer(session);
      return this.#guard(() => quantizer.inputs());
    },

    quantize: async ({ session, samples }, context) => {
      const quantizer = this.#quantizer(session);
      this.#guard(() => {
        for (const sample of samples) {
          quantizer.nextSample();
          for (const { name, type, dims, data } of sample) {
            if (!(data instanceof Uint8Array))
              throw new WeblaneError("invalid_input", `the input "${name}": samples cannot be text`);
            quantizer.input(name, type, Uint32Array.from(dims), data);
          }
        }
        quantizer.begin();
      });
      for (;;) {
        if (context.cancelled) throw abortError(context.signal, "quantisation");
        if (!this.#quantizers.has(session)) throw disposed();
        context.progress(this.#guard(() => quantizer.progress()));
        if (this.#guard(() => quantizer.advance(STEP_BUDGET_MS))) break;
        this.#startHelpers?.();
        await this.#env.breathe();
      }
      return this.#guard(() => ({ model: quantizer.model(), report: quantizer.report() }));
    },

    read: async ({ kept }) => {
      const wasm = await this.#started;
      return this.#guard(() => takeOutput(wasm.memory, wasm.readKept(kept)));
    },

    release: async ({ kept }) => {
      this.#release(kept);
      return undefined;
    },

    memory: async () => (await this.#started).memory.buffer.byteLength,

    close: async ({ session }) => {
      const quantizer = this.#quantizers.get(session);
      if (this.#quantizers.delete(session) && !this.#broken) this.#guard(() => quantizer?.free());
      const slot = this.#sessions.get(session);
      if (slot === undefined) return undefined;
      this.#sessions.delete(session);
      slot.closed = true;
      if (!this.#broken) this.#guard(() => slot.wasm.free());
      return undefined;
    },
  };

  /** Runs a session's model when its turn comes; `take` gets the outputs and the milliseconds that it took. */
  #run<T>(
    slot: SessionSlot,
    { inputs, outputs, profile, progress: wantsProgress, begun }: RunRequest,
    context: Context<"run"> | Context<"mail">,
    take: (wasm: Wasm, totalMs: number) => T,
  ): Promise<T> {
    return this.#inTurn(slot, async () => {
      const wasm = await this.#started;
      const run = slot.wasm;
      if (context.cancelled) throw abortError(context.signal, "run");
      try {
        const start = performance.now();
        this.#guard(() => {
          const before = slot.given;
          // Until all are there, what the module holds is no set that a later run could begin with.
          slot.given = undefined;
          slot.given = giveInputs(wasm.memory, run, inputs, before);
          run.begin(outputs, profile);
        });
        begun?.();
        for (;;) {
          if (context.cancelled) throw abortError(context.signal, "run");
          if (this.#guard(() => run.advance(STEP_BUDGET_MS))) break;
          this.#startHelpers?.();
          if (wantsProgress) (context as Context<"run">).progress({ done: run.done(), total: run.total() });
          await this.#env.breathe();
          if (slot.closed) throw disposed();
        }
        const totalMs = performance.now() - start;
        return this.#guard(() => {
          if (run.outputsChanged()) slot.outputs = run.outputs();
          return take(wasm, totalMs);
        });
      } finally {
        if (!this.#broken && !slot.closed) this.#guard(() => run.end());
      }
    });
  }

  #release(kept: number): void {
    if (!this.#broken) this.#guard(() => this.#wasm?.releaseKept(kept));
  }

  /** Waits a moment for the page to ask for another run, when runs come in a row. */
  #listen(session: number): void {
    const slot = this.#sessions.get(session);
    if (slot?.mailbox === undefined) return;
    slot.answered = performance.now();
    if (!slot.inRow) return;
    const id = slot.mailbox.listen();
    if (id !== undefined) void this.handle({ id, method: "mail", params: { session } });
  }

  async #start(
    threads: number,
    variant: Variant | "auto",
    wasmUrls: Readonly<Partial<Record<Variant, string>>>,
    early: Variant | undefined,
  ): Promise<[Wasm, VariantChoice]> {
    const { platform } = this.#env;
    const start = async (choice: VariantChoice): Promise<[Wasm, VariantChoice]> => [
      await this.#env.instantiate(
        choice.variant,
        wasmUrls[choice.variant],
        this.#startsLate(choice, threads) ? 0 : choice.threads - 1,
        choice.variant === early,
      ),
      choice,
    ];
    const choice = chooseVariant(platform, { threads, variant });
    const started = await start(choice).catch((error: unknown) => {
      // Some phones refuse the large address range that shared memory has to reserve.
      if (variant !== "auto" || !choice.variant.endsWith("_mt") || !isRefusal(error)) throw error;
      const single = chooseVariant({ ...platform, sharedMemory: false }, { variant });
      return start({ ...single, threadsReason: noThreads(error) });
    });
    this.#wasm = started[0];
    return started;
  }

  async #startThreads(
    wasm: Wasm,
    choice: VariantChoice,
    asked: { threads: number; variant: Variant | "auto" },
  ): Promise<RuntimeInfo> {
    let { threads, threadsReason } = choice;
    const helpers = threads - 1;
    if (this.#startsLate(choice, asked.threads)) {
      this.#startHelpers = () => {
        this.#startHelpers = undefined;
        if (this.#broken) return;
        // The page was told of more threads; with one, everything works.
        wasm.startHelpers(helpers).catch((error: unknown) => console.warn(`weblane: ${noThreads(error)}`));
      };
    } else if (helpers > 0) {
      await wasm.startHelpers(helpers).catch((error: unknown) => {
        // Some pages may not start so many workers.
        if (asked.variant !== "auto" || !isRefusal(error)) throw error;
        threads = 1;
        threadsReason = noThreads(error);
      });
    }
    return { ...choice, threads: wasm.startPool(threads), threadsReason, version: wasm.version() };
  }

  /** Whether helpers come after the first run only. Who asks for a number of threads gets them at once. */
  #startsLate({ threads }: VariantChoice, asked: number): boolean {
    return threads > 1 && asked === 0 && this.#hasFewProcessors;
  }

  get #hasFewProcessors(): boolean {
    return this.#env.platform.processors <= FEW_PROCESSORS;
  }

  /**
   * Runs a piece of the warm-up, if the build has its threads and is not warm yet, and so many bytes that are left take
   * long enough at the pace of those that came.
   */
  #whileBytesCome(count: number, left: number): void {
    const now = performance.now();
    if (this.#bytes.count === 0) this.#bytes.since = now;
    this.#bytes.count += count;
    if (left <= 0) this.#endWarmUp();
    const wasm = this.#cold;
    if (wasm === undefined || left <= 0) return;
    const restMs = (left * (now - this.#bytes.since)) / this.#bytes.count;
    const { few, many } = WARM_UP_REST_MS;
    if (this.#warming === undefined && restMs < (this.#hasFewProcessors ? few : many)) return;
    this.#guard(() => {
      if (this.#warming === undefined) this.#warming = new WarmUp(wasm.WasmSession);
      else if (this.#warming.advance(WARM_UP_MS)) this.#endWarmUp();
    });
  }

  /** Ends the warm-up wherever it is. */
  #endWarmUp(): void {
    const warming = this.#warming;
    if (warming === undefined) return;
    this.#cold = this.#warming = undefined;
    if (!this.#broken) this.#guard(() => warming.free());
  }

  #slot(session: number): SessionSlot {
    const slot = this.#sessions.get(session);
    if (this.#broken) throw this.#broken;
    if (slot === undefined) throw disposed();
    return slot;
  }

  #quantizer(session: number): WasmQuantizer {
    const quantizer = this.#quantizers.get(session);
    if (this.#broken) throw this.#broken;
    if (quantizer === undefined) throw disposed();
    return quantizer;
  }

  /** Where the files of a session, or of a model to be quantised, go. */
  #files(session: number): WasmFiles {
    return this.#quantizers.has(session) ? this.#quantizer(session) : this.#slot(session).wasm;
  }

  #expect(session: number, file: string, total: number): void {
    if (total >= HELPED_BYTES) this.#startHelpers?.();
    if (file !== "" || total === 0) return;
    const wasm = this.#files(session);
    this.#guard(() => wasm.expect(total));
  }

  #push(session: number, file: string, bytes: Uint8Array): void {
    const wasm = this.#files(session);
    this.#guard(() => (file === "" ? wasm.push(bytes) : wasm.pushExternal(file, bytes)));
  }

  /** Runs `work` when everything that came before it for this session has ended, well or badly. */
  #inTurn<T>(slot: SessionSlot, work: () => Promise<T>): Promise<T> {
    const turn = slot.tail.then(() => {
      if (slot.closed) throw disposed();
      return work();
    });
    slot.tail = turn.catch(() => {});
    return turn;
  }

  /** Calls into WebAssembly. A trap breaks this worker for good: its memory may be in any state. */
  #guard<T>(call: () => T): T {
    if (this.#broken) throw this.#broken;
    try {
      return call();
    } catch (error) {
      if (!isTrap(error)) throw toWeblaneError(error);
      this.#broken = describeTrap(error, this.#wasm?.lastFailure());
      throw this.#broken;
    }
  }
}

/** Whether something could not be had that a build without threads does without. */
function isRefusal(error: unknown): boolean {
  const { code } = toWeblaneError(error);
  return code === "out_of_memory" || code === "unsupported_platform";
}

function noThreads(error: unknown): string {
  return `several threads could not be started: ${toWeblaneError(error).message}`;
}

function disposed(): WeblaneError {
  return new WeblaneError("disposed", "the session was disposed of");
}

function isTrap(error: unknown): error is Error {
  // RangeError and InternalError are how engines report that the stack is used up.
  return (
    error instanceof WebAssembly.RuntimeError ||
    error instanceof RangeError ||
    (error instanceof Error && error.name === "InternalError")
  );
}

/** The error of a trap; `said` is what the panic or the refused allocation left behind. */
export function describeTrap(error: unknown, said: ErrorShape | undefined): WeblaneError {
  const text = said?.message ?? toWeblaneError(error).message;
  const code = isErrorCode(said?.code) ? said.code : "internal";
  return new WeblaneError(
    code,
    `the engine stopped: ${text}; dispose of the session and load the model again`,
    {
      cause: error,
    },
  );
}

/**
 * Brings the inputs of a run into the module's memory. `before` are those of the last run: where name, type and shape of
 * all of them are the same, the module is not asked again.
 */
function giveInputs(
  memory: WebAssembly.Memory,
  run: WasmSession,
  inputs: readonly WireTensor[],
  before: readonly Given[] | undefined,
): readonly Given[] | undefined {
  const same = before?.length === inputs.length && inputs.every((input, i) => fits(input, before[i]));
  const given = same ? before : inputs.map((input) => giveInput(run, input));
  for (const [i, { data }] of inputs.entries()) {
    const place = given[i];
    if (place === undefined || !(data instanceof Uint8Array)) continue;
    // A fresh view: the calls may have grown the memory, and that detaches older ones.
    new Uint8Array(memory.buffer, place.ptr, place.length).set(data);
  }
  return given.every((place) => place !== undefined) ? given : undefined;
}

function fits({ name, type, dims, data }: WireTensor, place: Given | undefined): boolean {
  return (
    place !== undefined &&
    data instanceof Uint8Array &&
    name === place.name &&
    type === place.type &&
    data.byteLength === place.length &&
    dims.length === place.dims.length &&
    dims.every((size, axis) => size === place.dims[axis])
  );
}

/** Announces one input; strings go over at once and have no place here, nor has what is in the module already. */
function giveInput(run: WasmSession, { name, type, dims, data }: WireTensor): Given | undefined {
  if ("kept" in data) {
    run.inputKept(name, data.kept);
    return undefined;
  }
  const sizes = Uint32Array.from(dims);
  if (!(data instanceof Uint8Array)) {
    run.inputStrings(name, sizes, data);
    return undefined;
  }
  return { name, type, dims, ptr: run.input(name, type, sizes, data.byteLength), length: data.byteLength };
}

function takeOutput(memory: WebAssembly.Memory, output: WasmOutput): WireTensor {
  const { name, type, dims, ptr, len, strings } = output;
  return { name, type, dims, data: strings ?? new Uint8Array(memory.buffer, ptr, len).slice() };
}

function keepOutput(run: WasmSession, output: string): WireTensor {
  const { name, type, dims, id } = run.keep(output);
  return { name, type, dims, data: { kept: id } };
}

/** Buffers of a method's result that move to the page. */
function transferables(method: Method, result: Out<Method>): Transferable[] {
  if (method === "run") {
    const { outputs, returned } = result as Out<"run">;
    return [...large(outputs), ...returned];
  }
  if (method === "push") return result === undefined ? [] : [result as ArrayBuffer];
  if (method === "quantize") return [(result as Out<"quantize">).model.buffer];
  if (method === "read") return large([result as Out<"read">]);
  return method === "mail" ? large((result as Out<"mail">) ?? []) : [];
}

function large(tensors: readonly WireTensor[]): Transferable[] {
  return tensors.flatMap(({ data }) =>
    data instanceof Uint8Array && data.byteLength >= MIN_TRANSFER_BYTES ? [data.buffer as ArrayBuffer] : [],
  );
}
