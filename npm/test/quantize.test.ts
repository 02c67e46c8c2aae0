/**
 * The quantiser's page side, with a fake in the place of the worker; and the real one where the package is built.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { describe, expect, test } from "vitest";
import type * as Weblane from "../src/index.js";
import type * as Quantizing from "../src/quantize.js";
import { quantizeWith } from "../src/quantize.js";
import { FakeEngine, REPORT } from "./fake.js";

const bytes = () => new Uint8Array([1, 2, 3]);

test("a model goes in and another comes out", async () => {
  const engine = new FakeEngine();
  engine.script.steps = 3;
  const progress: string[] = [];
  const { model, report } = await quantizeWith(
    bytes(),
    {
      mode: "static",
      method: "entropy",
      skipOps: ["Softmax"],
      calibration: [{ x: new Float32Array(6), n: new BigInt64Array(2) }],
      onProgress: (p) => {
        if ("stage" in p) progress.push(`${p.stage} ${p.done}/${p.total}`);
      },
    },
    engine.spawn,
  );
  expect([...model]).toEqual([3, 2, 1]);
  expect(report).toEqual({ ...REPORT, samples: 1 });
  expect(progress).toEqual(["quantize 0/3", "quantize 1/3", "quantize 2/3"]);
  expect(engine.log).toContain('quantizer {"skipOps":["Softmax"],"method":"entropy","mode":"static"}');
  expect(engine.log).toContain("sample x float32 [2, 3] 24");
  expect(engine.log).toContain("sample n int64 [2] 16");
  expect(engine.terminated).toBe(1);
});

test("wrong options and samples are errors, and the worker ends", async () => {
  const engine = new FakeEngine();
  await expect(quantizeWith(bytes(), { blockSize: 7 }, engine.spawn)).rejects.toMatchObject({
    code: "invalid_option",
  });
  const samples = { calibration: [{ z: [1] }] };
  await expect(quantizeWith(bytes(), samples, engine.spawn)).rejects.toMatchObject({ code: "unknown_input" });
  engine.script.fail = { code: "invalid_model", message: "NaN", node: "a", op: "MatMul" };
  await expect(quantizeWith(bytes(), {}, engine.spawn)).rejects.toMatchObject({ node: "a", op: "MatMul" });
  expect(engine.terminated).toBe(3);
});

test("it can be stopped", async () => {
  const engine = new FakeEngine();
  engine.script.steps = 1e9;
  const controller = new AbortController();
  const stopped = quantizeWith(
    bytes(),
    {
      signal: controller.signal,
      onProgress: (p) => {
        if ("stage" in p && p.done > 2) controller.abort();
      },
    },
    engine.spawn,
  );
  await expect(stopped).rejects.toMatchObject({ code: "aborted" });
  expect(engine.terminated).toBe(1);
});

const root = join(import.meta.dirname, "..");
const variant = "simd_st";
const built = ["quantize.js", "worker.js", `weblane_${variant}.wasm`].every((f) =>
  existsSync(join(root, "dist", f)),
);
if (!built) console.log("skipped: the built quantiser, since npm/dist is not complete (cargo xtask build)");

describe.skipIf(!built)("the built package", () => {
  const module = <T>(name: string): Promise<T> =>
    import(/* @vite-ignore */ pathToFileURL(join(root, "dist", `${name}.js`)).href);

  test("a classifier keeps its class in every mode", async () => {
    const { Session } = await module<typeof Weblane>("index");
    const { quantize } = await module<typeof Quantizing>("quantize");
    const source = readFileSync(join(root, "..", "models", "digits.onnx"));
    const one = new Float32Array(28 * 28);
    for (let y = 4; y < 24; y++) one.fill(1, y * 28 + 12, y * 28 + 15);
    const calibration = [{ input: one }, { input: one.map((v, i) => (i % 28 < 14 ? v : 0)) }];
    for (const mode of ["dynamic", "static", "int8-weights", "float16"] as const) {
      const { model, report } = await quantize(source, { mode, calibration, variant });
      expect(report.outputs[0]?.cosine, mode).toBeGreaterThan(0.98);
      expect(report.bytesAfter).toBe(model.byteLength);
      const session = await Session.load(model, { variant });
      const { probabilities } = await session.run({ input: one });
      const values = [...((probabilities?.data ?? []) as Float32Array)];
      expect(values.indexOf(Math.max(...values)), mode).toBe(1);
      await session.dispose();
    }
    await expect(quantize(source, { mode: "static", variant })).rejects.toMatchObject({
      code: "missing_input",
    });
  });
});
