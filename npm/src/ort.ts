/**
 * weblane in the shape of onnxruntime-web, so that code and libraries written for that run by changing an alias:
 *
 * ```ts
 * import * as ort from "weblane/ort"; // was: "onnxruntime-web"
 * ```
 *
 * @packageDocumentation
 */
import type { Spawn } from "./environment.js";
import { WeblaneError } from "./errors.js";
import type { Feed } from "./feeds.js";
import type { ValueInfo } from "./protocol.js";
import type { WasmPaths } from "./runtime.js";
import { type LoadOptions, Session } from "./session.js";
import type { ModelSource } from "./source.js";
import {
  describe,
  type PlainValues,
  type TensorDataMap,
  type TensorType,
  type TypedArray,
  Tensor as WeblaneTensor,
} from "./tensor.js";
import { VARIANTS } from "./variant.js";

/** The settings of {@link env} that concern WebAssembly. */
export interface WebAssemblyFlags {
  /** Threads of sessions created from now on; 0 or `undefined` chooses. */
  numThreads?: number | undefined;
  /**
   * Where weblane's WebAssembly files are. Addresses of onnxruntime-web's own files (a directory whose path names
   * `onnxruntime`, or the keys `wasm` and `mjs`) are of no use here and are passed over, so that code which sets them
   * still runs.
   */
  wasmPaths?: WasmPaths | { wasm?: string | URL; mjs?: string | URL } | undefined;
  /** Accepted for compatibility: the engine always lives in a worker. */
  proxy?: boolean | undefined;
  /** Accepted for compatibility: SIMD is always used. */
  simd?: boolean | "fixed" | "relaxed" | undefined;
  /** Accepted for compatibility: use a signal or `release` to end a start that takes too long. */
  initTimeout?: number | undefined;
  /** Accepted for compatibility. */
  trace?: boolean | undefined;
}

/** Settings that onnxruntime-web keeps for the whole page. */
export interface Env {
  /** What is written to the console; weblane itself writes only warnings about settings that it passes over. */
  logLevel?: "verbose" | "info" | "warning" | "error" | "fatal" | undefined;
  /** Accepted for compatibility. */
  debug?: boolean | undefined;
  /** Accepted for compatibility. */
  trace?: boolean | undefined;
  /** Settings of WebAssembly. */
  readonly wasm: WebAssemblyFlags;
  /** Accepted for compatibility: nothing runs on the GPU. */
  readonly webgl: Record<string, unknown>;
  /** Accepted for compatibility: nothing runs on the GPU. */
  readonly webgpu: Record<string, unknown>;
  /** `common` is the version of onnxruntime-common whose shape this module has. */
  readonly versions: { readonly common: string; readonly web?: string };
  [name: string]: unknown;
}

/**
 * Settings for sessions that are created from now on. This one object is state of the page, as in onnxruntime-web;
 * a session reads it once, in {@link InferenceSession.create}.
 */
export const env: Env = {
  logLevel: "warning",
  wasm: {},
  webgl: {},
  webgpu: {},
  versions: { common: "1.30.0" },
};

/** A tensor with the members of onnxruntime-web's. */
export class Tensor<T extends Tensor.Type = Tensor.Type> {
  /** Element type. */
  readonly type: T;
  /** Size along each axis. */
  readonly dims: readonly number[];
  /** Number of elements. */
  readonly size: number;
  #data: Tensor.DataTypeMap[T] | undefined;
  #inEngine: WeblaneTensor | undefined;

  /** A tensor of the given type; `data` is used as it is when it is a typed array. */
  constructor(
    type: T,
    data: Tensor.DataTypeMap[T] | PlainValues | Uint8ClampedArray,
    dims?: readonly number[],
  );
  /** A tensor whose type follows from the array's class. */
  constructor(
    data: TypedArray | Uint8ClampedArray | readonly string[] | readonly boolean[],
    dims?: readonly number[],
  );
  constructor(...args: [never, never, never?]) {
    const [given] = args as unknown[];
    const tensor = given instanceof WeblaneTensor ? given : new WeblaneTensor(...args);
    const { type, dims, size } = tensor;
    this.type = type as T;
    // onnxruntime-web's dims are an ordinary array, and some libraries put another in its place.
    this.dims = [...dims];
    this.size = size;
    if (tensor.location === "engine") this.#inEngine = tensor;
    else this.#data = tensor.data as Tensor.DataTypeMap[T];
  }

  /** @internal A result of weblane's. */
  static of(tensor: WeblaneTensor): Tensor {
    return new Tensor(tensor as never);
  }

  /** @internal What weblane takes in the place of this tensor. */
  get feed(): Feed {
    return this.#inEngine ?? this;
  }

  /** The elements. Throws after {@link Tensor.dispose}, and where only {@link Tensor.getData} gets them. */
  get data(): Tensor.DataTypeMap[T] {
    if (this.#inEngine !== undefined) return this.#inEngine.data as Tensor.DataTypeMap[T];
    if (this.#data === undefined) throw new WeblaneError("disposed", "the tensor is disposed");
    return this.#data;
  }

  /** `"cpu"`, `"cpu-pinned"` in the memory of the engine, or `"none"` after {@link Tensor.dispose}. */
  get location(): Tensor.DataLocation {
    if (this.#inEngine !== undefined) return "cpu-pinned";
    return this.#data === undefined ? "none" : "cpu";
  }

  /** The elements; `release` disposes of the tensor. */
  async getData(release = false): Promise<Tensor.DataTypeMap[T]> {
    const data = await (this.#inEngine === undefined ? this.data : this.#inEngine.getData());
    if (release) this.dispose();
    return data as Tensor.DataTypeMap[T];
  }

  /** Lets go of the elements. */
  dispose(): void {
    this.#inEngine?.dispose();
    this.#inEngine = this.#data = undefined;
  }

  /** The same elements in another shape. */
  reshape(dims: readonly number[]): Tensor<T> {
    return new Tensor<T>(this.type, this.data, dims);
  }
}

/** Types of {@link Tensor}. */
export declare namespace Tensor {
  /** The array class of each type. */
  type DataTypeMap = { [K in TensorType]: K extends "string" ? string[] : TensorDataMap[K] };
  /** Element type. */
  type Type = keyof DataTypeMap;
  /** Any data of a tensor. */
  type DataType = DataTypeMap[Type];
  /** Where the elements are. */
  type DataLocation = "none" | "cpu" | "cpu-pinned";
}

/** A tensor whose type is known. */
export type TypedTensor<T extends Tensor.Type> = Tensor<T>;

/** Types of {@link InferenceSession}. */
export declare namespace InferenceSession {
  /** Input name to tensor. */
  type FeedsType = { readonly [name: string]: Tensor };
  /** Output name to tensor. */
  type OnnxValueMapType = { readonly [name: string]: Tensor };
  /** Names of the wanted outputs, or a map from name to a tensor to fill (or `null`). */
  type FetchesType = readonly string[] | { readonly [name: string]: Tensor | null };
  /** What a run returns. */
  type ReturnType = OnnxValueMapType;

  /** The options of onnxruntime-web. Those without a comment are accepted and have no effect here. */
  interface SessionOptions {
    /** Must have `"wasm"` or `"cpu"` among its entries when it is given. */
    executionProviders?: readonly (string | { readonly name: string })[];
    /** `"disabled"` runs the graph as it was written; every other level optimises fully. */
    graphOptimizationLevel?: "disabled" | "basic" | "extended" | "layout" | "all";
    /** Threads of this session; overrules `env.wasm.numThreads`. */
    intraOpNumThreads?: number;
    /** The files that hold the model's weights when the model file does not. */
    externalData?: readonly (
      | string
      | { readonly path: string; readonly data: string | Uint8Array | ArrayBufferLike | Blob }
    )[];
    /**
     * For all outputs or for each: `"cpu"`, or `"cpu-pinned"` for the memory of the engine, from which inputs of later runs
     * need no copy. Such a tensor has `getData()` instead of `data`, and stays there until `dispose()`.
     */
    preferredOutputLocation?: string | { readonly [output: string]: string };
    interOpNumThreads?: number;
    freeDimensionOverrides?: { readonly [name: string]: number };
    enableCpuMemArena?: boolean;
    enableMemPattern?: boolean;
    executionMode?: "sequential" | "parallel";
    optimizedModelFilePath?: string;
    enableProfiling?: boolean;
    profileFilePrefix?: string;
    logId?: string;
    logSeverityLevel?: 0 | 1 | 2 | 3 | 4;
    logVerbosityLevel?: number;
    enableGraphCapture?: boolean;
    extra?: Record<string, unknown>;
  }

  /** The options of a run. Those without a comment are accepted and have no effect here. */
  interface RunOptions {
    /** Rejects the run at once with `aborted`. */
    terminate?: boolean;
    logSeverityLevel?: 0 | 1 | 2 | 3 | 4;
    logVerbosityLevel?: number;
    tag?: string;
    extra?: Record<string, unknown>;
  }

  /** An input or output of the model. */
  interface ValueMetadata {
    readonly name: string;
    readonly isTensor: true;
    readonly type: Tensor.Type;
    readonly shape: readonly (number | string)[];
  }
}

type SessionOptions = InferenceSession.SessionOptions;

/** A loaded model with the members of onnxruntime-web's session. */
export class InferenceSession {
  readonly #session: Session;
  /** Names of the outputs that stay in the engine. */
  readonly #pinned: ReadonlySet<string>;

  private constructor(session: Session, location: SessionOptions["preferredOutputLocation"]) {
    this.#session = session;
    const isPinned = (name: string) => (typeof location === "object" ? location[name] : location) === PINNED;
    this.#pinned = new Set(this.outputNames.filter(isPinned));
  }

  /** Loads a model from an address. */
  static create(uri: string, options?: SessionOptions): Promise<InferenceSession>;
  /** Loads a model from its bytes. */
  static create(buffer: ArrayBufferLike | Uint8Array, options?: SessionOptions): Promise<InferenceSession>;
  /** Loads a model from a part of a buffer. */
  static create(
    buffer: ArrayBufferLike,
    byteOffset: number,
    byteLength?: number,
    options?: SessionOptions,
  ): Promise<InferenceSession>;
  static create(
    source: string | ArrayBufferLike | Uint8Array,
    ...rest: unknown[]
  ): Promise<InferenceSession> {
    return InferenceSession.createWith(undefined, source, ...rest);
  }

  /** @internal Lets tests put a fake in the place of the worker. */
  static async createWith(
    spawn: Spawn | undefined,
    source: unknown,
    ...rest: unknown[]
  ): Promise<InferenceSession> {
    const numbers = rest.slice(0, 2).filter((argument) => typeof argument === "number");
    const options = rest[numbers.length] ?? {};
    if (typeof options !== "object") {
      throw new WeblaneError("invalid_option", `options must be an object, not ${describe(options)}`);
    }
    const model = numbers.length === 0 ? (source as ModelSource) : partOf(source, numbers);
    const session = await Session.loadWith(model, loadOptions(options), spawn);
    return new InferenceSession(session, (options as SessionOptions).preferredOutputLocation);
  }

  /** Runs the model for all outputs. */
  run(
    feeds: InferenceSession.FeedsType,
    options?: InferenceSession.RunOptions,
  ): Promise<InferenceSession.ReturnType>;
  /** Runs the model for the outputs that `fetches` names. */
  run(
    feeds: InferenceSession.FeedsType,
    fetches: InferenceSession.FetchesType,
    options?: InferenceSession.RunOptions,
  ): Promise<InferenceSession.ReturnType>;
  async run(
    feeds: InferenceSession.FeedsType,
    second?: unknown,
    third?: unknown,
  ): Promise<InferenceSession.ReturnType> {
    const { names, targets, options } = this.#arguments(second, third);
    if (options.terminate) throw new WeblaneError("aborted", "the run was asked to terminate");
    const given = Object.entries(feeds).map(([name, tensor]) => [
      name,
      tensor instanceof Tensor ? tensor.feed : tensor,
    ]);
    const keep = (names ?? this.outputNames).filter((name) => this.#pinned.has(name) && !targets[name]);
    const results = await this.#session.run(Object.fromEntries(given), { outputs: names, keep });
    const named: Record<string, Tensor> = {};
    for (const [name, result] of Object.entries(results)) {
      const target = targets[name];
      named[name] = target ? fill(target, name, result.type, result.data, result.dims) : Tensor.of(result);
    }
    return named;
  }

  /** Ends the session; its memory returns. */
  release(): Promise<void> {
    return this.#session.dispose();
  }

  /** Accepted for compatibility; {@link Session.profile} of weblane measures nodes. */
  startProfiling(): void {}

  /** Accepted for compatibility; {@link Session.profile} of weblane measures nodes. */
  endProfiling(): void {}

  /** Names of the inputs. */
  get inputNames(): readonly string[] {
    return this.#session.inputs.map(({ name }) => name);
  }

  /** Names of the outputs. */
  get outputNames(): readonly string[] {
    return this.#session.outputs.map(({ name }) => name);
  }

  /** Types and shapes of the inputs. */
  get inputMetadata(): readonly InferenceSession.ValueMetadata[] {
    return this.#session.inputs.map(metadata);
  }

  /** Types and shapes of the outputs. */
  get outputMetadata(): readonly InferenceSession.ValueMetadata[] {
    return this.#session.outputs.map(metadata);
  }

  /** Tells fetches and options apart, as onnxruntime-web does: an object with an output's name is fetches. */
  #arguments(second: unknown, third: unknown) {
    for (const argument of [second, third]) {
      if (
        argument === null ||
        !["object", "undefined"].includes(typeof argument) ||
        argument instanceof Tensor
      ) {
        throw new WeblaneError(
          "invalid_option",
          `fetches and options must be objects, not ${describe(argument)}`,
        );
      }
    }
    type Targets = { readonly [name: string]: Tensor | null };
    const options = (third ?? {}) as InferenceSession.RunOptions;
    if (Array.isArray(second)) {
      if (second.length === 0) throw new WeblaneError("invalid_option", "fetches must name an output");
      return { names: second as string[], targets: {} as Targets, options };
    }
    const fetches = (second ?? {}) as Targets;
    const names = this.outputNames.filter((name) => {
      return Object.hasOwn(fetches, name) && (fetches[name] === null || fetches[name] instanceof Tensor);
    });
    if (names.length > 0) return { names, targets: fetches, options };
    return {
      names: undefined,
      targets: {} as Targets,
      options: (second ?? {}) as InferenceSession.RunOptions,
    };
  }
}

function metadata({ name, type, dims }: ValueInfo): InferenceSession.ValueMetadata {
  return { name, isTensor: true, type, shape: dims };
}

/** Puts a result into a tensor of the caller's. */
function fill(
  target: Tensor,
  name: string,
  type: TensorType,
  data: TensorDataMap[TensorType],
  dims: readonly number[],
): Tensor {
  if (target.type !== type || target.dims.join() !== dims.join()) {
    throw new WeblaneError(
      "shape_mismatch",
      `output "${name}" is ${type}[${dims.join(", ")}], the tensor to fill is ${target.type}[${target.dims.join(", ")}]`,
    );
  }
  for (let i = 0; i < data.length; i++) (target.data as unknown[])[i] = data[i];
  return target;
}

function partOf(source: unknown, [offset = 0, length]: number[]): Uint8Array {
  const isBuffer =
    source instanceof ArrayBuffer ||
    (typeof SharedArrayBuffer !== "undefined" && source instanceof SharedArrayBuffer);
  if (!isBuffer) {
    throw new WeblaneError(
      "invalid_option",
      `byteOffset goes with an ArrayBuffer, not with ${describe(source)}`,
    );
  }
  try {
    return new Uint8Array(source, offset, length);
  } catch (error) {
    throw new WeblaneError(
      "invalid_option",
      `bytes ${offset} to ${length === undefined ? "the end" : offset + length} are not within the buffer's ${source.byteLength}`,
      { cause: error },
    );
  }
}

/** Where outputs stay in the memory of the engine. */
const PINNED = "cpu-pinned";

const LEVELS: readonly unknown[] = [undefined, "disabled", "basic", "extended", "layout", "all"];

/** weblane's load options of a session's options and {@link env}. */
function loadOptions(options: SessionOptions): LoadOptions {
  const { executionProviders, graphOptimizationLevel, preferredOutputLocation, externalData } = options;
  if (executionProviders !== undefined) {
    const names = executionProviders.map((provider) =>
      typeof provider === "string" ? provider : provider.name,
    );
    if (names.length > 0 && !names.some((name) => name === "wasm" || name === "cpu")) {
      throw new WeblaneError(
        "invalid_option",
        `none of the execution providers [${names.join(", ")}] is available; weblane has "wasm"`,
      );
    }
  }
  if (!LEVELS.includes(graphOptimizationLevel)) {
    throw new WeblaneError(
      "invalid_option",
      `graphOptimizationLevel must be one of ${LEVELS.slice(1).join(", ")}, not ${describe(graphOptimizationLevel)}`,
    );
  }
  const locations =
    typeof preferredOutputLocation === "object"
      ? Object.values(preferredOutputLocation)
      : [preferredOutputLocation];
  for (const location of locations) {
    if (location !== undefined && location !== "cpu" && location !== PINNED) {
      throw new WeblaneError(
        "invalid_option",
        `outputs are in memory ("cpu", or "${PINNED}" in the engine's), they cannot be in "${location}"`,
      );
    }
  }
  return {
    threads: options.intraOpNumThreads ?? env.wasm.numThreads,
    wasmPaths: ownPaths(env.wasm.wasmPaths),
    optimize: graphOptimizationLevel === "disabled" ? "none" : "all",
    externalData: externalData && externalFiles(externalData),
  };
}

function externalFiles(files: NonNullable<SessionOptions["externalData"]>): Record<string, ModelSource> {
  return Object.fromEntries(
    files.map((file) => {
      if (typeof file === "string") return [file.replace(/^.*\//, ""), file];
      return [file.path, file.data as ModelSource];
    }),
  );
}

function ownPaths(paths: WebAssemblyFlags["wasmPaths"]): WasmPaths | undefined {
  if (paths === undefined) return undefined;
  const foreign =
    typeof paths === "string" || paths instanceof URL
      ? /onnxruntime/i.test(String(paths))
      : !Object.keys(paths).some((key) => (VARIANTS as readonly string[]).includes(key));
  if (!foreign) return paths as WasmPaths;
  if (env.logLevel === "verbose" || env.logLevel === "info" || env.logLevel === "warning") {
    console.warn("weblane/ort: env.wasm.wasmPaths names files of onnxruntime-web and is passed over");
  }
  return undefined;
}

export default { InferenceSession, Tensor, env };
