/**
 * The page's half of `decode.mjs`: a decoder that gives a word after the other, each from the caches of all words before.
 */
import { importRuntime } from "./runtimes.mjs";

/** Numbers in -0.5..0.5, the same for every runtime. */
function noise(length, seed) {
  const data = new Float32Array(length);
  let state = seed;
  for (let i = 0; i < length; i++) {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    data[i] = (state >>> 8) / 2 ** 24 - 0.5;
  }
  return data;
}

const present = (name) => name.replace("past_key_values", "present");

/** A session as a function from inputs to outputs, and how its tensors are made. Outputs named `kept` go into the next run only. */
const SESSIONS = {
  async weblane({ Session, Tensor }, url, threads, kept) {
    const session = await Session.load(url, { threads });
    return {
      tensor: (type, data, dims) => new Tensor(type, data, dims),
      run: (feeds) => session.run(feeds, { keep: kept, transfer: true }),
      close: () => session.dispose(),
    };
  },
  /** Without the option `keep`: caches come to the page and go back. */
  async "weblane-copies"({ Session, Tensor }, url, threads) {
    const session = await Session.load(url, { threads });
    return {
      tensor: (type, data, dims) => new Tensor(type, data, dims),
      run: (feeds) => session.run(feeds),
      close: () => session.dispose(),
    };
  },
  async "onnxruntime-web"(ort, url, threads) {
    ort.env.wasm.wasmPaths = "/ort/";
    ort.env.wasm.numThreads = threads;
    const session = await ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    return {
      tensor: (type, data, dims) => new ort.Tensor(type, data, dims),
      run: (feeds) => session.run(feeds),
      close: () => session.release(),
    };
  },
};

const CODE = { "weblane-copies": "weblane" };

/** Gives `words` words after `past` tokens; the time of each, and the last logits. */
async function words({ tensor, run }, { names, dims }, past, count) {
  const [batch, heads, , size] = dims;
  let caches = Object.fromEntries(
    names.map((name, i) => {
      const shape = [batch, heads, past, size];
      return [name, tensor("float32", noise(batch * heads * past * size, i + 1), shape)];
    }),
  );
  const times = [];
  let logits;
  for (let i = 0; i < count; i++) {
    const tokens = past + i + 1;
    const start = performance.now();
    const outputs = await run({
      input_ids: tensor("int64", BigInt64Array.of(BigInt(100 + i)), [1, 1]),
      attention_mask: tensor("int64", new BigInt64Array(tokens).fill(1n), [1, tokens]),
      ...caches,
    });
    times.push(performance.now() - start);
    caches = Object.fromEntries(names.map((name) => [name, outputs[present(name)]]));
    logits = outputs.logits.data;
  }
  for (const cache of Object.values(caches)) cache.dispose();
  return { times, logits };
}

function median(times) {
  const sorted = times.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/**
 * Rounds in which every runtime has a turn for every length of the cache, who begins changing with each. `times[past][round]`
 * has the median time of a word for each runtime; `difference[past]` is the largest of the logits, relative to the largest one,
 * between each and the first.
 */
export async function measureDecoder({ runtimes, url, caches, pasts, threads, rounds, count, pause }) {
  const kept = caches.names.map(present);
  const loaded = [];
  for (const runtime of runtimes) {
    const code = await importRuntime(CODE[runtime] ?? runtime);
    loaded.push(await SESSIONS[runtime](code, url, threads, kept));
  }
  const times = Object.fromEntries(pasts.map((past) => [past, []]));
  const difference = {};
  // The first round is for the engine to compile what runs often.
  for (let round = 0; round <= rounds; round++) {
    for (const past of pasts) {
      const turn = [];
      const last = [];
      for (let k = 0; k < loaded.length; k++) {
        const which = (round + k) % loaded.length;
        await new Promise((resolve) => setTimeout(resolve, pause));
        const { times, logits } = await words(loaded[which], caches, past, count);
        turn[which] = median(times.slice(2));
        last[which] = logits;
      }
      if (round > 0) times[past].push(turn);
      const scale = last[0].reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      difference[past] = last.map(
        (logits) => logits.reduce((most, x, i) => Math.max(most, Math.abs(x - last[0][i])), 0) / scale,
      );
    }
  }
  for (const { close } of loaded) await close();
  return { times, difference };
}
