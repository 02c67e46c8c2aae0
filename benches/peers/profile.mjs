/**
 * Time by node and by operator on both sides: weblane's own profile and that of onnxruntime-web, each on a page of its own, in
 * Chromium. Called by `cargo xtask bench profile`.
 */
import { parseArgs } from "node:util";
import { sum } from "simple-statistics";
import { launchPuppeteer } from "../../tests/wasm/lib/drivers.mjs";
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
    threads: { type: "string", default: "1" },
    runs: { type: "string", default: "9" },
    top: { type: "string", default: "12" },
    record: { type: "string" },
  },
});
const RUNTIMES = ["weblane", "onnxruntime-web"];
const threads = Number(options.threads);

/** Sums by operator, the largest first. */
function byOperator(nodes) {
  const sums = new Map();
  for (const { op, ms } of nodes) {
    const entry = sums.get(op) ?? { op, count: 0, ms: 0 };
    sums.set(op, { op, count: entry.count + 1, ms: entry.ms + ms });
  }
  return [...sums.values()].sort((a, b) => b.ms - a.ms);
}

function show(runtime, { ms, operators, nodes }) {
  console.log(`  ${runtime}: ${ms} ms in nodes`);
  for (const { op, count, ms: part } of operators) {
    console.log(
      `    ${part.toFixed(3).padStart(9)} ms ${((100 * part) / ms).toFixed(1).padStart(5)}%  ${count} x ${op}`,
    );
  }
  for (const { node, op, kernel, ms: part, gflops } of nodes) {
    const speed = gflops ? `${gflops} GFLOP/s` : "";
    console.log(
      `    ${part.toFixed(3).padStart(9)} ms  ${op.padEnd(24)} ${(kernel ?? "").padEnd(24)} ${speed.padEnd(14)} ${node}`,
    );
  }
}

const server = await serveBench();
const browser = await launchPuppeteer("chromium");
const results = [];
for (const { name, url, inputs } of findWorkloads(options.workloads)) {
  const row = { workload: name };
  console.log(name);
  for (const runtime of RUNTIMES) {
    const page = await openPage(browser, server.url);
    const call = (method, argument) =>
      page.evaluate((n, a) => window.harness[n](a), method, argument ?? null);
    try {
      await call("loadModel", { runtime, url, inputs, threads, profile: true });
      await call("timeModel", 700);
      const nodes = await call("profileModel", Number(options.runs));
      row[runtime] = {
        about: (await call("describeModel")).about,
        ms: round(sum(nodes.map(({ ms }) => ms))),
        operators: byOperator(nodes).map((entry) => ({ ...entry, ms: round(entry.ms) })),
        nodes: nodes
          .toSorted((a, b) => b.ms - a.ms)
          .slice(0, Number(options.top))
          .map(({ flops, ms, ...node }) => ({
            ...node,
            ms: round(ms),
            ...(flops > 0 && ms > 0 && { gflops: round(flops / ms / 1e6) }),
          })),
      };
      show(runtime, row[runtime]);
    } catch (error) {
      row[runtime] = { error: error.message.split("\n")[0] };
      console.log(`  ${runtime}: failed: ${row[runtime].error}`);
    }
    await page.close();
  }
  results.push(row);
}
const version = await browser.version();
await browser.close();
await server.close();
await writeRecord(options.record ?? recordPath("profile"), {
  what: `milliseconds by operator, and of the ${options.top} slowest nodes, medians over runs; ${threads} thread(s)`,
  command: "cargo xtask bench profile",
  browser: version,
  peers: { "onnxruntime-web": await peerVersion("onnxruntime-web") },
  results,
});
