/** The page's half: loads a model in both runtimes and runs them in turns. */
import * as ort from "/ort/ort.wasm.min.mjs";
import { Session } from "/weblane/dist/index.js";

const TYPES = { float32: Float32Array, int64: BigInt64Array, float16: Uint16Array };

/** Half-precision bits of a number in 0..1, cut off below the eleventh bit. */
function halfBits(x) {
  const bits = new Uint32Array(new Float32Array([x]).buffer)[0];
  const exponent = ((bits >>> 23) & 255) - 112;
  return exponent <= 0 ? 0 : (exponent << 10) | ((bits >>> 13) & 1023);
}

function fill({ type, dims, kind }) {
  const data = new TYPES[type](dims.reduce((a, b) => a * b, 1));
  let seed = 12345;
  for (let i = 0; i < data.length; i++) {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    const uniform = (seed >>> 8) / 2 ** 24;
    data[i] = kind !== "uniform" ? kind : type === "float16" ? halfBits(uniform) : uniform;
  }
  return data;
}

const RUNTIMES = {
  async weblane(url, workload, threads) {
    const session = await Session.load(url, { threads });
    const feeds = {};
    for (const input of workload.inputs) feeds[input.name] = { type: input.type, data: fill(input), dims: input.dims };
    const info = await session.info();
    return {
      about: `${info.variant}, ${info.threads} thread${info.threads > 1 ? "s" : ""}`,
      run: () => session.run(feeds),
      close: () => session.dispose(),
    };
  },
  async "onnxruntime-web"(url, workload, threads) {
    ort.env.wasm.wasmPaths = "/ort/";
    ort.env.wasm.numThreads = threads;
    const session = await ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    const feeds = {};
    for (const input of workload.inputs) feeds[input.name] = new ort.Tensor(input.type, fill(input), input.dims);
    return {
      about: `${ort.env.versions.web}, ${threads} thread${threads > 1 ? "s" : ""}`,
      run: () => session.run(feeds),
      close: () => session.release(),
    };
  },
};

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

async function time(runtime) {
  const start = performance.now();
  const outputs = await runtime.run();
  return { ms: performance.now() - start, outputs };
}

/** Runs pairs until `seconds` have passed or `pairs` are done, the order changing with each. */
window.measure = async ({ url, workload, threads, seconds, pairs, ours, peer }) => {
  const a = await RUNTIMES[ours](url, workload, threads);
  const b = await RUNTIMES[peer](url, workload, threads);
  const same = difference((await a.run()), (await b.run()));
  for (let i = 0; i < 2; i++) {
    await a.run();
    await b.run();
  }
  const times = [];
  const end = performance.now() + seconds * 1000;
  for (let i = 0; i < pairs && (performance.now() < end || i < 5); i++) {
    const first = await time(i % 2 ? b : a);
    const second = await time(i % 2 ? a : b);
    times.push(i % 2 ? [second.ms, first.ms] : [first.ms, second.ms]);
  }
  await a.close();
  await b.close();
  return { times, about: { [ours]: a.about, [peer]: b.about }, difference: same };
};
window.ready = true;
