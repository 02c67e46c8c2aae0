/**
 * The native build beside native onnxruntime, and WebAssembly beside the native build held to 128-bit vectors with FMA, one
 * thread each, in turns. Called by `cargo xtask bench native`, which builds the program.
 */
import { execFile, spawn } from "node:child_process";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { parseArgs, promisify } from "node:util";
import { launchPuppeteer } from "../../tests/wasm/lib/drivers.mjs";
import {
  findWorkloads,
  mergeRows,
  openPage,
  recordPath,
  root,
  round,
  serveBench,
  writeRecord,
} from "../peers/common.mjs";
import { median, quantile } from "../peers/statistics.mjs";

/** The models with seeded weights. */
const SEEDED =
  "mobilenet_v2,efficientnet_lite0,resnet50,minilm_l6,distilbert_base,bert_base," +
  "mobilenet_v2_int8,efficientnet_lite0_int8,resnet50_int8,minilm_l6_int8,distilbert_base_int8";
const { values: options } = parseArgs({
  options: {
    workloads: { type: "string", default: SEEDED },
    rounds: { type: "string", default: "5" },
    row: { type: "string", default: "200" },
    record: { type: "string" },
    merge: { type: "boolean", default: false },
  },
});
const row = Number(options.row);
const execute = promisify(execFile);

/** The native program: a process per turn. It reports the instruction set that it chose when none is asked for. */
async function weblane(file, isa, runs) {
  const args = ["bench", file, "--threads", "1", "--runs", String(runs), ...(isa ? ["--isa", isa] : [])];
  const { stdout } = await execute(join(root, "target/release/weblane"), args);
  const ms = Number(stdout.match(/^run {2}median ([\d.]+) ms/m)?.[1]);
  if (!(ms > 0)) throw new Error(`weblane bench printed no time:\n${stdout}`);
  return { ms, isa: stdout.match(/^isa (\S+)/m)?.[1] };
}

/** Native onnxruntime: a process that stays. */
async function startOrt({ file, inputs }) {
  const python = join(root, "target/venv/bin/python");
  const child = spawn(python, [join(root, "benches/native/ort.py"), file, JSON.stringify(inputs)], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const line = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Error("native onnxruntime ended");
    return value;
  };
  return {
    version: await line(),
    async burst() {
      child.stdin.write(`${row}\n`);
      return Number(await line());
    },
    close: () => child.stdin.end(),
  };
}

const server = await serveBench();
const browser = await launchPuppeteer("chromium");
const results = [];
const found = {};
for (const { name, url, file, inputs } of findWorkloads(options.workloads)) {
  const ort = await startOrt({ file, inputs });
  found.onnxruntime = ort.version;
  const page = await openPage(browser, server.url);
  const call = (method, argument) => page.evaluate((n, a) => window.harness[n](a), method, argument ?? null);
  await call("loadModel", { runtime: "weblane", url, inputs, threads: 1 });
  found.wasm = (await call("describeModel")).about;
  // Runs per turn of the native program, and all the caches warm.
  await call("timeModel", 700);
  await ort.burst();
  const first = await weblane(file, undefined, 1);
  found.isa = first.isa;
  const runs = Math.max(1, Math.round(row / first.ms));
  const turns = {
    onnxruntime: () => ort.burst(),
    native: async () => (await weblane(file, undefined, runs)).ms,
    fma128: async () => (await weblane(file, "fma128", runs)).ms,
    wasm: () => call("timeModel", row),
  };
  const names = Object.keys(turns);
  const times = Object.fromEntries(names.map((turn) => [turn, []]));
  for (let i = 0; i < Number(options.rounds); i++) {
    for (let k = 0; k < names.length; k++) {
      const turn = names[(i + k) % names.length];
      times[turn].push(await turns[turn]());
    }
  }
  ort.close();
  await page.close();
  const ratio = (over, under) => {
    const ratios = over.map((ms, i) => ms / under[i]);
    return { ratio: round(median(ratios)), quartiles: [0.25, 0.75].map((q) => round(quantile(ratios, q))) };
  };
  const result = {
    workload: name,
    onnxruntime_ms: round(median(times.onnxruntime)),
    native_ms: round(median(times.native)),
    fma128_ms: round(median(times.fma128)),
    wasm_ms: round(median(times.wasm)),
    native_over_onnxruntime: ratio(times.onnxruntime, times.native),
    wasm_over_fma128: ratio(times.fma128, times.wasm),
  };
  results.push(result);
  const show = ({ ratio, quartiles }) => `${ratio} (${quartiles.join(" .. ")})`;
  console.log(
    `${name.padEnd(20)} ms: onnxruntime ${result.onnxruntime_ms}  ${first.isa} ${result.native_ms}  fma128 ${result.fma128_ms}  wasm ${result.wasm_ms}  ` +
      `native/onnxruntime ${show(result.native_over_onnxruntime)}  wasm/fma128 ${show(result.wasm_over_fma128)}`,
  );
}
const version = await browser.version();
await browser.close();
await server.close();
const path = options.record ?? recordPath("native");
if (options.merge) await mergeRows(path, results);
await writeRecord(path, {
  what: "one thread, medians; ratios are speeds: onnxruntime's time / ours natively with the best instruction set, and the native time with 128-bit vectors and FMA / WebAssembly's",
  command: "cargo xtask bench native",
  browser: version,
  ...found,
  results,
});
