/**
 * The runtimes, all behind one shape: `load(name, code, url, feeds, options)` gives `{ about, run, memory, close }`.
 * A runtime's code is imported when it is first asked for, so that a page holds only what it measures.
 */
const TYPES = { float32: Float32Array, int64: BigInt64Array, float16: Uint16Array };

/** Half-precision bits of a number in 0..1, cut off below the eleventh bit. */
function halfBits(x) {
  const bits = new Uint32Array(new Float32Array([x]).buffer)[0];
  const exponent = ((bits >>> 23) & 255) - 112;
  return exponent <= 0 ? 0 : (exponent << 10) | ((bits >>> 13) & 1023);
}

/** Elements of an input. The generator is seeded: every runtime gets the same numbers. */
function fill({ type, dims, kind }) {
  const data = new TYPES[type](dims.reduce((a, b) => a * b, 1));
  let seed = 12345;
  for (let i = 0; i < data.length; i++) {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    const uniform = (seed >>> 8) / 2 ** 24;
    // Big integers do not pass through JSON, in which workloads come: they are text until here.
    data[i] = kind !== "uniform" ? BigInt(kind) : type === "float16" ? halfBits(uniform) : uniform;
  }
  return data;
}

/** Values for the inputs of a workload, as `{ name, type, dims, data }`. */
export function fillInputs(inputs) {
  return inputs.map((input) => ({ name: input.name, type: input.type, dims: input.dims, data: fill(input) }));
}

const plural = (threads) => `${threads} thread${threads > 1 ? "s" : ""}`;

const IMPORTS = {
  weblane: () => import("/weblane/dist/index.js"),
  "weblane-1t": () => import("/weblane/dist/index.js"),
  "weblane-float": () => import("/weblane/dist/index.js"),
  "onnxruntime-web": () => import("/ort/ort.wasm.min.mjs"),
  litert: () => import("/litert/dist/index.js"),
};

const LOADERS = {
  async weblane({ Session }, url, feeds, { threads }) {
    const session = await Session.load(url, { threads });
    const named = Object.fromEntries(feeds.map(({ name, ...value }) => [name, value]));
    return {
      about: async () => {
        const info = await session.info();
        return `${info.variant}, ${plural(info.threads)}`;
      },
      run: () => session.run(named),
      /** Nodes of each of `runs` runs. */
      async profile(runs) {
        const nodes = [];
        for (let i = 0; i < runs; i++) nodes.push((await session.profile(named)).nodes);
        return nodes.map((run) =>
          run.map(({ node, op, kernel, ms, flops }) => ({ node, op, kernel, ms, flops })),
        );
      },
      memory: async () => (await session.info()).memory,
      close: () => session.dispose(),
    };
  },
  /** On one thread whatever the others have: how much more threads give. */
  "weblane-1t": (code, url, feeds) => LOADERS.weblane(code, url, feeds, { threads: 1 }),
  "weblane-float": (...load) => LOADERS.weblane(...load),
  async "onnxruntime-web"(ort, url, feeds, { threads, profile = false }) {
    const lines = profile ? interceptLog() : undefined;
    ort.env.wasm.wasmPaths = "/ort/";
    // Left alone, it chooses by itself, as it does on a default page.
    if (threads) ort.env.wasm.numThreads = threads;
    const session = await ort.InferenceSession.create(url, {
      executionProviders: ["wasm"],
      enableProfiling: profile,
    });
    const named = Object.fromEntries(feeds.map((f) => [f.name, new ort.Tensor(f.type, f.data, f.dims)]));
    return {
      about: async () => `${ort.env.versions.web}, ${plural(ort.env.wasm.numThreads)}`,
      run: () => session.run(named),
      async profile(runs) {
        for (let i = 0; i < runs; i++) await session.run(named);
        session.endProfiling();
        return ortNodes(lines()).slice(-runs);
      },
      memory: async () => 0,
      close: () => session.release(),
    };
  },
  /** Its CPU path. It has no worker: a run blocks the page's own thread. */
  async litert({ Tensor, loadLiteRt, loadAndCompile, supportsFeature }, url, feeds, { threads, output }) {
    const relaxed = await supportsFeature("relaxedSimd");
    if (threads > 1 && !relaxed) throw new Error("LiteRT.js has threads only where relaxed SIMD is");
    await loadLiteRt("/litert/wasm/", { threads: threads > 1 });
    const model = await loadAndCompile(url, { accelerator: "wasm", cpuOptions: { numThreads: threads } });
    const tensors = feeds.map(({ data, dims }) => new Tensor(data, dims));
    const shapes = model.getOutputDetails().map(({ shape }) => [...shape].join("x"));
    if (shapes.join() !== output) throw new Error(`outputs are ${shapes.join()}, not ${output}`);
    return {
      about: async () => `${relaxed ? "relaxed SIMD" : "SIMD"}, ${plural(threads)}`,
      async run() {
        const results = await model.run(tensors);
        // As the others do: the numbers end in an array of the page.
        const data = results.map((tensor) => tensor.toTypedArray().slice());
        for (const tensor of results) tensor.delete();
        return data;
      },
      memory: async () => 0,
      close: () => model.delete(),
    };
  },
};

/** Collects from now on what is logged; the function that it returns ends that and gives the lines. */
function interceptLog() {
  const [log, lines] = [console.log, []];
  console.log = (...parts) => lines.push(parts.join(" "));
  return () => {
    console.log = log;
    return lines;
  };
}

/** Their time is that of the nodes in their bodies, which have events of their own. */
const WITH_BODY = ["If", "Loop", "Scan"];

/** Nodes of each run from onnxruntime's profile, which its WebAssembly build writes to the console. */
function ortNodes(lines) {
  const events = JSON.parse(lines.slice(lines.indexOf("[")).join(""));
  const runs = [];
  let nodes = [];
  for (const { cat, name, dur, args } of events) {
    if (cat === "Node" && name.endsWith("_kernel_time") && !WITH_BODY.includes(args.op_name)) {
      nodes.push({ node: name.replace(/_kernel_time$/, ""), op: args.op_name, ms: dur / 1000 });
    } else if (name === "model_run") {
      runs.push(nodes);
      nodes = [];
    }
  }
  return runs;
}

/** The code of a runtime, for `load`. */
export function importRuntime(name) {
  return IMPORTS[name]();
}

/**
 * Loads a model.
 *
 * @param {string} name - of the runtime
 * @param {object} code - what `importRuntime` gave
 * @param {string} url - of the model
 * @param {object[]} feeds - what `fillInputs` gave
 * @param {{ threads?: number, output?: string, profile?: boolean }} options - threads: by default what the runtime takes
 *   by itself; output: the shape that LiteRT.js has to give; profile: `profile` will be called
 */
export function load(name, code, url, feeds, options) {
  return LOADERS[name](code, url, feeds, options);
}
