/**
 * From what callers pass to `run` to tensors for the worker, and back.
 */
import type { Client } from "./client.js";
import { WeblaneError } from "./errors.js";
import { Kept } from "./kept.js";
import type { ValueInfo, WireTensor } from "./protocol.js";
import {
  describe,
  elementCount,
  isTensorType,
  type PlainValues,
  Tensor,
  type TensorDataMap,
  type TensorType,
  type TypedArray,
  toData,
  typeOfArray,
  viewAs,
} from "./tensor.js";
import { MIN_TRANSFER_BYTES, SpareBuffers } from "./transfer.js";

/** Data with its dimensions; the type is the model's unless it is given. */
export interface FeedObject {
  /** Elements in row-major order. */
  readonly data: TypedArray | Uint8ClampedArray | PlainValues;
  /** Size along each axis. */
  readonly dims: readonly number[];
  /** Element type. */
  readonly type?: TensorType | undefined;
}

/**
 * The value of one input. Bare arrays are enough when the model fixes all dimensions of the input, or all but one.
 */
export type Feed = Tensor | FeedObject | TypedArray | Uint8ClampedArray | PlainValues;

/** Input name -> value. */
export type Feeds = Readonly<Record<string, Feed>>;

/** Tensors for the worker and the buffers that move there. */
export interface WireFeeds {
  readonly inputs: readonly WireTensor[];
  readonly transfer: readonly ArrayBuffer[];
  /** Those of them that are copies of the caller's data. */
  readonly lent: readonly ArrayBuffer[];
  /** What is in the engine and stays there; each is used until the run has ended. */
  readonly kept: readonly Kept[];
}

/**
 * Checks names and types and turns the values into bytes. Shapes are checked by the engine, which knows more about
 * them.
 *
 * @param move - gives the caller's buffers away instead of copying them
 * @param spare - where copies go
 * @param client - whose tensors may be given
 */
export function encodeFeeds(
  infos: readonly ValueInfo[],
  feeds: Feeds,
  move: boolean,
  spare = new SpareBuffers(),
  client?: Client,
): WireFeeds {
  if (typeof feeds !== "object" || feeds === null || Array.isArray(feeds) || ArrayBuffer.isView(feeds)) {
    throw new WeblaneError("invalid_input", `inputs are given as { name: value }, not as ${describe(feeds)}`);
  }
  for (const name of Object.keys(feeds)) {
    if (!infos.some((info) => info.name === name)) {
      throw new WeblaneError(
        "unknown_input",
        `the model has no input "${name}"; it takes ${infos.map(show).join(", ")}`,
      );
    }
  }
  const missing = infos.filter(({ name }) => feeds[name] === undefined || feeds[name] === null);
  if (missing.length > 0) {
    throw new WeblaneError("missing_input", `not given: ${missing.map(show).join(", ")}`);
  }
  const transfer = new Set<ArrayBuffer>();
  const lent: ArrayBuffer[] = [];
  const given = new Map<Kept, { kept: number; last: boolean }>();
  const inputs = infos.map((info): WireTensor => {
    const { type, dims, data } = resolveFeed(info, feeds[info.name] as Feed);
    if (data instanceof Kept) {
      const ref = given.get(data) ?? { kept: idOf(data, info, client), last: false };
      given.set(data, ref);
      return { name: info.name, type, dims, data: ref };
    }
    if (type === "string") return { name: info.name, type, dims, data: [...(data as readonly string[])] };
    const elements = data as TypedArray;
    let bytes = new Uint8Array(elements.buffer, elements.byteOffset, elements.byteLength);
    const small = bytes.byteLength < MIN_TRANSFER_BYTES;
    // A view of a larger or shared buffer cannot move, and cloning it would clone all of the buffer.
    const whole = bytes.buffer instanceof ArrayBuffer && bytes.byteLength === bytes.buffer.byteLength;
    const moves = move && whole;
    if (moves) {
      transfer.add(bytes.buffer as ArrayBuffer);
    } else if (!small) {
      const copy = spare.take(bytes.byteLength);
      copy.set(bytes);
      bytes = copy;
      lent.push(copy.buffer);
      transfer.add(copy.buffer);
    } else if (!whole) {
      bytes = bytes.slice();
    }
    return { name: info.name, type, dims, data: bytes };
  });
  const kept: Kept[] = [];
  for (const [tensor, ref] of given) {
    ref.last = move && tensor.handOver();
    if (ref.last) continue;
    tensor.use();
    kept.push(tensor);
  }
  return { inputs, transfer: [...transfer], lent, kept };
}

function idOf(kept: Kept, { name }: ValueInfo, client: Client | undefined): number {
  const id = client && kept.idFor(client);
  if (id !== undefined) return id;
  throw new WeblaneError(
    "invalid_input",
    `input "${name}": the tensor is in the engine of another session; sessions on one Runtime can give each other theirs`,
  );
}

/** The tensor of a message; `client` is where it came from, if it may be one that is in the engine. */
export function decodeTensor({ type, dims, data }: WireTensor, client?: Client): Tensor {
  if (!isTensorType(type)) {
    throw new WeblaneError("unsupported_dtype", `${type} tensors have no form in JavaScript`);
  }
  if ("kept" in data) {
    if (client === undefined) throw new WeblaneError("internal", "a tensor in the engine came from nowhere");
    return Tensor.inEngine(type, dims, new Kept(client, data.kept));
  }
  return data instanceof Uint8Array && type !== "string"
    ? new Tensor(type, viewAs(type, data.buffer), dims)
    : new Tensor("string", data as readonly string[], dims);
}

interface Resolved {
  readonly type: TensorType;
  readonly dims: readonly number[];
  readonly data: TensorDataMap[TensorType] | Kept;
}

function resolveFeed(info: ValueInfo, feed: Feed): Resolved {
  const what = `input "${info.name}"`;
  if (!isObjectFeed(feed)) {
    const data = ofModelType(info, feed, what);
    return { type: info.type, dims: inferDims(info, data.length), data };
  }
  const { dims } = feed;
  const type = feed.type ?? typeFor(info, feed.data);
  if (!isTensorType(type))
    throw new WeblaneError("unsupported_dtype", `${what}: "${type}" is not a tensor type`);
  if (type !== info.type) {
    throw new WeblaneError("type_mismatch", `${what} takes ${shape(info)}, not a tensor of type ${type}`);
  }
  const kept = feed instanceof Tensor ? feed.kept : undefined;
  if (kept?.released) throw new WeblaneError("disposed", `${what}: the tensor was disposed of`);
  if (kept !== undefined) return { type, dims: [...dims], data: kept };
  const data = toData(type, feed.data, what);
  const count = elementCount(dims, `${what}: dims`);
  if (count !== data.length) {
    throw new WeblaneError(
      "shape_mismatch",
      `${what}: dims [${dims.join(", ")}] have ${count} elements, data has ${data.length}`,
    );
  }
  return { type, dims: [...dims], data };
}

function isObjectFeed(feed: Feed): feed is Tensor | FeedObject {
  return !Array.isArray(feed) && !ArrayBuffer.isView(feed) && typeof feed === "object" && "data" in feed;
}

/** The model's type when the data can be of it; else the data's own type, for the error message. */
function typeFor(info: ValueInfo, data: unknown): TensorType {
  const own = typeOfArray(data);
  if (own === undefined || own === info.type) return info.type;
  const asBits = own === "uint16" && (info.type === "float16" || info.type === "bfloat16");
  return asBits || (own === "uint8" && info.type === "bool") ? info.type : own;
}

function ofModelType(info: ValueInfo, data: unknown, what: string): TensorDataMap[TensorType] {
  const type = typeFor(info, data);
  if (type !== info.type) {
    throw new WeblaneError("type_mismatch", `${what} takes ${shape(info)}, not ${describe(data)}`);
  }
  return toData(info.type, data, what);
}

/** The shape of `length` elements where at most one dimension of the input is open. */
export function inferDims(info: ValueInfo, length: number): readonly number[] {
  if (info.dims[0] === "*") {
    throw new WeblaneError("shape_mismatch", `input ${show(info)} takes any shape; give one: { data, dims }`);
  }
  const open = info.dims.filter((d) => typeof d === "string");
  if (open.length > 1) {
    throw new WeblaneError(
      "shape_mismatch",
      `input ${show(info)} leaves ${open.length} dimensions open; give them: { data, dims }`,
    );
  }
  const fixed = info.dims.reduce<number>((n, d) => (typeof d === "number" ? n * d : n), 1);
  const fits = open.length === 0 ? fixed === length : fixed > 0 && length % fixed === 0;
  if (!fits) {
    throw new WeblaneError(
      "shape_mismatch",
      `input ${show(info)} takes ${open.length === 0 ? "" : "a multiple of "}${fixed} elements, ${length} were given`,
    );
  }
  return info.dims.map((d) => (typeof d === "number" ? d : length / fixed));
}

/** An input or output as messages name it. */
export function show(info: ValueInfo): string {
  return `"${info.name}" (${shape(info)})`;
}

function shape({ type, dims }: ValueInfo): string {
  return `${type}[${dims.join(", ")}]`;
}
