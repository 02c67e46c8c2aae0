/**
 * The page's half of `decode.mjs`: a decoder that gives a word after the other, each from the caches of all words before.
 */
import { median } from "./median.mjs";
import { fillInputs, importRuntime } from "./runtimes.mjs";

const present = (name) => name.replace("past_key_values", "present");

/** How weblane runs with these options, which the names of the caches to come give. */
const weblane =
  (options) =>
  async ({ Session, Tensor }, url, threads, kept) => {
    const session = await Session.load(url, { threads });
    return {
      tensor: (type, data, dims) => new Tensor(type, data, dims),
      run: (feeds) => session.run(feeds, options(kept)),
      close: () => session.dispose(),
    };
  };

/** A session as a function from inputs to outputs, and how its tensors are made. */
const SESSIONS = {
  weblane: weblane((kept) => ({ keep: kept, transfer: true })),
  /** Caches come to the page and go back. */
  "weblane-copies": weblane(() => ({})),
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
  const begin = names.map((name) => ({
    name,
    type: "float32",
    dims: [batch, heads, past, size],
    kind: "uniform",
  }));
  let caches = Object.fromEntries(
    fillInputs(begin).map(({ name, type, dims, data }) => [name, tensor(type, data, dims)]),
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
