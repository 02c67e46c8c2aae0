/**
 * What a user gets: packs npm/, installs the tarball into a scratch project, checks that it is complete, that its
 * types serve a strict TypeScript project, and that it runs in Chromium with and without isolation.
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const ROOT = resolve(HERE, "../..");
const SCRATCH = resolve(ROOT, "target/package-check");
const FILES = [
  "dist/index.js",
  "dist/index.d.ts",
  "dist/ort.js",
  "dist/ort.d.ts",
  "dist/quantize.js",
  "dist/quantize.d.ts",
  "dist/worker.js",
  "dist/weblane_simd_st.wasm",
  "dist/weblane_simd_mt.wasm",
  "dist/weblane_relaxed_st.wasm",
  "dist/weblane_relaxed_mt.wasm",
  "package.json",
  "LICENSE-MIT",
  "LICENSE-APACHE",
];
const CONSUMER = `import { Session, Tensor, WeblaneError } from "weblane";
import { InferenceSession } from "weblane/ort";

export async function classify(image: Float32Array, signal: AbortSignal): Promise<number[]> {
  const session = await Session.load("/model.onnx", { signal, onProgress: ({ loaded, total }) => console.log(loaded, total) });
  try {
    const outputs = await session.run({ input: new Tensor("float32", image, [1, 3, 224, 224]) }, { timeout: 2000 });
    return Object.values(outputs).map((tensor) => tensor.size);
  } catch (error) {
    if (error instanceof WeblaneError) console.error(error.code);
    throw error;
  } finally {
    await session.dispose();
  }
}

export const names = async (): Promise<readonly string[]> => (await InferenceSession.create("/model.onnx")).inputNames;
`;

function run(command, args, cwd, options = {}) {
  const result = spawnSync(command, args, {
    cwd,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"],
    ...options,
  });
  if (result.status !== 0) {
    throw new Error(`${command} ${args.join(" ")}: exit code ${result.status}\n${result.stdout ?? ""}`);
  }
  return result.stdout;
}

const project = resolve(SCRATCH, "project");
rmSync(SCRATCH, { recursive: true, force: true });
mkdirSync(project, { recursive: true });
run(
  "npm",
  ["pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", SCRATCH],
  resolve(ROOT, "npm"),
);
const tarball = readdirSync(SCRATCH).find((name) => name.endsWith(".tgz"));
writeFileSync(
  resolve(project, "package.json"),
  JSON.stringify({ name: "scratch", private: true, type: "module", version: "1.0.0" }),
);
run("npm", ["install", "--no-audit", "--no-fund", "--loglevel=error", resolve(SCRATCH, tarball)], project);

const installed = resolve(project, "node_modules/weblane");
const missing = FILES.filter((name) => !existsSync(resolve(installed, name)));
if (missing.length) throw new Error(`${tarball} lacks ${missing.join(", ")}`);
const { dependencies = {} } = JSON.parse(readFileSync(resolve(installed, "package.json"), "utf8"));
if (Object.keys(dependencies).length) throw new Error("the package must not pull in other packages");

writeFileSync(resolve(project, "consumer.ts"), CONSUMER);
const compiler = resolve(ROOT, "npm/node_modules/.bin/tsc");
const strict = ["--noEmit", "--strict", "--target", "es2022", "--lib", "es2022,dom", "--module", "esnext"];
run(compiler, [...strict, "--types", "", "--moduleResolution", "bundler", "consumer.ts"], project);
console.log(`   ${tarball}: complete, types check`);

for (const mode of ["isolated", "plain"]) {
  const cases = ["--cases", "probe,goldens", "--match", "probe|digits|mnist"];
  const args = ["run.mjs", "--browser", "chromium", "--mode", mode, "--package", installed, ...cases];
  run(process.execPath, args, HERE, { stdio: "inherit" });
}
