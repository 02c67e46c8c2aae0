/**
 * The package as it is built, in Node.js: real WebAssembly in real workers. Skipped where `cargo xtask build` has not run.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { describe, expect, test, vi } from "vitest";
import type * as Weblane from "../src/index.js";
import { network } from "../src/warm.js";
import { identity, model } from "./onnx.js";

const root = join(import.meta.dirname, "..");
const dist = pathToFileURL(join(root, "dist/")).href;
const digits = join(root, "..", "models", "digits.onnx");
const builds = (["simd_st", "simd_mt"] as const).filter((v) =>
  existsSync(join(root, "dist", `weblane_${v}.wasm`)),
);
const built = builds.length > 0 && existsSync(join(root, "dist", "worker.js"));
if (!built) console.log("skipped: the built package, since npm/dist is not complete (cargo xtask build)");

const load = (): Promise<typeof Weblane> => import(/* @vite-ignore */ `${dist}index.js`);
/** A vertical bar, which is a one. */
const one = () => {
  const image = new Float32Array(28 * 28);
  for (let y = 4; y < 24; y++) image.fill(1, y * 28 + 12, y * 28 + 15);
  return image;
};

describe.skipIf(!built)("the built package", () => {
  test.each(builds)("%s answers, survives errors and ends", async (variant) => {
    const { Session } = await load();
    const session = await Session.load(digits, { variant, threads: 2 });
    const info = await session.info();
    expect(info).toMatchObject({ variant, threads: variant.endsWith("_mt") ? 2 : 1, opset: 13 });
    expect(info.operators).toMatchObject({ Conv: 3 });
    expect(info.memory).toBeGreaterThan(1e5);

    const { probabilities } = await session.run({ input: one() });
    const values = [...((probabilities?.data ?? []) as Float32Array)];
    expect(probabilities?.dims).toEqual([1, 10]);
    expect(values.indexOf(Math.max(...values))).toBe(1);
    expect(values.reduce((a, b) => a + b)).toBeCloseTo(1, 5);

    const wrong = { data: new Float32Array(4), dims: [1, 1, 2, 2] };
    await expect(session.run({ input: wrong })).rejects.toMatchObject({ code: "shape_mismatch" });
    await expect(session.run({ input: one() }, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: "aborted",
    });
    const again = await session.run({ input: one() });
    expect(again.probabilities?.data).toEqual(probabilities?.data);

    const { nodes } = await session.profile({ input: one() });
    expect(nodes.length).toBeGreaterThan(3);
    await session.dispose();
    await expect(session.run({ input: one() })).rejects.toMatchObject({ code: "disposed" });
  });

  test.each(builds)("%s: the network of the warm-up is a model like any other", async (variant) => {
    const { Session } = await load();
    const session = await Session.load(network(), { variant, threads: 2 });
    const { outputs, nodes } = await session.profile({ x: new Float32Array(3 * 28 * 28).fill(1) });
    expect(outputs.y?.dims).toEqual([1, 64]);
    expect([...((outputs.y?.data ?? []) as Float32Array)].every((v) => v === 0)).toBe(true);
    // Its layers have kernels of their own, with what follows them in their epilogues.
    expect(nodes.map(({ op }) => op).filter((op) => op !== "Transpose" && op !== "Flatten")).toEqual([
      ...Array(6).fill("Conv"),
      "GlobalAveragePool",
      "Gemm",
    ]);
    await session.dispose();
  });

  test("every tensor type comes back as it went", async () => {
    const { Session, Tensor } = await load();
    const tensors = {
      float32: new Tensor("float32", [1.5, Number.NaN, -0]),
      float16: new Tensor("float16", [1.5, -65504, 2 ** -24]),
      float64: new Tensor("float64", [1e300]),
      int8: new Tensor("int8", [-128, 127]),
      uint8: new Tensor("uint8", [0, 255], [2, 1]),
      int16: new Tensor("int16", [-32768]),
      uint16: new Tensor("uint16", [65535]),
      int32: new Tensor("int32", [-(2 ** 31)]),
      uint32: new Tensor("uint32", [2 ** 32 - 1]),
      int64: new Tensor("int64", [-(2n ** 63n), 2n ** 63n - 1n]),
      uint64: new Tensor("uint64", [2n ** 64n - 1n]),
      bool: new Tensor("bool", [true, false], [1, 2, 1]),
      string: new Tensor("string", ["", "größer"]),
      empty: new Tensor("float32", [], [0, 4]),
      scalar: new Tensor("int64", [7], []),
    };
    const inputs = Object.entries(tensors).map(([name, { type, dims }]) => ({ name, type, dims: [...dims] }));
    const session = await Session.load(identity(...inputs), { variant: "simd_st" });
    expect(session.inputs).toEqual(inputs);
    for (let round = 0; round < 2; round++) {
      const results = await session.run(tensors);
      for (const [name, sent] of Object.entries(tensors)) {
        const { type, dims, data } = results[`${name}'`] as Weblane.Tensor;
        expect([name, type, dims, data]).toEqual([name, sent.type, sent.dims, sent.data]);
      }
    }
    await session.dispose();
  });

  test("symbolic dimensions bind to each other and may change from run to run", async () => {
    const { Session } = await load();
    const pair = ["a", "b"].map((name) => ({ name, type: "float32" as const, dims: ["n", 2] }));
    const session = await Session.load(identity(...pair), { variant: "simd_st" });
    for (const n of [1, 3, 1, 0, 5]) {
      const { "a'": a } = await session.run({ a: new Float32Array(2 * n), b: new Float32Array(2 * n) });
      expect(a?.dims).toEqual([n, 2]);
    }
    const unequal = session.run({ a: new Float32Array(2), b: new Float32Array(4) });
    await expect(unequal).rejects.toMatchObject({ code: "shape_mismatch" });
    await session.dispose();
  });

  test.each(builds)("%s: a run stops in the middle, and the session goes on", async (variant) => {
    const { Session } = await load();
    const a = { name: "a", type: "float32" as const, dims: ["n", "n"] };
    const nodes = Array.from({ length: 64 }, (_, i) => ({
      op: "MatMul",
      inputs: ["a", i ? `t${i - 1}` : "a"],
      outputs: [`t${i}`],
    }));
    const session = await Session.load(model([a], nodes, [{ ...a, name: "t63" }]), { variant, threads: 2 });
    const square = (n: number, value: number) => ({
      a: { data: new Float32Array(n * n).fill(value), dims: [n, n] },
    });
    await expect(session.run(square(1024, 1), { timeout: 20 })).rejects.toMatchObject({ code: "timeout" });
    const controller = new AbortController();
    const seen: number[] = [];
    const stopped = session.run(square(1024, 1), {
      signal: controller.signal,
      onProgress: ({ done, total }) => {
        seen.push(done, total);
        controller.abort();
      },
    });
    await expect(stopped).rejects.toMatchObject({ code: "aborted" });
    expect(seen[0]).toBeLessThan(64);
    expect(seen[1]).toBe(64);
    // A matrix of n ones per row, divided by n, is its own power.
    const { t63 } = await session.run(square(8, 1 / 8));
    expect(t63?.data).toEqual(new Float32Array(64).fill(1 / 8));
    await session.dispose();
  });

  test("all missing operators are named at once", async () => {
    const { Session } = await load();
    const x = { name: "x", type: "float32" as const, dims: [1] };
    const nodes = ["Foo", "Bar", "Foo"].map((op, i) => ({
      op,
      inputs: [i ? `t${i - 1}` : "x"],
      outputs: [`t${i}`],
    }));
    const loading = Session.load(model([x], nodes, [{ ...x, name: "t2" }]), { variant: "simd_st" });
    const error = (await loading.catch((e: unknown) => e)) as Weblane.WeblaneError;
    expect(error.code).toBe("unsupported_operator");
    expect(error.message).toMatch(/Bar \(1 node\), Foo \(2 nodes\)/);
  });

  test("wrong files are named", async () => {
    const { Session } = await load();
    const model = readFileSync(digits);
    const cases: [Uint8Array | string, string][] = [
      [new Uint8Array(0), "empty_model"],
      [Uint8Array.of(0xff, 0xd8, 0xff, 0xe0, 0, 16, 0x4a, 0x46, 0x49, 0x46), "not_onnx"],
      [model.subarray(0, 60_000), "truncated_model"],
      [join(root, "none.onnx"), "network"],
    ];
    for (const [source, code] of cases) {
      await expect(Session.load(source, { variant: "simd_st" })).rejects.toMatchObject({ code });
    }
  });

  test("a model cut anywhere is refused, and the runtime goes on", async () => {
    const { Runtime, Session } = await load();
    const runtime = await Runtime.create({ threads: 1 });
    const model = readFileSync(digits);
    for (let i = 0; i < 200; i++) {
      const cut = Math.floor((model.length * i) / 200);
      const error = await Session.load(model.subarray(0, cut), { runtime }).catch((e: unknown) => e);
      expect((error as Weblane.WeblaneError).code, `cut at ${cut}`).toMatch(
        /^(empty_model|truncated_model|invalid_model)$/,
      );
    }
    const session = await Session.load(model, { runtime });
    expect(session.inputs.length).toBe(1);
    await runtime.dispose();
  });

  test("sessions share a runtime", async () => {
    const { Runtime, Session } = await load();
    const runtime = await Runtime.create({ threads: 1 });
    const sessions = await Promise.all([
      Session.load(digits, { runtime }),
      Session.load(digits, { runtime }),
    ]);
    const results = await Promise.all(sessions.map((session) => session.run({ input: one() })));
    expect(results[0]?.probabilities?.data).toEqual(results[1]?.probabilities?.data);
    await runtime.dispose();
  });

  test.each(builds)("%s: outputs stay in the engine", async (variant) => {
    const { Runtime, Session, Tensor } = await load();
    const runtime = await Runtime.create({ variant, threads: 2 });
    const value = (name: string) => ({ name, type: "float32" as const, dims: ["n"] });
    const nodes = [
      { op: "Add", inputs: ["sum", "x"], outputs: ["next"] },
      { op: "Identity", inputs: ["next"], outputs: ["same"] },
      { op: "Identity", inputs: ["x"], outputs: ["again"] },
    ];
    const adds = model([value("sum"), value("x")], nodes, ["next", "same", "again"].map(value));
    const [session, other] = [await Session.load(adds, { runtime }), await Session.load(adds, { runtime })];
    const n = 50_000;
    const x = () => new Float32Array(n).fill(1);
    const elements = async (tensor: Weblane.Tensor | undefined) =>
      new Set((await tensor?.getData()) as Float32Array);

    // Each has bytes of its own, whatever the graph shares, and keeps them when others follow.
    const first = await session.run({ sum: x(), x: x() }, { keep: ["next", "same", "again"] });
    await session.run({ sum: x(), x: new Float32Array(n) }, { keep: ["next"] });
    expect(await elements(first.next)).toEqual(new Set([2]));
    expect(await elements(first.same)).toEqual(new Set([2]));
    expect(await elements(first.again)).toEqual(new Set([1]));

    // One that is an input outlasts the next one of the same shape.
    const passed = await session.run({ sum: x(), x: x().fill(5) }, { keep: ["again"] });
    await session.run({ sum: x(), x: x().fill(6) });
    expect(await elements(passed.again)).toEqual(new Set([5]));

    // As often as one likes, in the memory of a few.
    let sum: Weblane.Tensor = first.next ?? new Tensor(x());
    let memory = 0;
    for (let i = 0; i < 200; i++) {
      const { next } = await session.run({ sum, x: x() }, { outputs: [], keep: ["next"], transfer: true });
      sum = next ?? sum;
      if (i === 20) ({ memory } = await session.info());
    }
    expect((await session.info()).memory).toBe(memory);
    expect(await elements(sum)).toEqual(new Set([202]));

    // Sessions on one runtime give each other theirs, and a session that has ended leaves them behind.
    await session.dispose();
    const { next } = await other.run({ sum, x: x() });
    expect(await elements(next)).toEqual(new Set([203]));
    sum.dispose();
    await expect(other.run({ sum, x: x() })).rejects.toMatchObject({ code: "disposed" });
    await expect(
      other.run({ sum: first.same as Weblane.Tensor, x: new Float32Array(3) }),
    ).rejects.toMatchObject({
      code: "shape_mismatch",
    });
    expect(await elements(first.same), "a run that failed leaves what it was given").toEqual(new Set([2]));
    await runtime.dispose();
  });

  test("weblane/ort answers too", async () => {
    const ort: typeof import("../src/ort.js") = await import(/* @vite-ignore */ `${dist}ort.js`);
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create(readFileSync(digits), { executionProviders: ["wasm"] });
    const { probabilities } = await session.run({ input: new ort.Tensor("float32", one(), [1, 1, 28, 28]) });
    expect(probabilities?.dims).toEqual([1, 10]);
    await session.release();
  });

  test.each(["README.md", "../README.md"])("the example of %s runs as it is printed", async (file) => {
    const readme = readFileSync(join(root, file), "utf8");
    const example = /```js\n([^`]*Session\.load\("\/models\/digits\.onnx"[^`]*)```/.exec(readme)?.[1] ?? "";
    expect(example).not.toBe("");
    // The same text imported again would not run again.
    const script = `// ${file}\n${example}`
      .replace('"weblane"', JSON.stringify(`${dist}index.js`))
      .replace('"/models/digits.onnx"', JSON.stringify(digits));
    const log = vi.spyOn(console, "log").mockImplementation(() => {});
    await import(/* @vite-ignore */ `data:text/javascript,${encodeURIComponent(script)}`);
    const lines = log.mock.calls.map((line) => line.join(" "));
    log.mockRestore();
    expect(lines.at(-1)).toMatch(/^the picture shows a \d$/);
    expect(lines).toContain("optimize 1 1");
  });
});
