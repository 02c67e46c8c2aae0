/** Prints a record of `cargo xtask bench peers` as a table in Markdown: node benches/table.mjs RECORD */
import { readFile } from "node:fs/promises";

const [path] = process.argv.slice(2);
if (!path) throw new Error("usage: node benches/table.mjs RECORD");
const { browser, cpu, peers, results } = JSON.parse(await readFile(path, "utf8"));
const names = ["onnxruntime-web", "litert", "weblane-1t", "weblane-float"].filter((peer) =>
  results.some((row) => row[peer]),
);
const line = (cells) => console.log(`| ${cells.join(" | ")} |`);

const versions = Object.entries(peers).map(([name, version]) => `${name} ${version}`);
console.log(`${[browser, cpu, ...versions].join(", ")}\n`);
line(["workload", "threads", "weblane", ...names.flatMap((peer) => [peer, "ratio (quartiles)"])]);
line(Array(3 + 2 * names.length).fill("---"));
for (const row of results) {
  if (row.error) {
    line([row.workload, row.threads, row.error, ...names.flatMap(() => ["-", "-"])]);
    continue;
  }
  const cells = names.flatMap((peer) => {
    if (!row[peer]) return ["-", "-"];
    const { ms, ratio, ratio_quartiles: quartiles } = row[peer];
    return [`${ms} ms`, `${ratio.toFixed(2)} (${quartiles.map((q) => q.toFixed(2)).join(" to ")})`];
  });
  line([row.workload, row.threads, `${row.weblane.ms} ms`, ...cells]);
}
