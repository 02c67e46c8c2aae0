/** The engine never runs on the page's own thread, where waiting is not allowed; so neither does its bench. */
import * as module from "/module/weblane_bench_kernels.js";

const METHODS = {
  async start(threads) {
    await module.default({ module_or_path: "/module/weblane_bench_kernels_bg.wasm" });
    // One thread of the pool is this worker itself.
    if (threads > 1) await module.initThreadPool(threads - 1);
  },
  about: () => ({ isa: module.isa(), names: module.names(), forms: module.forms() }),
  measure: (index, rounds, ms) => [...module.measure(index, rounds, ms)],
  dotPeaks: (rounds, ms) => [...module.dotPeaks(rounds, ms)],
  lanesOverOne: (lanes, rounds, ms) => [...module.lanesOverOne(lanes, rounds, ms)],
  regionCost: (lanes, rounds) => [...module.regionCost(lanes, rounds)],
};

self.onmessage = async ({ data: { method, args } }) => {
  try {
    self.postMessage({ value: (await METHODS[method](...args)) ?? null });
  } catch (error) {
    self.postMessage({ error: String(error) });
  }
};
