/**
 * What the page and its worker say to each other: one typed map from method to parameters, result and progress.
 * This module is types only.
 */
import type { ErrorShape } from "./errors.js";
import type { MailboxInit } from "./mailbox.js";
import type { TensorType } from "./tensor.js";
import type { Variant } from "./variant.js";

/** A model input or output. */
export interface ValueInfo {
  /** Name in the model. */
  readonly name: string;
  /** Element type. */
  readonly type: TensorType;
  /**
   * Sizes; a string is a symbolic dimension that a run may choose, `"?"` one without a name. The single entry `"*"`
   * stands for any number of dimensions.
   */
  readonly dims: readonly (number | string)[];
}

/** How far a load has come. */
export interface LoadProgress {
  /**
   * `download`: bytes of the model; `compile` (the WebAssembly build), `parse` and `optimize`: 0 of 1, then 1 of 1.
   * Download and compile run at the same time. Bytes of external data are downloads too, each file from 0 on.
   */
  readonly phase: "download" | "compile" | "parse" | "optimize";
  readonly loaded: number;
  /** 0 when it is not known. */
  readonly total: number;
}

/** How far a run has come, in nodes of the optimised graph. */
export interface RunProgress {
  readonly done: number;
  readonly total: number;
}

/** What the engine knows about a loaded model. */
export interface ModelInfo {
  readonly inputs: readonly ValueInfo[];
  readonly outputs: readonly ValueInfo[];
  /** Version of the default operator set. */
  readonly opset: number;
  /** Operators of the model as written and how often each occurs; those of other domains as `domain.Name`. */
  readonly operators: Readonly<Record<string, number>>;
  /** Program that wrote the file. */
  readonly producer: string;
  /** Nodes that are left after optimisation. */
  readonly nodes: number;
  /** Bytes of the constants that are left after optimisation. */
  readonly weightBytes: number;
}

/** What the worker runs. */
export interface RuntimeInfo {
  readonly variant: Variant;
  readonly variantReason: string;
  readonly threads: number;
  readonly threadsReason: string;
  /** Version of the WebAssembly build. */
  readonly version: string;
}

/** Time spent in one node of the optimised graph. */
export interface NodeTiming {
  /** Name of the node. */
  readonly node: string;
  /** Operator, including what was fused into it. */
  readonly op: string;
  /** Kernel that computes it; empty for operators that have only one. */
  readonly kernel: string;
  /** Milliseconds from the beginning of the run to that of the node. */
  readonly startMs: number;
  /** Milliseconds. */
  readonly ms: number;
  /** Multiplications and additions; 0 where nobody counts them. */
  readonly flops: number;
  /** Bytes of the operands, weights included. */
  readonly readBytes: number;
  /** Bytes of the results. */
  readonly writtenBytes: number;
}

/** A tensor on its way: raw little-endian bytes, or strings. */
export interface WireTensor {
  readonly name: string;
  readonly type: TensorType;
  readonly dims: readonly number[];
  readonly data: Uint8Array | readonly string[] | KeptRef;
}

/** The place of elements that are in the engine. */
export interface KeptRef {
  readonly kept: number;
  /** The run that takes it is the last that wants it. */
  readonly last?: boolean;
}

/** Two 32-bit words in shared memory, by address in bytes, that stop a run even in the middle of a kernel. */
export interface StopWords {
  readonly buffer: SharedArrayBuffer;
  /** To be set to 1 by the page, but only while `running` is 1. */
  readonly stop: number;
  /** 1 while nodes are executed, as opposed to weights being prepared that later runs need too. */
  readonly running: number;
}

/** Options that reach the engine. */
export interface EngineOptions {
  readonly optimize: "all" | "none";
  readonly precision: "fast" | "exact";
}

/** How a model is quantised, as it reaches the engine; what is absent has the engine's default. */
export interface QuantizerOptions {
  readonly mode: "dynamic" | "static" | "int4" | "int8-weights" | "float16" | "float32";
  readonly skipNodes?: readonly string[];
  readonly skipOps?: readonly string[];
  readonly perChannel?: boolean;
  readonly reduceRange?: boolean;
  readonly embeddings?: boolean;
  readonly blockSize?: number;
  readonly symmetric?: boolean;
  readonly accuracyLevel?: number;
  readonly method?: "minmax" | "percentile" | "entropy";
  readonly percentile?: number;
  readonly signedActivations?: boolean;
  readonly keepIo?: boolean;
  readonly compare?: number;
}

/** How far a quantisation has come: samples or nodes done of this stage. */
export interface QuantizeProgress {
  /** The float model runs on samples; nodes are rewritten; both models run on samples. */
  readonly stage: "calibrate" | "quantize" | "compare";
  readonly done: number;
  readonly total: number;
}

/** What became of a model. */
export interface QuantizeReport {
  readonly mode: QuantizerOptions["mode"];
  /** Nodes that were quantised, in the order of the file. */
  readonly nodes: readonly QuantizedNode[];
  /** Nodes of the same kinds that were not, and why. */
  readonly skipped: readonly { readonly node: string; readonly op: string; readonly reason: string }[];
  /** The outputs, float and quantised, when samples were given. */
  readonly outputs: readonly QuantizedOutput[];
  /** Samples that were given. */
  readonly samples: number;
  /** Bytes of the file before, external data included. */
  readonly bytesBefore: number;
  readonly bytesAfter: number;
}

/** A node that was quantised. */
export interface QuantizedNode {
  /** Its name in the model, or its first result when it has none. */
  readonly node: string;
  readonly op: string;
  /** Its weights; empty when it has none. */
  readonly weights: string;
  readonly shape: readonly number[];
  /** What they became. */
  readonly kind: string;
  /** Signal-to-quantisation-noise ratio of the weights in dB; null without weights, or when nothing was lost. */
  readonly sqnrDb: number | null;
  /** The same of the node's result over the samples, with the noise of everything before it. */
  readonly outputSqnrDb: number | null;
  readonly bytesBefore: number;
  readonly bytesAfter: number;
}

/** An output of a model, float and quantised, over the samples. */
export interface QuantizedOutput {
  readonly name: string;
  /** Mean over the samples of the cosine of the angle between both, and the least. */
  readonly cosine: number;
  readonly minCosine: number;
  /** The largest difference of an element. */
  readonly maxError: number;
  /** Share of rows, along the last axis of more than one element, whose largest element is at the same place. */
  readonly top1: number | null;
  readonly samples: number;
}

/** Names a session of the worker. */
interface OfSession {
  readonly session: number;
}

/** Names a file of a model: the model itself (`""`) or a location of external data. */
interface OfFile extends OfSession {
  readonly file: string;
}

/** Method -> parameters (`in`), result (`out`) and what it reports on the way (`progress`). */
export interface Protocol {
  /** Chooses and starts a WebAssembly build. Comes once; other methods may be sent before it ends and wait. */
  start: {
    in: {
      readonly threads: number;
      readonly variant: Variant | "auto";
      /** Addresses that replace the ones next to the worker. */
      readonly wasmUrls: Readonly<Partial<Record<Variant, string>>>;
      /** The build that the page compiles meanwhile, if it does: the worker waits for it with `compiled`. */
      readonly early: Variant | undefined;
    };
    out: { readonly info: RuntimeInfo; readonly stop?: StopWords | undefined };
    progress: LoadProgress;
  };
  /** Makes room for a session that its files then flow into. */
  open: { in: OfSession & { readonly options: EngineOptions }; out: undefined; progress: never };
  /** The worker fetches a file. */
  fetch: { in: OfFile & { readonly url: string }; out: undefined; progress: LoadProgress };
  /** The page hands over a file piece by piece. */
  push: {
    in: OfFile & {
      readonly bytes: Uint8Array<ArrayBuffer>;
      /** The first piece of a file says how long it will be, where that is known. */
      readonly total: number | undefined;
      /** How much is still to come, as far as it takes time. */
      readonly left: number;
      /** Whether the page wants the buffer back. */
      readonly lent: boolean;
    };
    out: ArrayBuffer | undefined;
    progress: never;
  };
  /**
   * The model file is complete: optimises and plans. When the model names files of external data, it says where they are
   * instead, and comes again once all of them are there.
   */
  finish: {
    in: OfSession;
    out: { readonly model: ModelInfo } | { readonly externals: readonly string[] };
    progress: LoadProgress;
  };
  /** Runs the model. Runs of one session follow one another in the order in which they came. */
  run: {
    in: OfSession & {
      readonly inputs: readonly WireTensor[];
      /** Buffers of inputs that the page made for this call and wants back. */
      readonly lent: readonly ArrayBuffer[];
      /** Names of the outputs that come to the page; all when absent. */
      readonly outputs?: readonly string[] | undefined;
      /** Names of outputs that stay in the engine; they are none of `outputs`. */
      readonly keep?: readonly string[] | undefined;
      readonly profile: boolean;
      readonly progress: boolean;
    };
    out: {
      readonly outputs: readonly WireTensor[];
      /** The lent buffers. */
      readonly returned: readonly ArrayBuffer[];
      readonly nodes: readonly NodeTiming[];
      readonly totalMs: number;
    };
    progress: RunProgress;
  };
  /**
   * Runs the model on the inputs in the session's mailbox, which comes with the first call that uses it. The result is
   * the outputs, or nothing when they lie in the mailbox and differ from the last result in their elements alone.
   */
  mail: {
    in: OfSession & { readonly mailbox?: MailboxInit | undefined };
    out: readonly WireTensor[] | undefined;
    progress: never;
  };
  /** Makes room for a model to be quantised; its files flow in as those of a session do. */
  openQuantizer: { in: OfSession & { readonly options: QuantizerOptions }; out: undefined; progress: never };
  /** The model file is complete: which locations of external data does it name? */
  quantizerExternals: { in: OfSession; out: readonly string[]; progress: never };
  /** All files are there: the inputs that samples give values for. */
  sampleInputs: { in: OfSession; out: readonly ValueInfo[]; progress: never };
  /** Quantises the model. */
  quantize: {
    in: OfSession & { readonly samples: readonly (readonly WireTensor[])[] };
    out: { readonly model: Uint8Array<ArrayBuffer>; readonly report: QuantizeReport };
    progress: QuantizeProgress;
  };
  /** The elements of a tensor that is in the engine. */
  read: { in: { readonly kept: number }; out: WireTensor; progress: never };
  /** Lets go of a tensor that is in the engine. */
  release: { in: { readonly kept: number }; out: undefined; progress: never };
  /** Bytes of WebAssembly memory. */
  memory: { in: undefined; out: number; progress: never };
  /** Frees a session. */
  close: { in: OfSession; out: undefined; progress: never };
}

/** Name of a method. */
export type Method = keyof Protocol;
/** Parameters of a method. */
export type In<M extends Method> = Protocol[M]["in"];
/** Result of a method. */
export type Out<M extends Method> = Protocol[M]["out"];
/** Progress of a method. */
export type Progress<M extends Method> = Protocol[M]["progress"];

/** Page to worker: a call. Replies carry the same id. */
export type Request = {
  [M in Method]: { readonly id: number; readonly method: M; readonly params: In<M> };
}[Method];

/** What a pool worker needs to join the shared memory. */
export interface PoolSeat {
  readonly variant: Variant;
  readonly module: WebAssembly.Module;
  readonly memory: WebAssembly.Memory;
  /** Address of the channel on which the worker receives its part of the pool. */
  readonly receiver: number;
}

/** Everything that a page sends to a worker. */
export type ToWorker =
  | Request
  /** The caller does not want this call's result any more. */
  | { readonly cancel: number }
  /** The build named `early` by `start`; nothing when it could not be compiled. */
  | { readonly compiled: WebAssembly.Module | undefined }
  /** The pool workers that the worker asked for have been started, or could not be. */
  | { readonly spawned: true | string }
  /** All of them sit. */
  | { readonly seated: true }
  /** First and only message to a pool worker. */
  | { readonly seat: PoolSeat };

/** Everything that a worker sends to its page. */
export type FromWorker =
  | { readonly id: number; readonly result: Out<Method> }
  | { readonly id: number; readonly error: ErrorShape }
  | { readonly id: number; readonly progress: Progress<Method> }
  /**
   * Pool workers will be wanted, so many in all: the page starts them while the build compiles. It is the page that
   * starts them since it is the one who hears of a crash: the worker itself may be waiting for the crashed one.
   */
  | { readonly hire: number }
  /** The pool workers get their seats. */
  | { readonly spawn: { readonly seat: PoolSeat; readonly count: number } }
  /** From a pool worker: it sits, and will hear of nothing any more. */
  | { readonly sits: true }
  /** From a pool worker: it has crashed. */
  | { readonly crash: ErrorShape };
