/**
 * Tensors at the edge of weblane: a type, a dense row-major array, and its dimensions.
 */
import { WeblaneError } from "./errors.js";
import { encodeFloat16, float16Array, type HalfArray, isFloat16Array } from "./half.js";
import { Kept } from "./kept.js";

/** The array class that holds the elements of each tensor type. */
export interface TensorDataMap {
  float32: Float32Array;
  /** `Float16Array` where the JavaScript engine has it, otherwise the bits of half-precision numbers. */
  float16: HalfArray | Uint16Array;
  /** The upper 16 bits of single-precision numbers. */
  bfloat16: Uint16Array;
  float64: Float64Array;
  int8: Int8Array;
  uint8: Uint8Array;
  int16: Int16Array;
  uint16: Uint16Array;
  int32: Int32Array;
  uint32: Uint32Array;
  int64: BigInt64Array;
  uint64: BigUint64Array;
  /** One byte per element, 0 or 1. */
  bool: Uint8Array;
  string: readonly string[];
}

/** Element type of a tensor, spelled as in the ONNX documentation. */
export type TensorType = keyof TensorDataMap;

/** A typed array of any tensor type. */
export type TypedArray = Exclude<TensorDataMap[TensorType], readonly string[]>;

/** Ordinary JavaScript values that a tensor can be made of. */
export type PlainValues = readonly number[] | readonly bigint[] | readonly boolean[] | readonly string[];

type Numeric = Exclude<TensorType, "string">;

interface ArrayClass {
  readonly BYTES_PER_ELEMENT: number;
  new (length: number): TypedArray;
  new (buffer: ArrayBufferLike, byteOffset?: number, length?: number): TypedArray;
}

// The one table of element types: array class and bytes per element follow from it.
const ARRAYS: Readonly<Record<Exclude<Numeric, "float16">, ArrayClass>> = {
  float32: Float32Array,
  bfloat16: Uint16Array,
  float64: Float64Array,
  int8: Int8Array,
  uint8: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
};

/** All tensor types. */
export const TENSOR_TYPES: readonly TensorType[] = [
  ...(Object.keys(ARRAYS) as Numeric[]),
  "float16",
  "string",
];

function arrayClass(type: Numeric): ArrayClass {
  return type === "float16" ? ((float16Array() ?? Uint16Array) as unknown as ArrayClass) : ARRAYS[type];
}

/** Whether `type` is a tensor type. */
export function isTensorType(type: unknown): type is TensorType {
  return type === "float16" || type === "string" || (typeof type === "string" && Object.hasOwn(ARRAYS, type));
}

/** Bytes per element of a numeric type. */
export function bytesPerElement(type: Numeric): number {
  return arrayClass(type).BYTES_PER_ELEMENT;
}

/** The bytes of a buffer as the array class of a type, without a copy. */
export function viewAs<T extends Numeric>(type: T, buffer: ArrayBufferLike): TensorDataMap[T] {
  return new (arrayClass(type))(buffer) as TensorDataMap[T];
}

/** Number of elements of a shape. Throws on anything that is not a list of non-negative integers. */
export function elementCount(dims: readonly number[], what = "dims"): number {
  if (!Array.isArray(dims)) {
    throw new WeblaneError("invalid_input", `${what} must be an array of sizes, not ${describe(dims)}`);
  }
  let count = 1;
  for (const d of dims as readonly unknown[]) {
    if (typeof d !== "number" || !Number.isSafeInteger(d) || d < 0) {
      throw new WeblaneError(
        "invalid_input",
        `${what} [${dims.join(", ")}] must hold whole numbers of at least 0, not ${describe(d)}`,
      );
    }
    count *= d;
  }
  if (!Number.isSafeInteger(count)) {
    throw new WeblaneError(
      "limit_exceeded",
      `${what} [${dims.join(", ")}] has more elements than can be addressed`,
    );
  }
  return count;
}

/** The tensor type that goes with an array's class; `undefined` for what is no typed array. */
export function typeOfArray(data: unknown): Numeric | undefined {
  if (data instanceof Float32Array) return "float32";
  if (data instanceof Uint8Array || data instanceof Uint8ClampedArray) return "uint8";
  if (data instanceof Int8Array) return "int8";
  if (data instanceof Uint16Array) return "uint16";
  if (data instanceof Int16Array) return "int16";
  if (data instanceof Int32Array) return "int32";
  if (data instanceof Uint32Array) return "uint32";
  if (data instanceof BigInt64Array) return "int64";
  if (data instanceof BigUint64Array) return "uint64";
  if (data instanceof Float64Array) return "float64";
  if (isFloat16Array(data)) return "float16";
  return undefined;
}

/** Whether an array's class can hold the elements of a type as they are. */
function holds(type: TensorType, data: unknown): boolean {
  const own = typeOfArray(data);
  if (own === type) return true;
  return (type === "bfloat16" && own === "uint16") || (type === "bool" && own === "uint8");
}

/**
 * The elements of `values` in the array class of `type`. Typed arrays of that class are used as they are; ordinary
 * arrays are converted, and refused when a value does not fit the type.
 */
export function toData<T extends TensorType>(type: T, values: unknown, what = "data"): TensorDataMap[T] {
  if (type === "string") {
    if (Array.isArray(values) && values.every((v) => typeof v === "string")) {
      return values as unknown as TensorDataMap[T];
    }
    throw new WeblaneError(
      "type_mismatch",
      `${what}: a string tensor takes an array of strings, not ${describe(values)}`,
    );
  }
  const numeric = type as Numeric;
  if (values instanceof Uint8ClampedArray && numeric === "uint8") {
    return new Uint8Array(values.buffer, values.byteOffset, values.length) as unknown as TensorDataMap[T];
  }
  if (numeric === "float16" && values instanceof Uint16Array) {
    const Half = float16Array();
    return (Half ? new Half(values.buffer, values.byteOffset, values.length) : values) as TensorDataMap[T];
  }
  if (holds(type, values)) return values as TensorDataMap[T];
  if (!Array.isArray(values)) {
    throw new WeblaneError(
      "type_mismatch",
      `${what}: a ${type} tensor takes ${article(arrayClass(numeric).name)} or an array of numbers, not ${describe(values)}`,
    );
  }
  if (numeric === "float16") {
    const numbers = values.map((v) => toNumber(v, numeric, what));
    const Half = float16Array();
    return (Half ? new Half(numbers) : encodeFloat16(numbers)) as TensorDataMap[T];
  }
  if (numeric === "bfloat16") {
    throw new WeblaneError("type_mismatch", `${what}: a bfloat16 tensor takes a Uint16Array of bits`);
  }
  const out = new (arrayClass(numeric))(values.length);
  if (out instanceof BigInt64Array || out instanceof BigUint64Array) {
    const min = numeric === "int64" ? -(2n ** 63n) : 0n;
    const max = min + 2n ** 64n - 1n;
    for (let i = 0; i < out.length; i++) {
      const v: unknown = values[i];
      if (typeof v !== "bigint" && !Number.isSafeInteger(v)) throw misfit(v, numeric, what);
      const big = BigInt(v as bigint | number);
      if (big < min || big > max) throw misfit(v, numeric, what);
      out[i] = big;
    }
  } else {
    for (let i = 0; i < out.length; i++) {
      const v: unknown = values[i];
      const number = toNumber(v, numeric, what);
      out[i] = number;
      // A float may round; an integer must come back as it was.
      if (numeric !== "float32" && numeric !== "float64" && out[i] !== number) throw misfit(v, numeric, what);
    }
  }
  return out as TensorDataMap[T];
}

function toNumber(value: unknown, type: Numeric, what: string): number {
  if (type === "bool" && (typeof value === "boolean" || value === 0 || value === 1)) return Number(value);
  if (typeof value !== "number" || type === "bool") throw misfit(value, type, what);
  return value;
}

function misfit(value: unknown, type: TensorType, what: string): WeblaneError {
  return new WeblaneError("type_mismatch", `${what}: ${describe(value)} does not fit a ${type} tensor`);
}

/** A short description of a value for an error message. */
export function describe(value: unknown): string {
  if (value === null) return "null";
  if (typeof value === "object") return article(value.constructor?.name || "Object");
  if (typeof value === "function") return "a function";
  if (typeof value === "string")
    return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}...` : value);
  return `${String(value)}${typeof value === "bigint" ? "n" : ""}`;
}

function article(name: string): string {
  return `${/^[AEIOU]/.test(name) ? "an" : "a"} ${name}`;
}

/**
 * A dense tensor in row-major order.
 *
 * ```ts
 * new Tensor("float32", [1, 2, 3, 4, 5, 6], [2, 3]);
 * new Tensor(new BigInt64Array([101n, 102n]), [1, 2]);
 * ```
 *
 * Its elements are here, or, of an output that a run was told to `keep`, in the engine.
 */
export class Tensor<T extends TensorType = TensorType> {
  /** Element type. */
  readonly type: T;
  /** Size along each axis; empty for a scalar. */
  readonly dims: readonly number[];
  /** Number of elements. */
  readonly size: number;
  readonly #elements: TensorDataMap[T] | Kept;

  /**
   * A tensor of the given type.
   *
   * @param type - element type
   * @param data - elements: a typed array (used as it is, not copied) or ordinary values (converted)
   * @param dims - size along each axis; without it the tensor has one axis
   */
  constructor(type: T, data: TensorDataMap[T] | PlainValues, dims?: readonly number[]);
  /**
   * A tensor whose type follows from the array's class; an array of strings gives a string tensor and an array of
   * booleans a bool tensor.
   */
  constructor(
    data: TypedArray | Uint8ClampedArray | readonly string[] | readonly boolean[],
    dims?: readonly number[],
  );
  constructor(a: unknown, b?: unknown, c?: unknown) {
    let type: TensorType;
    let data: unknown;
    let dims: unknown;
    if (typeof a === "string") {
      if (!isTensorType(a)) throw new WeblaneError("unsupported_dtype", `"${a}" is not a tensor type`);
      [type, data, dims] = [a, b, c];
    } else {
      [type, data, dims] = [inferType(a), a, b];
    }
    const elements = data instanceof Kept ? data : toData(type, data);
    const length = elements instanceof Kept ? undefined : elements.length;
    const shape = (dims ?? [length]) as readonly number[];
    const count = elementCount(shape);
    if (length !== undefined && count !== length) {
      throw new WeblaneError(
        "shape_mismatch",
        `a tensor with dims [${shape.join(", ")}] has ${count} elements, data has ${length}`,
      );
    }
    this.type = type as T;
    this.#elements = elements as TensorDataMap[T] | Kept;
    this.dims = Object.freeze([...shape]);
    this.size = count;
  }

  /** @internal A tensor whose elements are in the engine. */
  static inEngine(type: TensorType, dims: readonly number[], kept: Kept): Tensor {
    return new Tensor(type, kept as unknown as PlainValues, dims);
  }

  /** @internal The place of elements that are in the engine. */
  get kept(): Kept | undefined {
    return this.#elements instanceof Kept ? this.#elements : undefined;
  }

  /**
   * Elements, in row-major order.
   *
   * @throws WeblaneError `invalid_input` when they are in the engine: {@link Tensor.getData} fetches them
   */
  get data(): TensorDataMap[T] {
    if (!(this.#elements instanceof Kept)) return this.#elements;
    throw new WeblaneError(
      "invalid_input",
      `the elements of this ${this.type}[${this.dims.join(", ")}] tensor are in the engine; await getData() fetches them`,
    );
  }

  /** Where the elements are: on the page, in the engine, or nowhere any more. */
  get location(): "page" | "engine" | "none" {
    if (!(this.#elements instanceof Kept)) return "page";
    return this.#elements.released ? "none" : "engine";
  }

  /**
   * The elements, copied from the engine when they are there.
   *
   * @throws WeblaneError `disposed` when they are gone
   */
  async getData(): Promise<TensorDataMap[T]> {
    if (!(this.#elements instanceof Kept)) return this.#elements;
    const { data } = await this.#elements.read();
    const bytes = data instanceof Uint8Array && this.type !== "string";
    return (bytes ? viewAs(this.type as Numeric, data.buffer) : data) as TensorDataMap[T];
  }

  /**
   * Frees elements that are in the engine, which otherwise happens some time after nobody holds the tensor any more. Those
   * that are here stay.
   */
  dispose(): void {
    if (this.#elements instanceof Kept) this.#elements.release();
  }
}

function inferType(data: unknown): TensorType {
  const type = typeOfArray(data);
  if (type !== undefined) return type;
  if (Array.isArray(data) && data.length > 0) {
    if (typeof data[0] === "string") return "string";
    if (typeof data[0] === "boolean") return "bool";
  }
  throw new WeblaneError(
    "type_mismatch",
    `the type of a tensor cannot be told from ${describe(data)}; give it first: new Tensor("float32", data, dims)`,
  );
}
