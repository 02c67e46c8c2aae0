/**
 * A decoder that gives a word after the other, weblane beside onnxruntime-web: the caches of keys and values stay in the
 * engine (`keep`), or come to the page and go back with every word. Called by `cargo xtask bench decode`.
 */
import { parseArgs } from "node:util";
import { median, quantile } from "simple-statistics";
import { launchPuppeteer } from "../../tests/wasm/lib/drivers.mjs";
import { locate, openPage, peerVersion, recordPath, round, serveBench, writeRecord } from "./common.mjs";
import { DECODER } from "./workloads.mjs";

const { values: options } = parseArgs({
  options: {
    models: { type: "string", default: DECODER.names.join() },
    threads: { type: "string", default: "1,2" },
    past: { type: "string", default: "16,256,768" },
    rounds: { type: "string", default: "7" },
    words: { type: "string", default: "12" },
    pause: { type: "string", default: "20" },
    record: { type: "string" },
  },
});
const RUNTIMES = ["weblane", "weblane-copies", "onnxruntime-web"];

const pasts = options.past.split(",").map(Number);
const server = await serveBench();
const browser = await launchPuppeteer("chromium");
const results = [];
for (const name of options.models.split(",")) {
  const model = locate(name);
  if (!model) throw new Error(`${name} is not built`);
  for (const threads of options.threads.split(",").map(Number)) {
    const page = await openPage(browser, server.url);
    const config = {
      runtimes: RUNTIMES,
      url: model.url,
      caches: DECODER.caches,
      pasts,
      threads,
      rounds: Number(options.rounds),
      count: Number(options.words),
      pause: Number(options.pause),
    };
    const measured = await page.evaluate((c) => window.harness.measureDecoder(c), config);
    await page.close();
    for (const past of pasts) {
      const times = (k) => measured.times[past].map((turn) => turn[k]);
      const row = { model: name, threads, past, rounds: times(0).length };
      RUNTIMES.forEach((runtime, k) => {
        const ratios = times(k).map((ms, i) => ms / times(0)[i]);
        row[runtime] = {
          ms: round(median(times(k))),
          ...(k > 0 && {
            ratio: round(median(ratios)),
            ratio_quartiles: [0.25, 0.75].map((q) => round(quantile(ratios, q))),
            difference: round(measured.difference[past][k]),
          }),
        };
      });
      results.push(row);
      const cells = RUNTIMES.map((runtime) => {
        const { ms, ratio, ratio_quartiles: spread } = row[runtime];
        return `${runtime} ${ms} ms${ratio === undefined ? "" : `: ${ratio} (${spread.join(" .. ")})`}`;
      });
      console.log(`${name} after ${String(past).padStart(4)} tokens, ${threads}t  ${cells.join(" | ")}`);
    }
  }
}
const version = await browser.version();
await browser.close();
await server.close();
await writeRecord(options.record ?? recordPath("decode"), {
  what: "milliseconds of a word, medians; a ratio is the median of a runtime's time / weblane's over interleaved rounds; weblane keeps the caches in the engine, weblane-copies gives them to the page",
  command: "cargo xtask bench decode",
  browser: version,
  peers: { "onnxruntime-web": await peerVersion("onnxruntime-web") },
  results,
});
