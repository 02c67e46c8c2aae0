/**
 * weblane beside other runtimes: pairs of runs in turns on one page, so that a noisy machine disturbs both alike.
 * Prints a table and writes a record to benches/records/. Called by `cargo xtask bench peers`.
 */
import { existsSync } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { cpus } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { median, quantile } from "simple-statistics";
import { launchPuppeteer } from "../../tests/wasm/lib/drivers.mjs";
import { serve } from "../../tests/wasm/lib/server.mjs";
import { WORKLOADS } from "./workloads.mjs";

const here = dirname(fileURLToPath(import.meta.url));
const root = resolve(here, "../..");
const { values: options } = parseArgs({
  options: {
    browser: { type: "string", default: "chromium" },
    threads: { type: "string", default: "1,2" },
    workloads: { type: "string" },
    seconds: { type: "string", default: "12" },
    pairs: { type: "string", default: "60" },
    record: { type: "string" },
  },
});

const mirror = process.env.WEBLANE_MODEL_MIRROR ?? resolve(root, "../shared/models");
/** Built models come first, then those of the mirror. */
const folders = { "/built/": join(root, "target/models"), "/mirror/": mirror };
const find = (name) =>
  Object.entries(folders).find(([, folder]) => existsSync(join(folder, name, "model.onnx")))?.[0];

const wanted = options.workloads?.split(",");
const workloads = WORKLOADS.filter((w) => !wanted || wanted.includes(w.name));
const peer = "onnxruntime-web";
const version = JSON.parse(await readFile(join(here, "node_modules", peer, "package.json"), "utf8")).version;
const server = await serve({
  "/": join(here, "page"),
  "/weblane/": join(root, "npm"),
  "/ort/": join(here, "node_modules", peer, "dist"),
  ...folders,
});
const browser = await launchPuppeteer(options.browser);
const results = [];
const round = (x) => Number(x.toPrecision(4));

console.log("workload              threads   weblane ms        peer ms           ratio (quartiles)    difference");
for (const threads of options.threads.split(",").map(Number)) {
  for (const workload of workloads) {
    const prefix = find(workload.name);
    if (!prefix) {
      console.log(`${workload.name.padEnd(20)}  skipped: the model is not built and not in the mirror`);
      continue;
    }
    const page = await browser.newPage();
    page.on("pageerror", (error) => console.error(`page: ${error.message}`));
    await page.goto(server.url);
    await page.waitForFunction("window.ready");
    const config = {
      url: `${prefix}${workload.name}/model.onnx`,
      workload: { ...workload, inputs: workload.inputs.map((i) => ({ ...i, kind: String(i.kind) })) },
      threads,
      seconds: Number(options.seconds),
      pairs: Number(options.pairs),
      ours: "weblane",
      peer,
    };
    let measured;
    try {
      // Big integers do not pass through JSON: they go as text and come back to life in the page.
      measured = await page.evaluate((c) => {
        for (const input of c.workload.inputs) if (input.kind !== "uniform") input.kind = BigInt(input.kind);
        return window.measure(c);
      }, config);
    } catch (error) {
      console.log(`${workload.name.padEnd(20)}  ${threads}         failed: ${error.message.split("\n")[0]}`);
      results.push({ workload: workload.name, threads, error: error.message.split("\n")[0] });
      await page.close();
      continue;
    }
    await page.close();
    const [ours, theirs] = [0, 1].map((k) => measured.times.map((pair) => pair[k]));
    const ratios = measured.times.map(([a, b]) => b / a);
    const spread = [0.25, 0.75].map((q) => round(quantile(ratios, q)));
    const row = {
      workload: workload.name,
      threads,
      pairs: ratios.length,
      weblane_ms: round(median(ours)),
      peer_ms: round(median(theirs)),
      ratio: round(median(ratios)),
      ratio_quartiles: spread,
      difference: round(measured.difference),
      about: measured.about,
    };
    results.push(row);
    console.log(
      `${row.workload.padEnd(20)}  ${threads}         ${String(row.weblane_ms).padEnd(16)}  ${String(row.peer_ms).padEnd(16)}  ` +
        `${String(row.ratio).padEnd(6)} (${spread[0]} .. ${spread[1]})   ${row.difference}`,
    );
  }
}

const record = {
  what: "median of peer time / weblane time over interleaved pairs on one page",
  command: "cargo xtask bench peers",
  browser: await browser.version(),
  cpu: cpus()[0].model,
  cores: cpus().length,
  peer: { name: peer, version },
  results,
};
const path = options.record ?? join(root, "benches/records", `peers-${options.browser}.json`);
await mkdir(dirname(path), { recursive: true });
await writeFile(path, `${JSON.stringify(record, null, 2)}\n`);
console.log(`record: ${path}`);
await browser.close();
await server.close();
