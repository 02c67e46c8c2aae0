import { expect, test } from "vitest";
import { ERROR_CODES, fromShape, toWeblaneError, WeblaneError } from "../src/errors.js";
import { encodeFeeds, inferDims } from "../src/feeds.js";
import { decodeFloat16, encodeFloat16, float16Array } from "../src/half.js";
import type { ValueInfo } from "../src/protocol.js";
import { bytesPerElement, TENSOR_TYPES, Tensor, type TensorType, toData, viewAs } from "../src/tensor.js";
import { MIN_TRANSFER_BYTES, SpareBuffers } from "../src/transfer.js";

/** The code of what `f` throws. */
function codeOf(f: () => unknown): string {
  try {
    f();
  } catch (error) {
    expect(error).toBeInstanceOf(WeblaneError);
    return (error as WeblaneError).code;
  }
  return "nothing was thrown";
}

test("a tensor's type follows from the array's class", () => {
  const arrays = [
    [new Float32Array(2), "float32"],
    [new Float64Array(2), "float64"],
    [new Int8Array(2), "int8"],
    [new Uint8Array(2), "uint8"],
    [new Uint8ClampedArray(2), "uint8"],
    [new Int16Array(2), "int16"],
    [new Uint16Array(2), "uint16"],
    [new Int32Array(2), "int32"],
    [new Uint32Array(2), "uint32"],
    [new BigInt64Array(2), "int64"],
    [new BigUint64Array(2), "uint64"],
    [["a", "b"], "string"],
    [[true, false], "bool"],
  ] as const;
  for (const [data, type] of arrays) {
    const tensor = new Tensor(data as Float32Array);
    expect([tensor.type, tensor.dims, tensor.size]).toEqual([type, [2], 2]);
  }
  expect(codeOf(() => new Tensor([1, 2] as never))).toBe("type_mismatch");
});

test("typed data is used as it is", () => {
  const data = new Float32Array(6);
  const tensor = new Tensor("float32", data, [2, 3]);
  expect(tensor.data).toBe(data);
  expect(new Tensor("float32", [4], []).dims).toEqual([]);
  expect(new Tensor("float32", [], [0, 3]).size).toBe(0);
});

test("ordinary values are converted or refused", () => {
  expect(new Tensor("int64", [1, -2n as never, 3]).data).toEqual(BigInt64Array.of(1n, -2n, 3n));
  expect(new Tensor("bool", [true, false, 1 as never]).data).toEqual(Uint8Array.of(1, 0, 1));
  expect(new Tensor("float32", [0.1]).data).toEqual(Float32Array.of(0.1));
  const bad: [TensorType, unknown][] = [
    ["int8", [128]],
    ["uint8", [-1]],
    ["int32", [1.5]],
    ["int64", [1.5]],
    ["int64", [2n ** 63n]],
    ["uint64", [-1]],
    ["bool", [2]],
    ["float32", ["1"]],
    ["float32", [1n]],
    ["float32", new Float64Array(1)],
    ["int64", new Int32Array(1)],
    ["string", [1]],
    ["string", "text"],
    ["bfloat16", [1]],
    ["float32", null],
  ];
  for (const [type, values] of bad)
    expect(codeOf(() => new Tensor(type, values as never))).toBe("type_mismatch");
  expect(codeOf(() => new Tensor("float8" as never, [1]))).toBe("unsupported_dtype");
});

test("dims must fit the data", () => {
  expect(codeOf(() => new Tensor("float32", [1, 2, 3], [2]))).toBe("shape_mismatch");
  for (const dims of [[-1], [1.5], ["a"], "a", [Number.NaN]]) {
    expect(codeOf(() => new Tensor("float32", [1], dims as never))).toBe("invalid_input");
  }
  expect(codeOf(() => new Tensor("float32", [1], [2 ** 40, 2 ** 40]))).toBe("limit_exceeded");
});

test("every numeric type views bytes", () => {
  for (const type of TENSOR_TYPES) {
    if (type === "string") continue;
    const view = viewAs(type, new ArrayBuffer(16));
    expect(view.length * bytesPerElement(type)).toBe(16);
    expect(toData(type, view)).toBe(view);
  }
});

test("half precision round-trips and rounds to even", () => {
  const bits = Uint16Array.from({ length: 65536 }, (_, i) => i);
  const back = encodeFloat16(decodeFloat16(bits));
  for (let i = 0; i < 65536; i++) {
    const isNaNBits = (i & 0x7c00) === 0x7c00 && (i & 0x3ff) !== 0;
    if (isNaNBits) expect((back[i] as number) & 0x7e00).toBe(0x7e00);
    else if (back[i] !== i) expect.fail(`${i} became ${back[i]}`);
  }
  // Ties, the carry into the next power of two, the largest number, overflow, the smallest numbers.
  const cases: [number, number][] = [
    [1 + 2 ** -11, 0x3c00],
    [1 + 3 * 2 ** -11, 0x3c02],
    [2 - 2 ** -11, 0x4000],
    [65504, 0x7bff],
    [65519, 0x7bff],
    [65520, 0x7c00],
    [-1e9, 0xfc00],
    [2 ** -24, 1],
    [2 ** -25, 0],
    [2 ** -25 * 1.01, 1],
    [2 ** -14 - 2 ** -25, 0x400],
    [-0, 0x8000],
  ];
  expect([...encodeFloat16(cases.map(([x]) => x))]).toEqual(cases.map(([, h]) => h));
});

test("float16 tensors hold numbers where the engine can, bits elsewhere", () => {
  const tensor = new Tensor("float16", [1, -2]);
  if (float16Array()) expect([...tensor.data]).toEqual([1, -2]);
  else expect(tensor.data).toEqual(Uint16Array.of(0x3c00, 0xc000));
});

const image: ValueInfo = { name: "image", type: "float32", dims: [1, 3, "h", "w"] };
const ids: ValueInfo = { name: "ids", type: "int64", dims: ["batch", 4] };
const mask: ValueInfo = { name: "mask", type: "bool", dims: [2] };

test("one open dimension is inferred, two are not", () => {
  expect(inferDims(ids, 8)).toEqual([2, 4]);
  expect(inferDims(ids, 0)).toEqual([0, 4]);
  expect(inferDims(mask, 2)).toEqual([2]);
  expect(inferDims({ ...mask, dims: [] }, 1)).toEqual([]);
  expect(codeOf(() => inferDims(ids, 6))).toBe("shape_mismatch");
  expect(codeOf(() => inferDims(mask, 3))).toBe("shape_mismatch");
  expect(codeOf(() => inferDims(image, 12))).toBe("shape_mismatch");
  expect(codeOf(() => inferDims({ ...ids, dims: ["*"] }, 12))).toBe("shape_mismatch");
  expect(codeOf(() => inferDims({ ...ids, dims: ["a", 0] }, 3))).toBe("shape_mismatch");
});

test("feeds become bytes with the model's types", () => {
  const { inputs, transfer } = encodeFeeds([ids, mask], { ids: [1, 2, 3, 4], mask: [true, false] }, false);
  expect(inputs.map(({ name, type, dims }) => [name, type, dims])).toEqual([
    ["ids", "int64", [1, 4]],
    ["mask", "bool", [2]],
  ]);
  expect(inputs[0]?.data).toHaveProperty("byteLength", 32);
  expect(inputs[1]?.data).toEqual(Uint8Array.of(1, 0));
  expect(transfer.length).toBe(0);
  // One buffer for two inputs must not be listed twice.
  const same = Float32Array.of(1);
  const scalars: ValueInfo[] = ["a", "b"].map((name) => ({ name, type: "float32", dims: [] }));
  expect(encodeFeeds(scalars, { a: same, b: same }, true).transfer.length).toBe(1);
});

test("large buffers move, as copies unless they are given away; small ones are cloned with the message", () => {
  const info: ValueInfo = { name: "x", type: "float32", dims: ["n"] };
  const buffers = (x: Float32Array, move: boolean) => {
    const { inputs, transfer } = encodeFeeds([info], { x }, move);
    const [sent] = inputs.map(({ data }) => (data as Uint8Array).buffer);
    return [sent === x.buffer, transfer.includes(sent as ArrayBuffer)];
  };
  const [small, large] = [new Float32Array(10), new Float32Array(MIN_TRANSFER_BYTES / 4)];
  expect(buffers(small, false)).toEqual([true, false]);
  expect(buffers(small, true)).toEqual([true, true]);
  expect(buffers(large, false)).toEqual([false, true]);
  expect(buffers(large, true)).toEqual([true, true]);
  expect(buffers(large.subarray(1, 3), true)).toEqual([false, false]);
});

test("copies go into the buffers that the last run gave back", () => {
  const info: ValueInfo = { name: "x", type: "float32", dims: ["n"] };
  const spare = new SpareBuffers();
  const x = Float32Array.from({ length: MIN_TRANSFER_BYTES / 4 }, (_, i) => i);
  const first = encodeFeeds([info], { x }, false, spare);
  expect(first.lent).toEqual(first.transfer);
  spare.put(first.lent);
  x.fill(7);
  const second = encodeFeeds([info], { x }, false, spare);
  expect(second.lent[0]).toBe(first.lent[0]);
  expect(new Float32Array(second.lent[0] as ArrayBuffer)).toEqual(x);
  // In use: a new one.
  expect(encodeFeeds([info], { x }, false, spare).lent[0]).not.toBe(first.lent[0]);
  // Grown: one with room for more, which serves then.
  spare.put(second.lent);
  const grown = encodeFeeds([info], { x: new Float32Array(x.length + 10) }, false, spare);
  expect(grown.inputs.map(({ data }) => (data as Uint8Array).byteLength)).toEqual([4 * x.length + 40]);
  spare.put(grown.lent);
  const further = encodeFeeds([info], { x: new Float32Array(x.length + 20).fill(3) }, false, spare);
  expect(further.lent[0]).toBe(grown.lent[0]);
  expect(
    new Float32Array((further.lent[0] as ArrayBuffer).slice(0, 4 * x.length + 80)).every((v) => v === 3),
  ).toBe(true);
  // Of another size altogether: just as large as that is.
  for (const length of [x.length / 2 - 1, 2 * x.length]) {
    spare.put(second.lent);
    const other = encodeFeeds([info], { x: new Float32Array(2 * length) }, false, spare);
    expect(other.lent[0]?.byteLength ?? 8 * length).toBe(8 * length);
  }
  // What the caller gives away does not come back.
  expect(encodeFeeds([info], { x }, true, spare).lent).toEqual([]);
});

test("only the bytes of a view are sent", () => {
  const large = new Float32Array(1000);
  const { inputs } = encodeFeeds([{ ...mask, type: "float32" }], { mask: large.subarray(5, 7) }, false);
  expect(inputs[0]?.data).toHaveProperty("buffer.byteLength", 8);
});

test("wrong feeds are named", () => {
  const one = [mask];
  expect(codeOf(() => encodeFeeds(one, {}, false))).toBe("missing_input");
  expect(codeOf(() => encodeFeeds(one, { mask: [true, true], extra: [1] }, false))).toBe("unknown_input");
  expect(codeOf(() => encodeFeeds(one, { mask: new Float32Array(2) }, false))).toBe("type_mismatch");
  expect(codeOf(() => encodeFeeds(one, { mask: new Tensor("uint8", [1, 1]) }, false))).toBe("type_mismatch");
  expect(codeOf(() => encodeFeeds([ids], { ids: { data: new Int32Array(4), dims: [1, 4] } }, false))).toBe(
    "type_mismatch",
  );
  expect(codeOf(() => encodeFeeds(one, { mask: { data: [true], dims: [2] } }, false))).toBe("shape_mismatch");
  expect(codeOf(() => encodeFeeds(one, { mask: { data: [true, true] } as never }, false))).toBe(
    "invalid_input",
  );
  expect(codeOf(() => encodeFeeds(one, [1] as never, false))).toBe("invalid_input");
  expect(codeOf(() => encodeFeeds(one, new Float32Array(2) as never, false))).toBe("invalid_input");
  expect(() => encodeFeeds([ids, mask], {}, false)).toThrow(
    'not given: "ids" (int64[batch, 4]), "mask" (bool[2])',
  );
});

test("errors keep their code, place and cause", () => {
  const shape = { code: "shape_mismatch", message: "no", node: "n", op: "Conv" } as const;
  const error = fromShape(shape);
  expect(error.toJSON()).toEqual(shape);
  expect(error.name).toBe("WeblaneError");
  expect(fromShape({ code: "odd" as never, message: "x" }).code).toBe("internal");
  expect(toWeblaneError(shape)).toMatchObject(shape);
  expect(toWeblaneError(error)).toBe(error);
  const wrapped = toWeblaneError(new TypeError("bad"), "network", "while reading: ");
  expect(wrapped).toMatchObject({ code: "network", message: "while reading: bad" });
  expect(wrapped.cause).toBeInstanceOf(TypeError);
  for (const meaning of Object.values(ERROR_CODES)) expect(meaning).toMatch(/\.$/);
});
