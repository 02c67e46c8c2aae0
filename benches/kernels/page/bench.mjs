/** The page's half: one worker with the module, asked by name. */
window.createHarness = async ({ threads }) => {
  const worker = new Worker("./worker.mjs", { type: "module" });
  const ask = (method, ...args) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) =>
        "error" in data ? reject(new Error(data.error)) : resolve(data.value);
      worker.onerror = (event) => reject(new Error(event.message));
      worker.postMessage({ method, args });
    });
  await ask("start", threads);
  return {
    about: () => ask("about"),
    measure: ({ index, rounds, ms }) => ask("measure", index, rounds, ms),
    dotPeaks: ({ rounds, ms }) => ask("dotPeaks", rounds, ms),
    lanesOverOne: ({ lanes, rounds, ms }) => ask("lanesOverOne", lanes, rounds, ms),
    regionCost: ({ lanes, rounds }) => ask("regionCost", lanes, rounds),
  };
};
