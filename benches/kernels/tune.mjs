/**
 * Candidates for the tile of float products beside each other: a module of each, in turns, every one as a share of its own
 * page's peak of multiply-add. Called by `cargo xtask bench tune`, which builds the modules.
 *
 * A share is the mean over all turns: with neighbours that come and go a median jumps between the state with them and the
 * one without. The winner has the largest geometric mean of shares. `kernels/src/gemm/table.rs` holds it, and a test compares.
 */
import { join } from "node:path";
import { parseArgs } from "node:util";
import { startDriver } from "../../tests/wasm/lib/drivers.mjs";
import { serve } from "../../tests/wasm/lib/server.mjs";
import { recordPath, root, round, writeRecord } from "../peers/common.mjs";
import { geometricMean, mean, quantile } from "../peers/statistics.mjs";

const { values: options } = parseArgs({
  options: {
    tiles: { type: "string" },
    modules: { type: "string" },
    browser: { type: "string", default: "chromium" },
    // Products of one row go another way, which has no tile.
    filter: { type: "string", default: "^gemm (?!1 x)" },
    sweeps: { type: "string", default: "12" },
    rounds: { type: "string", default: "4" },
    ms: { type: "string", default: "5" },
    record: { type: "string" },
  },
});
const FIELDS = ["mr", "narrow_mr", "nrv", "kc", "mc", "unroll", "interleaves"];
const [rounds, ms] = [Number(options.rounds), Number(options.ms)];

const sides = [];
const close = () => Promise.all(sides.flatMap(({ driver, server }) => [driver.close(), server.close()]));
let isa;
const results = [];
try {
  for (const tile of options.tiles.split(" ")) {
    const module = join(options.modules, tile);
    const server = await serve({ "/": join(root, "benches/kernels/page"), "/module/": module });
    const driver = await startDriver(options.browser, { url: server.url, quiet: true });
    sides.push({ tile, server, driver, shares: new Map() });
    await driver.open();
    // Products run on one lane. WebKit, whose page is not isolated, gives no helper its memory.
    await driver.call("create", { threads: 1 });
  }
  const about = await sides[0].driver.call("about");
  isa = about.isa;
  const works = [...about.names.entries()].filter(([, name]) => new RegExp(options.filter).test(name));
  for (const { shares } of sides) for (const [index] of works) shares.set(index, []);
  for (let sweep = 0; sweep < Number(options.sweeps); sweep++)
    // Who begins changes from sweep to sweep.
    for (const [index] of works)
      for (let i = 0; i < sides.length; i++) {
        const { driver, shares } = sides[(sweep + i) % sides.length];
        const rates = await driver.call("measure", { index, rounds, ms });
        for (let k = 0; k + 1 < rates.length; k += 2) shares.get(index).push(rates[k + 1] / rates[k]);
      }
  for (const { tile, shares } of sides) {
    const rows = works.map(([index, name]) => ({
      name,
      share: round(mean(shares.get(index))),
      quartiles: [0.25, 0.75].map((q) => round(quantile(shares.get(index), q))),
    }));
    const score = round(geometricMean(rows.map(({ share }) => share)));
    const values = tile.split(",").map(Number);
    results.push({
      tile: Object.fromEntries(FIELDS.map((field, i) => [field, values[i]])),
      score,
      works: rows,
    });
    console.log(
      `${tile.padEnd(20)} ${(100 * score).toFixed(1)}% of the peak, geometric mean of ${works.length}`,
    );
  }
  for (const [i, [, name]] of works.entries())
    console.log(
      `${name.padEnd(30)} ${results.map(({ works }) => (100 * works[i].share).toFixed(1).padStart(6)).join("")}`,
    );
} finally {
  await close();
}
results.sort((a, b) => b.score - a.score);
await writeRecord(options.record ?? recordPath(`tiles-${options.browser}`), {
  what: "share of the peak of multiply-add by tile: means over turns, their geometric mean over products as the score",
  command: `cargo xtask bench tune${options.browser === "chromium" ? "" : ` --browser ${options.browser}`}`,
  browser: sides[0].driver.version,
  isa,
  results,
});
