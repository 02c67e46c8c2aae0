/**
 * A small network that runs while the bytes of the real model arrive.
 *
 * Browsers compile a function of WebAssembly when it is first called, fast and badly, and once more, well, after it has
 * run for about a millisecond; the good code counts from the next call on. Without this, all of it happens in the load
 * and the first run. The network has the layers that most of a typical run is spent in, each with enough work to be
 * noticed, and it is loaded the way every model is.
 */
import type { WasmSession } from "./wasm.js";

/** Side of the image: a layer takes about a millisecond in code that is not optimised. */
const SIDE = 28;
const CHANNELS = 64;
/** The first run has functions compiled, the second one lets them be noticed. */
const RUNS = 2;

/** Runs the network piece by piece. */
export class WarmUp {
  readonly #session: WasmSession;
  #runs = 0;
  #running = false;

  constructor(Session: new (options: { optimize: "all"; precision: "fast" }) => WasmSession) {
    this.#session = new Session({ optimize: "all", precision: "fast" });
    this.#session.push(network());
    this.#session.externals();
    this.#session.finish();
    this.#session.input("x", "float32", Uint32Array.of(1, 3, SIDE, SIDE), 12 * SIDE * SIDE);
  }

  /** Runs for about so many milliseconds. True when that was all. */
  advance(budgetMs: number): boolean {
    if (!this.#running) this.#session.begin(undefined, false);
    this.#running = !this.#session.advance(budgetMs);
    if (this.#running) return false;
    this.#session.end();
    this.#runs++;
    return this.#runs === RUNS;
  }

  /** Frees the network's memory. */
  free(): void {
    this.#session.free();
  }
}

// Enough of protobuf for the model below.

function varint(n: number): number[] {
  return n < 128 ? [n] : [(n % 128) + 128, ...varint(Math.floor(n / 128))];
}

const int = (field: number, n: number) => [...varint(field * 8), ...varint(n)];
const bytes = (field: number, content: number[]) => [
  ...varint(field * 8 + 2),
  ...varint(content.length),
  ...content,
];
const text = (field: number, s: string) => bytes(field, [...new TextEncoder().encode(s)]);

// Numbers of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto and ValueInfoProto.

/** An attribute: a number, or a list of them. */
function attribute(name: string, value: number | number[]): number[] {
  const [content, type] =
    typeof value === "number" ? [int(3, value), 2] : [value.flatMap((n) => int(8, n)), 7];
  return bytes(5, [...text(1, name), ...content, ...int(20, type)]);
}

function node(
  op: string,
  inputs: string[],
  output: string,
  attributes: Record<string, number | number[]> = {},
) {
  return bytes(1, [
    ...inputs.flatMap((name) => text(1, name)),
    ...text(2, output),
    ...text(4, op),
    ...Object.entries(attributes).flatMap(([name, value]) => attribute(name, value)),
  ]);
}

/** A constant of zeros, which a file need not hold. */
function zeros(name: string, dims: number[]): number[] {
  const shape = [
    ...int(1, dims.length),
    ...int(2, 7),
    ...dims.flatMap((n) => int(7, n)),
    ...text(8, `${name}.shape`),
  ];
  return [...node("ConstantOfShape", [`${name}.shape`], name), ...bytes(5, shape)];
}

/** A convolution and what follows it; `shape` is outputs, inputs of a group, side of the kernel. */
function conv(
  x: string,
  y: string,
  shape: [number, number, number],
  stride: number,
  clip: boolean,
): number[] {
  const [outputs, inputs, side] = shape;
  const attributes = {
    group: inputs === 1 ? outputs : 1,
    pads: [0, 0, 0, 0].fill(side >> 1),
    strides: [stride, stride],
  };
  return [
    ...zeros(`${y}.w`, [outputs, inputs, side, side]),
    ...zeros(`${y}.b`, [outputs]),
    ...node("Conv", [x, `${y}.w`, `${y}.b`], clip ? `${y}.c` : y, attributes),
    ...(clip ? node("Relu", [`${y}.c`], y) : []),
  ];
}

function value(field: number, name: string, dims: number[]): number[] {
  const shape = dims.flatMap((n) => bytes(1, int(1, n)));
  return bytes(field, [...text(1, name), ...bytes(2, bytes(1, [...int(1, 1), ...bytes(2, shape)]))]);
}

/** The network as an .onnx file: a stem, a block of depthwise and 1 x 1 layers, a 3 x 3 layer, a classifier. */
export function network(): Uint8Array<ArrayBuffer> {
  const graph = [
    ...conv("x", "a", [CHANNELS, 3, 3], 1, true),
    ...conv("a", "b", [CHANNELS, CHANNELS, 1], 1, true),
    ...conv("b", "c", [CHANNELS, 1, 3], 1, true),
    ...conv("c", "d", [CHANNELS, CHANNELS, 1], 1, false),
    ...node("Add", ["d", "a"], "e"),
    ...conv("e", "f", [CHANNELS, 1, 3], 2, true),
    ...conv("f", "g", [CHANNELS, CHANNELS, 3], 1, true),
    ...node("GlobalAveragePool", ["g"], "h"),
    ...node("Flatten", ["h"], "i"),
    ...zeros("w", [CHANNELS, CHANNELS]),
    ...node("Gemm", ["i", "w"], "y", { transB: 1 }),
    ...value(11, "x", [1, 3, SIDE, SIDE]),
    ...value(12, "y", [1, CHANNELS]),
  ];
  return Uint8Array.from([...int(1, 8), ...bytes(7, graph), ...bytes(8, int(2, 13))]);
}
