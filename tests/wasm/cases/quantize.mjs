/**
 * `weblane/quantize` in the page: a trained classifier in every mode, what errors say, and stopping.
 */
import { decode } from "../page/compare.mjs";

const MODEL = "/target/models-test/digits/model.onnx";
const GOLDEN = "/target/models-test/digits/data.json";
/** Share of the file that is left, and how like the float model the result has to be. */
const MODES = {
  dynamic: [1.1, 0.99],
  static: [0.5, 0.98],
  int4: [1.1, 0.9],
  "int8-weights": [1.1, 0.99],
  float16: [0.6, 0.9999],
};

export default async (ctx) => {
  const { Session } = ctx.weblane;
  const { quantize } = ctx.quantizing;
  const golden = await ctx.fetchJson(GOLDEN);
  const [input] = golden.inputs;
  const [output] = golden.outputs;
  const feeds = golden.sets.map((set) => ({ [input]: decode(set.inputs[0]) }));
  const best = (values) => values.indexOf(Math.max(...values));

  const modes = Object.entries(MODES).map(([mode, [share, cosine]]) => ({
    name: `digits, ${mode}`,
    timeout: 60,
    async run() {
      const progress = [];
      const { model, report } = await quantize(ctx.url(MODEL), {
        mode,
        calibration: feeds,
        onProgress: (p) => progress.push(p.stage ?? p.phase),
      });
      const [compared] = report.outputs;
      if (!(compared.cosine > cosine))
        throw new Error(`cosine ${compared.cosine}, more than ${cosine} was wanted`);
      if (report.bytesAfter !== model.length || model.length > share * report.bytesBefore) {
        throw new Error(`${report.bytesBefore} -> ${report.bytesAfter} bytes, the file has ${model.length}`);
      }
      // A stage that takes less than a step of the worker is not heard of; the first one always is.
      if (!progress.includes(mode === "static" ? "calibrate" : "quantize")) {
        throw new Error(`progress told of ${progress.join(", ")}`);
      }
      const session = await Session.load(model);
      try {
        for (const [i, set] of golden.sets.entries()) {
          const got = (await session.run(feeds[i]))[output].data;
          const want = decode(set.outputs[0]).data;
          if (best([...got]) !== best([...want])) throw new Error(`set ${i}: another class`);
        }
      } finally {
        await session.dispose();
      }
      return `cosine ${compared.cosine.toFixed(5)}, ${report.bytesBefore} -> ${report.bytesAfter} bytes`;
    },
  }));

  return [
    ...modes,
    {
      name: "what goes wrong is said",
      async run() {
        await ctx.rejects(quantize(ctx.url(MODEL), { mode: "static" }), "missing_input");
        await ctx.rejects(quantize(ctx.url(MODEL), { skipNodes: ["nobody"] }), "invalid_option");
        await ctx.rejects(quantize(ctx.url(MODEL), { mode: "int4", blockSize: 17 }), "invalid_option");
        await ctx.rejects(quantize(new Uint8Array(100)), "not_onnx");
        await ctx.rejects(quantize(ctx.url(MODEL), { signal: AbortSignal.abort() }), "aborted");
      },
    },
  ];
};
