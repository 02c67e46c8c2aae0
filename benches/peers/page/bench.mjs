/** The page's half of the benches in this directory. Holds no runtime until one is asked for. */
import { measureDecoder } from "./decode.mjs";
import { median } from "./median.mjs";
import { fillInputs, importRuntime, load } from "./runtimes.mjs";

/** Largest difference of the first floating-point output, relative to its largest value: both must compute the same. */
function difference(a, b) {
  let [worst, scale] = [0, 0];
  for (const name of Object.keys(b)) {
    const [x, y] = [a[name]?.data, b[name].data];
    if (!(y instanceof Float32Array) || x?.length !== y.length) continue;
    for (let i = 0; i < y.length; i++) {
      worst = Math.max(worst, Math.abs(x[i] - y[i]));
      scale = Math.max(scale, Math.abs(y[i]));
    }
  }
  return worst / (scale || 1);
}

const milliseconds = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Runs in a row for at least `ms`, and at least one; gives the time of each. */
async function burst({ run }, ms) {
  const times = [];
  const end = performance.now() + ms;
  do {
    const start = performance.now();
    await run();
    times.push(performance.now() - start);
  } while (performance.now() < end);
  return times;
}

/**
 * Rounds in which every runtime has a turn, until `seconds` have passed or `rounds` are done; who begins changes with
 * each. A turn is a pause of `pause` ms, in which threads of the one before that still spin go to sleep, and runs in a
 * row for at least `row` ms, whose median counts. `differences` are those of the runtimes that were given the same
 * model as the first.
 */
async function measure({ runtimes, threads, seconds, rounds, pause, row, warmup }) {
  const loaded = [];
  for (const { runtime, url, inputs, output } of runtimes) {
    loaded.push(
      await load(runtime, await importRuntime(runtime), url, fillInputs(inputs), { threads, output }),
    );
  }
  const first = [];
  for (const { run } of loaded) first.push(await run());
  const differences = {};
  runtimes.forEach(({ runtime, url }, k) => {
    if (k > 0 && url === runtimes[0].url) differences[runtime] = difference(first[0], first[k]);
  });
  // Long enough for the engine to have compiled with its optimising compiler what runs often.
  for (const runtime of loaded) await burst(runtime, warmup);
  const times = [];
  const end = performance.now() + seconds * 1000;
  for (let i = 0; i < rounds && (performance.now() < end || i < 5); i++) {
    const turns = [];
    for (let k = 0; k < loaded.length; k++) {
      const turn = (i + k) % loaded.length;
      await milliseconds(pause);
      turns[turn] = median(await burst(loaded[turn], row));
    }
    times.push(turns);
  }
  const about = {};
  for (const [k, { runtime }] of runtimes.entries()) {
    about[runtime] = await loaded[k].about();
    await loaded[k].close();
  }
  return { times, about, differences };
}

/** The model that `loadModel` left. */
let model;

/** For the benches that look at the page from outside: loads a model and keeps it. */
async function loadModel({ runtime, url, inputs, threads, profile }) {
  model = await load(runtime, await importRuntime(runtime), url, fillInputs(inputs), { threads, profile });
  return null;
}

async function runModel(times) {
  for (let i = 0; i < times; i++) await model.run();
  return null;
}

/** Median time of runs in a row for at least `ms`. */
async function timeModel(ms) {
  return median(await burst(model, ms));
}

/** Nodes of `runs` runs, each with its median time. A node may run several times in a run. */
async function profileModel(runs) {
  const all = await model.profile(runs);
  return all[0].map((first, i) => ({ ...first, ms: median(all.map((run) => run[i].ms)) }));
}

/**
 * Milliseconds from the call that loads a model to its first result, with the runtime's script and the inputs at hand;
 * and to where the load alone ended.
 */
async function firstResult({ runtime, url, inputs, threads }) {
  const code = await importRuntime(runtime);
  const feeds = fillInputs(inputs);
  const start = performance.now();
  model = await load(runtime, code, url, feeds, { threads });
  const loaded = performance.now() - start;
  await model.run();
  return { loaded, ms: performance.now() - start };
}

/**
 * What the bytes of a load take, shaped as `firstResult` shapes it: a worker reads the model and drops it, while the page
 * compiles weblane's module. Nothing is started, loaded or run.
 */
async function bytesAlone({ url }) {
  const start = performance.now();
  const worker = new Worker("/reader.mjs", { type: "module" });
  const read = new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => resolve(data);
    worker.onerror = ({ message }) => reject(new Error(`the reader stopped: ${message}`));
  });
  worker.postMessage(url);
  await Promise.all([read, WebAssembly.compileStreaming(fetch("/weblane/dist/weblane_relaxed_mt.wasm"))]);
  const ms = performance.now() - start;
  worker.terminate();
  return { loaded: ms, ms };
}

/** What the model's runtime says about itself, and bytes of its WebAssembly memory where it tells. */
async function describeModel() {
  return { about: await model.about(), memory: await model.memory() };
}

/** The drivers of the test harness look for this. */
window.createHarness = async () => ({
  measure,
  measureDecoder,
  loadModel,
  runModel,
  timeModel,
  profileModel,
  firstResult,
  bytesAlone,
  describeModel,
});
