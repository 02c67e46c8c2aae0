import type * as common from "onnxruntime-common";
import { afterEach, expect, expectTypeOf, test, vi } from "vitest";
import * as ort from "../src/ort.js";
import { FakeEngine } from "./fake.js";

const bytes = () => Uint8Array.of(0, 1, 2, 3);
const feeds = () => ({
  x: new ort.Tensor("float32", [1, 2, 3, 4, 5, 6], [2, 3]),
  n: new ort.Tensor("int64", [7, 8]),
});

function create(engine: FakeEngine, ...rest: unknown[]): Promise<ort.InferenceSession> {
  return ort.InferenceSession.createWith(engine.spawn, bytes().buffer, ...rest);
}

const error = (promise: Promise<unknown>) =>
  promise.then(
    () => expect.fail("no error"),
    (e: unknown) => e,
  );

afterEach(() => {
  ort.env.wasm.numThreads = undefined;
  ort.env.wasm.wasmPaths = undefined;
  vi.restoreAllMocks();
});

test("a session as code for onnxruntime-web uses it", async () => {
  const engine = new FakeEngine();
  const session = await create(engine, { executionProviders: ["webgpu", "wasm"], logSeverityLevel: 3 });
  expect(session.inputNames).toEqual(["x", "n"]);
  expect(session.outputNames).toEqual(["y", "m"]);
  expect(session.inputMetadata[1]).toEqual({ name: "n", isTensor: true, type: "int64", shape: ["batch"] });
  expect(session.outputMetadata.length).toBe(2);

  const { y, m } = await session.run(feeds());
  expect(y).toBeInstanceOf(ort.Tensor);
  expect([y?.type, y?.dims, y?.size, y?.location]).toEqual(["float32", [2, 3], 6, "cpu"]);
  expect(await y?.getData()).toEqual(Float32Array.of(1, 2, 3, 4, 5, 6));
  expect(m?.data).toEqual(BigInt64Array.of(7n, 8n));

  await session.release();
  expect(engine.terminated).toBe(1);
});

test("fetches are names, or tensors to fill", async () => {
  const session = await create(new FakeEngine());
  expect(Object.keys(await session.run(feeds(), ["m"]))).toEqual(["m"]);
  expect(Object.keys(await session.run(feeds(), { m: null }, { tag: "t" }))).toEqual(["m"]);
  const target = new ort.Tensor("float32", new Float32Array(6), [2, 3]);
  const { y } = await session.run(feeds(), { y: target });
  expect(y).toBe(target);
  expect(target.data[5]).toBe(6);
  const wrong = new ort.Tensor("float32", new Float32Array(6), [6]);
  expect(await error(session.run(feeds(), { y: wrong }))).toMatchObject({ code: "shape_mismatch" });
  expect(Object.keys(await session.run(feeds(), { tag: "an option" }))).toEqual(["y", "m"]);
  expect(await error(session.run(feeds(), ["z"]))).toMatchObject({ code: "unknown_input" });
  expect(await error(session.run(feeds(), []))).toMatchObject({ code: "invalid_option" });
  expect(await error(session.run(feeds(), null as never))).toMatchObject({ code: "invalid_option" });
  expect(await error(session.run(feeds(), { terminate: true }))).toMatchObject({ code: "aborted" });
  expect(await error(session.run({ x: feeds().x }))).toMatchObject({ code: "missing_input" });
});

test("outputs in the memory of the engine", async () => {
  for (const preferredOutputLocation of ["cpu-pinned", { y: "cpu-pinned" }]) {
    const engine = new FakeEngine();
    const session = await create(engine, { preferredOutputLocation });
    const { y, m } = (await session.run(feeds())) as Record<"y" | "m", ort.Tensor>;
    expect([y.location, m.location]).toEqual([
      "cpu-pinned",
      typeof preferredOutputLocation === "string" ? "cpu-pinned" : "cpu",
    ]);
    expect(() => y.data).toThrow("getData()");
    expect(await y.getData()).toEqual(Float32Array.of(1, 2, 3, 4, 5, 6));
    const target = new ort.Tensor("float32", new Float32Array(6), [2, 3]);
    const again = await session.run({ ...feeds(), x: y }, { y: target });
    expect([again.y === target, target.data[5]]).toEqual([true, 6]);
    expect(await y.getData(true)).toEqual(Float32Array.of(1, 2, 3, 4, 5, 6));
    expect(y.location).toBe("none");
    expect(engine.log).toContain("release 1");
    expect(await error(session.run({ ...feeds(), x: y }))).toMatchObject({ code: "disposed" });
  }
});

test("parts of buffers, as onnxruntime-web takes them", async () => {
  const cases: [unknown[], number[]][] = [
    [[], [0, 1, 2, 3]],
    [[1], [1, 2, 3]],
    [
      [1, 2],
      [1, 2],
    ],
    [
      [1, 2, { logId: "x" }],
      [1, 2],
    ],
    [
      [2, { logId: "x" }],
      [2, 3],
    ],
  ];
  for (const [rest, want] of cases) {
    const engine = new FakeEngine();
    await create(engine, ...rest);
    expect(engine.received.get("")).toEqual(Buffer.from(want));
  }
  expect(await error(create(new FakeEngine(), 1, 9))).toMatchObject({ code: "invalid_option" });
  expect(await error(create(new FakeEngine(), "x"))).toMatchObject({ code: "invalid_option" });
});

test("options that cannot be honoured are refused", async () => {
  const bad = [
    { executionProviders: ["webgpu"] },
    { executionProviders: [{ name: "webnn" }] },
    { graphOptimizationLevel: "most" },
    { preferredOutputLocation: "gpu-buffer" },
    { preferredOutputLocation: { y: "ml-tensor" } },
  ];
  for (const options of bad)
    expect(await error(create(new FakeEngine(), options))).toMatchObject({ code: "invalid_option" });
  for (const options of [
    { executionProviders: [] },
    { executionProviders: [{ name: "cpu" }] },
    { graphOptimizationLevel: "disabled" },
    { preferredOutputLocation: { y: "cpu" } },
  ]) {
    await create(new FakeEngine(), options);
  }
});

test("external data in onnxruntime-web's form", async () => {
  const engine = new FakeEngine();
  engine.script.externals = ["a.bin", "b.bin"];
  engine.script.files["http://h/b.bin"] = Uint8Array.of(5);
  await create(engine, { externalData: [{ path: "./a.bin", data: Uint8Array.of(4) }, "http://h/b.bin"] });
  expect([engine.received.get("a.bin"), engine.received.get("b.bin")]).toEqual([
    Buffer.from([4]),
    Buffer.from([5]),
  ]);
});

test("env is read when a session is created", async () => {
  const warn = vi.spyOn(console, "warn").mockImplementation(() => {});
  const engine = new FakeEngine();
  ort.env.wasm.wasmPaths = "http://cdn/weblane/";
  ort.env.wasm.numThreads = 1;
  await create(engine);
  expect(engine.log[0]).toBe("instantiate relaxed_st http://cdn/weblane/weblane_relaxed_st.wasm");
  expect(warn).not.toHaveBeenCalled();

  // What code for onnxruntime-web commonly sets.
  for (const paths of [
    "https://cdn/npm/onnxruntime-web@1.22/dist/",
    { wasm: "/ort-wasm.wasm", mjs: "/ort.mjs" },
  ]) {
    const engine = new FakeEngine();
    ort.env.wasm.wasmPaths = paths;
    await create(engine);
    expect(engine.log[0]).toBe("instantiate relaxed_st");
  }
  expect(warn).toHaveBeenCalledTimes(2);
  ort.env.wasm.numThreads = -2;
  expect(await error(create(new FakeEngine()))).toMatchObject({ code: "invalid_option" });
});

test("a disposed tensor has no data", async () => {
  const tensor = new ort.Tensor("bool", [true, false]);
  expect(await tensor.getData(true)).toEqual(Uint8Array.of(1, 0));
  expect(tensor.location).toBe("none");
  expect(() => tensor.data).toThrow("disposed");
  const reshaped = new ort.Tensor(Float32Array.of(1, 2, 3, 4)).reshape([2, 2]);
  expect(reshaped.dims).toEqual([2, 2]);
  expect(ort.default.Tensor).toBe(ort.Tensor);
});

test("the types are those of onnxruntime-common", () => {
  type Theirs = common.InferenceSession;
  expectTypeOf<ort.InferenceSession["inputNames"]>().toExtend<Theirs["inputNames"]>();
  expectTypeOf<ort.InferenceSession["inputMetadata"]>().toExtend<
    readonly { name: string; isTensor: true; shape: readonly (number | string)[] }[]
  >();
  expectTypeOf<ort.InferenceSession["release"]>().toEqualTypeOf<Theirs["release"]>();
  // Everything that may be given to theirs may be given to ours.
  expectTypeOf<
    Omit<common.InferenceSession.SessionOptions, "executionProviders" | "externalData">
  >().toExtend<ort.InferenceSession.SessionOptions>();
  expectTypeOf<common.InferenceSession.SessionOptions["executionProviders"]>().toExtend<
    ort.InferenceSession.SessionOptions["executionProviders"]
  >();
  expectTypeOf<common.InferenceSession.SessionOptions["externalData"]>().toExtend<
    ort.InferenceSession.SessionOptions["externalData"]
  >();
  expectTypeOf<common.InferenceSession.RunOptions>().toExtend<ort.InferenceSession.RunOptions>();
  expectTypeOf<common.Env.WebAssemblyFlags["numThreads"]>().toExtend<ort.WebAssemblyFlags["numThreads"]>();
  // What ours gives can be read as theirs.
  type Shared = "type" | "dims" | "size";
  expectTypeOf<Pick<ort.Tensor<"float32">, Shared | "data">>().toExtend<
    Pick<common.TypedTensor<"float32">, Shared | "data">
  >();
  expectTypeOf<Pick<ort.Tensor<"int64">, Shared | "data">>().toExtend<
    Pick<common.TypedTensor<"int64">, Shared | "data">
  >();
  // The 4-bit types are theirs alone, bfloat16 is ours alone.
  expectTypeOf<Exclude<common.Tensor.Type, "int4" | "uint4">>().toExtend<ort.Tensor.Type>();
});
