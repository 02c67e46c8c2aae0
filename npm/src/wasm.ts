/**
 * The WebAssembly module as the worker sees it: what `runtime-web` exports through wasm-bindgen. Types only.
 *
 * Every method throws a plain object `{ code, message, node?, op? }` for a failure that was foreseen; anything else
 * that it throws is a trap, after which the module is not usable any more.
 */
import type { ErrorShape } from "./errors.js";
import type {
  EngineOptions,
  ModelInfo,
  NodeTiming,
  QuantizeProgress,
  QuantizeReport,
  QuantizerOptions,
  ValueInfo,
} from "./protocol.js";
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

/** An output that stays in the module; `id` names it from now on. */
export interface WasmKept {
  readonly name: string;
  readonly type: TensorType;
  readonly dims: readonly number[];
  readonly id: number;
}

/** Takes a model and its external data. */
export interface WasmFiles {
  /** How long the model file will be, where that is known. Comes before the first bytes. */
  expect(bytes: number): void;
  /** The next bytes of the model file, in chunks of any size. */
  push(bytes: Uint8Array): void;
  /** The model file is complete. Returns the locations of external data that it names. */
  externals(): readonly string[];
  /** The next bytes of a file of external data. */
  pushExternal(location: string, bytes: Uint8Array): void;
  /** Frees everything. */
  free(): void;
}

/** One model on its way: first it takes the bytes, then samples, then it works in steps. */
export interface WasmQuantizer extends WasmFiles {
  /** The inputs that samples give values for. */
  inputs(): readonly ValueInfo[];
  /** The inputs given from now on belong to a further sample. */
  nextSample(): void;
  /** An input of the current sample. */
  input(name: string, type: TensorType, dims: Uint32Array, bytes: Uint8Array): void;
  /** Model and samples are complete. */
  begin(): void;
  /** Works until all is done (true) or about `budgetMs` have passed (false). */
  advance(budgetMs: number): boolean;
  progress(): QuantizeProgress;
  /** The new file; it can be taken once. */
  model(): Uint8Array<ArrayBuffer>;
  report(): QuantizeReport;
}

/** One model: first it takes the bytes, then it runs. */
export interface WasmSession extends WasmFiles {
  /** All bytes are there: optimises and plans. */
  finish(): ModelInfo;
  /** Storage for an input of the next run; returns the address to which `byteLength` bytes go. */
  input(name: string, type: TensorType, dims: Uint32Array, byteLength: number): number;
  /** A string input of the next run. */
  inputStrings(name: string, dims: Uint32Array, values: readonly string[]): void;
  /** An input of the next run that was kept in this module. */
  inputKept(name: string, id: number): void;
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
  /** Keeps an output of the finished run in the module. */
  keep(name: string): WasmKept;
  /** Times of the finished run, when `begin` asked for them. */
  timings(): readonly NodeTiming[];
  /** Ends a run, finished or not. */
  end(): void;
}

/** An instantiated build. */
export interface Wasm {
  readonly memory: WebAssembly.Memory;
  /** Makes the pool, in which this worker is alone at first; gives how many threads there will be, which may be fewer. */
  startPool(threads: number): number;
  /**
   * Starts workers that join the pool when they are ready, be it in the middle of a run. Once. Rejects when the page
   * cannot start them.
   */
  startHelpers(count: number): Promise<void>;
  readonly WasmSession: new (options: EngineOptions) => WasmSession;
  readonly WasmQuantizer: new (options: QuantizerOptions) => WasmQuantizer;
  /** A tensor that was kept; its address holds until the next call. */
  readKept(id: number): WasmOutput;
  /** Lets go of a tensor that was kept, if it is still there. */
  releaseKept(id: number): void;
  version(): string;
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
  readonly WasmQuantizer: Wasm["WasmQuantizer"];
  readonly readKept: Wasm["readKept"];
  readonly releaseKept: Wasm["releaseKept"];
  readonly version: Wasm["version"];
  readonly stopWord: Wasm["stopWord"];
  readonly runningWord: Wasm["runningWord"];
  readonly lastFailure: Wasm["lastFailure"];
  /** Starts workers for the pool; builds with threads only. */
  initThreadPool?(workers: number): Promise<unknown>;
  readonly startPool: Wasm["startPool"];
  /** Has the workers that were started for it join the pool. */
  startHelpers(): void;
  /** Makes the calling worker a thread of the pool and never returns; builds with threads only. */
  wbg_rayon_start_worker?(receiver: number): void;
}
