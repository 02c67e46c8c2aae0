/**
 * Time from the call that loads a model to its first result, weblane and onnxruntime-web, on a first visit and on a second
 * one. Called by `cargo xtask bench load`.
 *
 * Every measurement has a browser of its own. A first visit has a fresh profile, hence no cache; a second visit is a new
 * browser on the profile of the first, with the HTTP cache that it left. Files come over loopback. The runtime's script is
 * imported and the inputs are filled before the clock starts; WebAssembly is not compiled, and no worker is started, before
 * it.
 *
 * Beside them stands what the bytes alone take: the model read by a worker, as weblane's reads it, while the module of two
 * threads compiles, and nothing else. `ratio_of_bytes` is what a runtime would reach that read like this and took no time;
 * another way of reading may take less.
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { max, median, min } from "simple-statistics";
import { delay, launchPuppeteer } from "../../tests/wasm/lib/drivers.mjs";
import {
  findWorkloads,
  openPage,
  peerVersion,
  recordPath,
  round,
  serveBench,
  writeRecord,
} from "./common.mjs";

const { values: options } = parseArgs({
  options: {
    workloads: { type: "string", default: "mobilenet_v2" },
    threads: { type: "string" },
    rounds: { type: "string", default: "5" },
    record: { type: "string" },
  },
});
const RUNTIMES = ["weblane", "onnxruntime-web"];
/** No runtime, only its bytes. */
const BYTES = "bytes";
const SIDES = [...RUNTIMES, BYTES];
const VISITS = ["first", "second"];
/** Until a page that has just opened is at rest. */
const REST_MS = 500;
/** As long as somebody looks at a result, with runs meanwhile. The engine's code cache is not written by then (README). */
const STAY_MS = 3000;

let version;

/** One visit: `{ loaded, ms, about }`. */
async function visit(url, profile, config, stay) {
  // With the events of the network the browser keeps a copy of what arrives and reads it as text, which no page of a user's
  // does: the bytes alone took half as long again.
  const browser = await launchPuppeteer("chromium", { userDataDir: profile, networkEnabled: false });
  try {
    version = await browser.version();
    const page = await openPage(browser, url);
    await delay(REST_MS);
    const call = (name, argument) => page.evaluate((n, a) => window.harness[n](a), name, argument ?? null);
    if (config.runtime === BYTES) return { ...(await call("bytesAlone", config)), about: "read, not run" };
    const result = await call("firstResult", config);
    const { about } = await call("describeModel");
    const end = performance.now() + stay;
    while (performance.now() < end) await call("runModel", 10);
    return { ...result, about };
  } finally {
    await browser.close();
  }
}

// Pages and modules may be kept, as a site's are.
const server = await serveBench({ cacheControl: "max-age=3600", fromMemory: true });
const results = [];
const threads = options.threads ? Number(options.threads) : undefined;
for (const { name, url, inputs } of findWorkloads(options.workloads)) {
  const noTimes = () => Object.fromEntries(SIDES.map((side) => [side, []]));
  const seen = { first: noTimes(), second: noTimes() };
  for (let i = 0; i < Number(options.rounds); i++) {
    for (const runtime of i % 2 ? SIDES.toReversed() : SIDES) {
      const profile = await mkdtemp(join(tmpdir(), "weblane-bench-"));
      try {
        const config = { runtime, url, inputs, threads };
        seen.first[runtime].push(await visit(server.url, profile, config, STAY_MS));
        seen.second[runtime].push(await visit(server.url, profile, config, 0));
      } finally {
        await rm(profile, { recursive: true, force: true, maxRetries: 5 });
      }
    }
  }
  for (const which of VISITS) {
    const row = { workload: name, visit: which, rounds: Number(options.rounds) };
    for (const runtime of SIDES) {
      const times = seen[which][runtime].map(({ ms }) => ms);
      row[runtime] = {
        ms: round(median(times)),
        range: [round(min(times)), round(max(times))],
        loaded_ms: round(median(seen[which][runtime].map(({ loaded }) => loaded))),
        about: seen[which][runtime][0].about,
      };
    }
    const ratios = (side) => seen[which][side].map(({ ms }, i) => seen[which]["onnxruntime-web"][i].ms / ms);
    row.ratio = round(median(ratios("weblane")));
    row.ratio_range = [round(min(ratios("weblane"))), round(max(ratios("weblane")))];
    row.ratio_of_bytes = round(median(ratios(BYTES)));
    results.push(row);
    const cells = SIDES.map((runtime) => {
      const { ms, range, loaded_ms } = row[runtime];
      return `${runtime} ${ms} ms (${range.join(" .. ")}; loaded at ${loaded_ms})`;
    });
    console.log(
      `${name.padEnd(20)} ${which.padEnd(6)} visit  ${cells.join("  ")}  ratio ${row.ratio} (${row.ratio_range.join(" .. ")}), of the bytes alone ${row.ratio_of_bytes}`,
    );
  }
}
await server.close();
await writeRecord(options.record ?? recordPath("load"), {
  what: "milliseconds from the call that loads the model to its first result, medians and ranges; ratio: median of onnxruntime-web's / weblane's in the same round; bytes: the model read in a worker while weblane's module compiles, nothing run",
  command: "cargo xtask bench load",
  browser: version,
  peers: { "onnxruntime-web": await peerVersion("onnxruntime-web") },
  results,
});
