/**
 * Writes small ONNX models: just enough of protobuf, so that tests need no file and no other language.
 */
import type { TensorType } from "../src/tensor.js";

const TYPES: Partial<Record<TensorType, number>> = {
  float32: 1,
  uint8: 2,
  int8: 3,
  uint16: 4,
  int16: 5,
  int32: 6,
  int64: 7,
  string: 8,
  bool: 9,
  float16: 10,
  float64: 11,
  uint32: 12,
  uint64: 13,
  bfloat16: 16,
};

export interface Value {
  name: string;
  type: TensorType;
  dims: readonly (number | string)[];
}

export interface NodeSpec {
  op: string;
  inputs: string[];
  outputs: string[];
}

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

function value(field: number, { name, type, dims }: Value): number[] {
  const shape = dims.flatMap((d) => bytes(1, typeof d === "number" ? int(1, d) : text(2, d)));
  const tensor = [...int(1, TYPES[type] ?? 0), ...bytes(2, shape)];
  return bytes(field, [...text(1, name), ...bytes(2, bytes(1, tensor))]);
}

/** A ModelProto of opset 17. */
export function model(inputs: Value[], nodes: NodeSpec[], outputs: Value[]): Uint8Array<ArrayBuffer> {
  const graph = [
    ...nodes.flatMap(({ op, inputs, outputs }, i) => {
      const io = [...inputs.flatMap((name) => text(1, name)), ...outputs.flatMap((name) => text(2, name))];
      return bytes(1, [...io, ...text(3, `node${i}`), ...text(4, op)]);
    }),
    ...text(2, "test"),
    ...inputs.flatMap((v) => value(11, v)),
    ...outputs.flatMap((v) => value(12, v)),
  ];
  return Uint8Array.from([...int(1, 8), ...bytes(7, graph), ...bytes(8, int(2, 17))]);
}

/** A model that gives back each of its inputs under its name with a prime. */
export function identity(...inputs: Value[]): Uint8Array<ArrayBuffer> {
  const outputs = inputs.map((v) => ({ ...v, name: `${v.name}'` }));
  const nodes = inputs.map(({ name }) => ({ op: "Identity", inputs: [name], outputs: [`${name}'`] }));
  return model(inputs, nodes, outputs);
}
