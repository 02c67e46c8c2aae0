/**
 * weblane beside other runtimes: rounds in which each has a turn on one page, so that a noisy machine disturbs all
 * alike. Prints a table and writes a record to benches/records/. Called by `cargo xtask bench peers`.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { median, quantile } from "simple-statistics";
import { startDriver } from "../../tests/wasm/lib/drivers.mjs";
import {
  findWorkloads,
  mergeRows,
  peerVersion,
  recordPath,
  root,
  round,
  serveBench,
  writeRecord,
} from "./common.mjs";
import { LITERT } from "./workloads.mjs";

const { values: options } = parseArgs({
  options: {
    browser: { type: "string", default: "chromium" },
    threads: { type: "string", default: "1,2" },
    workloads: { type: "string" },
    peers: { type: "string" },
    seconds: { type: "string", default: "12" },
    rounds: { type: "string", default: "60" },
    pause: { type: "string", default: "20" },
    pages: { type: "string", default: "3" },
    row: { type: "string", default: "40" },
    warmup: { type: "string", default: "700" },
    record: { type: "string" },
    merge: { type: "boolean", default: false },
  },
});
/** npm package of each peer. */
const PACKAGES = {
  "onnxruntime-web": "onnxruntime-web",
  litert: "@litertjs/core",
  // Beside ourselves on more threads.
  "weblane-1t": undefined,
  // Ourselves with the float model beside its quantised file.
  "weblane-float": undefined,
};
const peers = (
  options.peers ??
  (options.browser === "chromium" ? "onnxruntime-web,litert,weblane-float" : "onnxruntime-web,weblane-float")
).split(",");
const unknown = peers.filter((peer) => !(peer in PACKAGES));
if (unknown.length)
  throw new Error(`no such peer: ${unknown.join(", ")}; there are ${Object.keys(PACKAGES).join(", ")}`);

/** The twin of a workload in LiteRT's format, where it has one. */
function twin({ name }) {
  const shape = LITERT[name];
  if (!shape) return undefined;
  if (existsSync(join(root, "target/models-tflite", name, "model.tflite"))) {
    return { url: `/tflite/${name}/model.tflite`, ...shape };
  }
  console.log(
    `${name.padEnd(20)}  litert skipped: target/models-tflite has no twin; models/build_tflite.py builds it`,
  );
  return undefined;
}

const server = await serveBench();
const driver = await startDriver(options.browser, { url: server.url, quiet: true });
const results = [];

/**
 * Rounds of several pages together: engines compile and lay out memory anew in each, and now and then a runtime is slow
 * on one page from beginning to end.
 */
async function measure(config, pages) {
  const times = [];
  let last;
  for (let page = 0; page < pages; page++) {
    await driver.open();
    await driver.call("create");
    last = await driver.call("measure", config);
    times.push(...last.times);
  }
  return { ...last, times };
}
const ms = (times) => `${round(median(times))} ms`;

try {
  for (const threads of options.threads.split(",").map(Number)) {
    for (const { name, url, inputs, float } of findWorkloads(options.workloads)) {
      const model = (runtime) => {
        if (runtime === "litert") return twin({ name });
        if (runtime === "weblane-float") return float;
        return { url, inputs };
      };
      const models = Object.fromEntries(["weblane", ...peers].map((runtime) => [runtime, model(runtime)]));
      const names = Object.keys(models).filter((runtime) => models[runtime]);
      if (names.length === 1) continue;
      const config = {
        runtimes: names.map((runtime) => ({ runtime, ...models[runtime] })),
        threads,
        seconds: Number(options.seconds) / Number(options.pages),
        rounds: Number(options.rounds),
        pause: Number(options.pause),
        row: Number(options.row),
        warmup: Number(options.warmup),
      };
      const row = { workload: name, threads };
      results.push(row);
      try {
        const measured = await measure(config, Number(options.pages));
        const times = Object.fromEntries(
          names.map((runtime, k) => [runtime, measured.times.map((row) => row[k])]),
        );
        row.rounds = measured.times.length;
        row.weblane = { ms: round(median(times.weblane)), about: measured.about.weblane };
        for (const peer of names.slice(1)) {
          const ratios = times[peer].map((time, i) => time / times.weblane[i]);
          row[peer] = {
            ms: round(median(times[peer])),
            ratio: round(median(ratios)),
            ratio_quartiles: [0.25, 0.75].map((q) => round(quantile(ratios, q))),
            ...(measured.differences[peer] !== undefined && {
              difference: round(measured.differences[peer]),
            }),
            about: measured.about[peer],
          };
        }
        const line = names.slice(1).map((peer) => {
          const { ratio, ratio_quartiles: spread, difference } = row[peer];
          const same = difference === undefined ? "" : `, differs by ${difference}`;
          return `${peer} ${ms(times[peer])}: ${ratio} (${spread[0]} .. ${spread[1]})${same}`;
        });
        console.log(
          `${name.padEnd(20)} ${threads}t  weblane ${ms(times.weblane).padEnd(9)} | ${line.join(" | ")}`,
        );
      } catch (error) {
        row.error = error.message.split("\n")[0];
        console.log(`${name.padEnd(20)} ${threads}t  failed: ${row.error}`);
      }
    }
  }
} finally {
  await driver.close();
  await server.close();
}
const path = options.record ?? recordPath(`peers-${options.browser}`);
if (options.merge) await mergeRows(path, results);
await writeRecord(path, {
  what: "milliseconds are medians; a ratio is the median of the peer's time / weblane's time over interleaved rounds, on one page at a time",
  command: "cargo xtask bench peers",
  browser: driver.version,
  peers: Object.fromEntries(
    await Promise.all(
      peers.flatMap((peer) => PACKAGES[peer] ?? []).map(async (name) => [name, await peerVersion(name)]),
    ),
  ),
  results,
});
