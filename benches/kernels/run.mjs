/**
 * Matrix products and convolutions in a browser as a share of the peak of multiply-add, measured in turns with it, and
 * the cost of a parallel region. Called by `cargo xtask bench gemm`, which builds the module with the flags of `relaxed_mt`.
 */
import { join } from "node:path";
import { parseArgs } from "node:util";
import { startDriver } from "../../tests/wasm/lib/drivers.mjs";
import { serve } from "../../tests/wasm/lib/server.mjs";
import { recordPath, root, round, writeRecord } from "../peers/common.mjs";
import { median, quantile } from "../peers/statistics.mjs";

const { values: options } = parseArgs({
  options: {
    browser: { type: "string", default: "chromium" },
    filter: { type: "string", default: "gemm" },
    sweeps: { type: "string", default: "5" },
    rounds: { type: "string", default: "9" },
    ms: { type: "string", default: "10" },
    record: { type: "string" },
  },
});
const LANES = 2;
const rounds = Number(options.rounds);
const server = await serve({
  "/": join(root, "benches/kernels/page"),
  "/module/": join(root, "target/bench-kernels"),
});
const driver = await startDriver(options.browser, { url: server.url, quiet: true });
const results = [];
let isa;
let regions;
let lanesOverOne;
let dots;
try {
  await driver.open();
  await driver.call("create", { threads: LANES });
  const about = await driver.call("about");
  isa = about.isa;
  console.log(
    `${isa}: GFLOP/s, share of the peak of multiply-add, or of the dot product that 8-bit products use`,
  );
  const works = [...about.names.entries()].filter(([, name]) => name.includes(options.filter));
  // All of them several times over: what else the machine does comes and goes within seconds.
  const ratesOf = new Map(works.map(([index]) => [index, []]));
  for (let sweep = 0; sweep < Number(options.sweeps); sweep++)
    for (const [index] of works)
      ratesOf.get(index).push(...(await driver.call("measure", { index, rounds, ms: Number(options.ms) })));
  for (const [index, name] of works) {
    const rates = ratesOf.get(index);
    const peaks = rates.filter((_, i) => i % 2 === 0);
    const own = rates.filter((_, i) => i % 2 === 1);
    const shares = own.map((rate, i) => rate / peaks[i]);
    const row = {
      name,
      gflops: round(median(own)),
      peak_gflops: round(median(peaks)),
      share: round(median(shares)),
      share_quartiles: [0.25, 0.75].map((q) => round(quantile(shares, q))),
    };
    results.push(row);
    console.log(
      `${name.padEnd(34)} ${String(row.gflops).padEnd(6)} of ${String(row.peak_gflops).padEnd(6)} ` +
        `${(100 * row.share).toFixed(1)}% (${row.share_quartiles.map((q) => (100 * q).toFixed(1)).join(" .. ")})`,
    );
  }
  const [wide, bytes, split] = await driver.call("dotPeaks", { rounds, ms: Number(options.ms) });
  dots = {
    form: about.forms[0],
    exact: about.forms.slice(1),
    pairs_gops: round(wide),
    bytes_gops: round(bytes),
    split_gops: round(split),
  };
  console.log(
    `8-bit products as ${dots.form} (exact: ${dots.exact}); peak of pairs ${dots.pairs_gops}, of the relaxed dot ${dots.bytes_gops}, of split bytes ${dots.split_gops} GOP/s`,
  );
  const gains = await driver.call("lanesOverOne", { lanes: LANES, rounds: 50, ms: Number(options.ms) });
  const [low, middle, high] = [0.25, 0.5, 0.75].map((q) => round(quantile(gains, q)));
  lanesOverOne = { lanes: LANES, ratio: middle, quartiles: [low, high] };
  console.log(`peak of multiply-add on ${LANES} lanes over one: ${middle} (${low} .. ${high})`);
  const costs = await driver.call("regionCost", { lanes: LANES, rounds: 50 });
  const summary = (times) => ({ median_us: round(median(times)), p10_us: round(quantile(times, 0.1)) });
  regions = { lanes: LANES, empty: summary(costs.slice(0, 50)), every_lane_comes: summary(costs.slice(50)) };
  console.log(
    `parallel region on ${LANES} lanes: empty ${regions.empty.median_us} us (10%: ${regions.empty.p10_us}), ` +
      `every lane comes ${regions.every_lane_comes.median_us} us (10%: ${regions.every_lane_comes.p10_us})`,
  );
} finally {
  await driver.close();
  await server.close();
}
await writeRecord(options.record ?? recordPath(`gemm-${options.browser}`), {
  what: "GFLOP/s on one lane, and the median share of the peak of multiply-add, which was measured in turns; microseconds of a parallel region",
  command: "cargo xtask bench gemm",
  browser: driver.version,
  isa,
  dots,
  results,
  peak_lanes_over_one: lanesOverOne,
  regions,
});
