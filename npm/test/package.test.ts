/**
 * The package as it is built, in Node.js: real WebAssembly in real workers. Skipped where `cargo xtask build` has not run.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { describe, expect, test, vi } from "vitest";
import type * as Weblane from "../src/index.js";

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

  test("weblane/ort answers too", async () => {
    const ort: typeof import("../src/ort.js") = await import(/* @vite-ignore */ `${dist}ort.js`);
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create(readFileSync(digits), { executionProviders: ["wasm"] });
    const { probabilities } = await session.run({ input: new ort.Tensor("float32", one(), [1, 1, 28, 28]) });
    expect(probabilities?.dims).toEqual([1, 10]);
    await session.release();
  });

  test("the README's example runs as it is printed", async () => {
    const readme = readFileSync(join(root, "README.md"), "utf8");
    const example = /```js\n([^`]*Session\.load\("\/models\/digits\.onnx"[^`]*)```/.exec(readme)?.[1] ?? "";
    expect(example).not.toBe("");
    const script = example
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
