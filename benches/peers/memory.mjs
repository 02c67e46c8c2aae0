/**
 * Peak memory of the page's process above an empty page, weblane and onnxruntime-web. Called by `cargo xtask bench memory`.
 *
 * Every measurement has a browser of its own with one page. The page's process is found among the browser's renderer
 * processes by its growth; workers are threads of it. Its resident set is read from Linux's /proc/<pid>/status when
 * the page is there and empty (VmRSS), and the peak afterwards is VmHWM, which the kernel keeps. It keeps it on most
 * paths on which pages go, not on all, so that it is also read every 20 ms. The resident set counts every page once,
 * memory that threads share too. What the browser's other processes hold (the network service's pipe and disk cache,
 * for instance) is not counted.
 */
import { readFile, stat } from "node:fs/promises";
import { parseArgs } from "node:util";
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
    workloads: { type: "string" },
    runtimes: { type: "string", default: "weblane,onnxruntime-web" },
    threads: { type: "string" },
    timeline: { type: "boolean", default: false },
    record: { type: "string" },
  },
});
if (process.platform !== "linux") throw new Error("this bench reads /proc, which only Linux has");

const MIB = 2 ** 20;
const RUNS = 3;

/** VmRSS and VmHWM of a process in bytes, or `undefined` when it has ended. */
async function residentSet(pid) {
  const status = await readFile(`/proc/${pid}/status`, "utf8").catch(() => "");
  const field = (name) => Number(status.match(new RegExp(`^${name}:\\s+(\\d+) kB`, "m"))?.[1]) * 1024;
  return status ? { now: field("VmRSS"), peak: field("VmHWM") } : undefined;
}

/** Resident sets of the browser's renderer processes, by process id. */
async function renderers(cdp) {
  const { processInfo } = await cdp.send("SystemInfo.getProcessInfo");
  const found = new Map();
  for (const { id, type } of processInfo) {
    if (type !== "renderer") continue;
    const set = await residentSet(id);
    if (set) found.set(id, set);
  }
  return found;
}

/** One page, one runtime, one model. Bytes. */
async function measure(url, runtime, workload, fileBytes) {
  const browser = await launchPuppeteer("chromium");
  try {
    const page = await openPage(browser, url);
    const cdp = await browser.target().createCDPSession();
    // A new process still pages in code; the empty page is what it has settled at.
    await delay(500);
    const empty = await renderers(cdp);
    const peaks = new Map();
    const samples = [];
    const start = performance.now();
    const look = async () => {
      const sets = await Promise.all([...empty.keys()].map(async (pid) => [pid, await residentSet(pid)]));
      for (const [pid, set] of sets) peaks.set(pid, Math.max(peaks.get(pid) ?? 0, set?.peak ?? 0));
      samples.push([performance.now() - start, new Map(sets)]);
      return new Map(peaks);
    };
    let watching = true;
    const watch = (async () => {
      while (watching) {
        await look();
        await delay(20);
      }
    })();
    const call = (name, argument) => page.evaluate((n, a) => window.harness[n](a), name, argument ?? null);
    const threads = options.threads ? Number(options.threads) : undefined;
    await call("loadModel", { runtime, url: workload.url, inputs: workload.inputs, threads });
    const loaded = await look();
    const loadedAt = performance.now() - start;
    await call("runModel", RUNS);
    const ran = await look();
    const ranAt = performance.now() - start;
    watching = false;
    await watch;
    // Garbage of the load goes within seconds of idling; what is left is what an open page costs.
    await delay(2000);
    const settled = await renderers(cdp);
    const { about, memory } = await call("describeModel");
    const growth = (pid) => ran.get(pid) - empty.get(pid).now;
    const [pid] = [...empty.keys()].filter((id) => settled.has(id)).sort((a, b) => growth(b) - growth(a));
    if (pid === undefined) throw new Error("the page's process ended");
    const base = empty.get(pid).now;
    if (options.timeline) {
      const line = samples
        .map(([at, sets]) => `${Math.round(at)}:${Math.round((sets.get(pid).now - base) / MIB)}`)
        .join(" ");
      console.log(
        `  ${runtime}: loaded at ${Math.round(loadedAt)} ms, ran until ${Math.round(ranAt)} ms; ms:MiB above the empty page`,
      );
      console.log(`  ${line}`);
    }
    const mib = (bytes) => round((bytes - base) / MIB);
    return {
      about,
      empty_page_mib: round(base / MIB),
      load_peak_mib: mib(loaded.get(pid)),
      peak_mib: mib(ran.get(pid)),
      settled_mib: mib(settled.get(pid).now),
      ...(memory > 0 && { wasm_memory_mib: round(memory / MIB) }),
      peak_over_file: round(growth(pid) / fileBytes),
    };
  } finally {
    await browser.close();
  }
}

const server = await serveBench();
const results = [];
console.log(
  "workload              file MiB  runtime           load peak   peak   settled   wasm (MiB)   peak / file",
);
for (const workload of findWorkloads(options.workloads)) {
  const { size } = await stat(workload.file);
  const row = { workload: workload.name, file_mib: round(size / MIB) };
  for (const runtime of options.runtimes.split(",")) {
    try {
      row[runtime] = await measure(server.url, runtime, workload, size);
    } catch (error) {
      row[runtime] = { error: error.message.split("\n")[0] };
      console.log(`${workload.name.padEnd(20)}  ${runtime}: failed: ${row[runtime].error}`);
      continue;
    }
    const m = row[runtime];
    const cells = [m.load_peak_mib, m.peak_mib, m.settled_mib, m.wasm_memory_mib ?? "-"];
    console.log(
      `${workload.name.padEnd(20)}  ${String(row.file_mib).padEnd(8)}  ${runtime.padEnd(16)}  ${cells.map((x) => String(x).padEnd(8)).join("  ")}   ${m.peak_over_file}`,
    );
  }
  results.push(row);
}
const browser = await launchPuppeteer("chromium");
const version = await browser.version();
await browser.close();
await server.close();
await writeRecord(options.record ?? recordPath("memory"), {
  what: `peak resident set of the page's process above the empty page: while the model loads, over load and ${RUNS} runs, and left 2 s later`,
  command: "cargo xtask bench memory",
  browser: version,
  peers: { "onnxruntime-web": await peerVersion("onnxruntime-web") },
  results,
});
