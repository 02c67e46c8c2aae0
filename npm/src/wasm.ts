/**
 * The WebAssembly module as the worker sees it: what `runtime-web` exports through wasm-bindgen. Types only.
 *
 * Every method throws a plain object `{ code, message, node?, op? }` for a failure that was foreseen; anything else
 * that it throws is a trap, after which the module is not usable any more.
 */
import type { ErrorShape } from "./errors.js";
import type { EngineOptions, ModelInfo, NodeTiming } from "./protocol.js";
import type { TensorType } from "./tensor.js";

/** An output of a finished run. Numeric elements lie in memory at `ptr`; they are valid until the next call. */
export interface WasmOutput {
  readonly name: string;
  readonly type: TensorType;
  readonly dims: readonly number[];
  readonly ptr: number;
  readonly len: number;
  readonly strings?: readonly string[] | undefined;
}

/** One model: first it takes the bytes, then it runs. */
export interface WasmSession {
  /** How long the model file will be, where that is known. Comes before the first bytes. */
  expect(bytes: number): void;
  /** The next bytes of the model file, in chunks of any size. */
  push(bytes: Uint8Array): void;
  /** The model file is complete. Returns the locations of external data that it names. */
  externals(): readonly string[];
  /** The next bytes of a file of external data. */
  pushExternal(location: string, bytes: Uint8Array): void;
  /** All bytes are there: optimises and plans. */
  finish(): ModelInfo;
  /** Storage for an input of the next run; returns the address to which `byteLength` bytes go. */
  input(name: string, type: TensorType, dims: Uint32Array, byteLength: number): number;
  /** A string input of the next run. */
  inputStrings(name: string, dims: Uint32Array, values: readonly string[]): void;
  /**
   * Begins a run over the inputs given since the last one, or, when there were none, over those of the last one: their
   * addresses stay.
   */
  begin(outputs: readonly string[] | undefined, profile: boolean): void;
  /** Executes nodes until all are done (true) or about `budgetMs` have passed (false). */
  advance(budgetMs: number): boolean;
  /** Nodes executed. */
  done(): number;
  /** Nodes in all. */
  total(): number;
  /** Whether `outputs` would say something else than when this was asked last. */
  outputsChanged(): boolean;
  /** Outputs of the finished run, in the order asked for. */
  outputs(): readonly WasmOutput[];
  /** Times of the finished run, when `begin` asked for them. */
  timings(): readonly NodeTiming[];
  /** Ends a run, finished or not. */
  end(): void;
  /** Frees everything. */
  free(): void;
}

/** An instantiated build. */
export interface Wasm {
  readonly memory: WebAssembly.Memory;
  /**
   * Starts the pool, which the first run needs and reading a file does not; gives the number of threads that it has
   * got, which may be fewer than asked for.
   */
  startThreads(threads: number): Promise<number>;
  readonly WasmSession: new (options: EngineOptions) => WasmSession;
  version(): string;
  /**
   * Runs a piece of the network that makes the engine compile what a first run needs, for about `budgetMs`. True when
   * that was all: it is not called again then.
   */
  warmUp(budgetMs: number): boolean;
  /** Address of the word that stops a run when the page sets it. */
  stopWord(): number;
  /** Address of the word that is 1 while nodes are executed. */
  runningWord(): number;
  /** What a panic or a refused allocation said before the trap, if there was one. */
  lastFailure(): ErrorShape | undefined;
}

/** What wasm-bindgen generates for one build. */
export interface Glue {
  default(options: { module_or_path: WebAssembly.Module; memory?: WebAssembly.Memory }): Promise<{
    memory: WebAssembly.Memory;
  }>;
  readonly WasmSession: Wasm["WasmSession"];
  readonly version: Wasm["version"];
  readonly warmUp: Wasm["warmUp"];
  readonly stopWord: Wasm["stopWord"];
  readonly runningWord: Wasm["runningWord"];
  readonly lastFailure: Wasm["lastFailure"];
  /** Starts workers for the pool; builds with threads only. */
  initThreadPool?(workers: number): Promise<unknown>;
  /** Makes the pool of the worker itself and the workers that were started; returns how many threads it has. */
  startPool(threads: number): number;
  /** Makes the calling worker a thread of the pool and never returns; builds with threads only. */
  wbg_rayon_start_worker?(receiver: number): void;
}
