/**
 * Whole models against outputs of native onnxruntime, with the optimiser on and off, and a small model in every
 * variant that runs here.
 */
import { compare, decode } from "../page/compare.mjs";
import { relaxedSimd } from "../page/features.mjs";

const MODELS = "/target/models-test";
const SMALL = "digits";

async function check(ctx, name, options) {
  const golden = await ctx.fetchJson(`${MODELS}/${name}/data.json`);
  const session = await ctx.weblane.Session.load(ctx.url(`${MODELS}/${name}/model.onnx`), options);
  try {
    let largest = 0;
    for (const set of golden.sets) {
      const feeds = Object.fromEntries(golden.inputs.map((input, i) => [input, decode(set.inputs[i])]));
      const outputs = await session.run(feeds);
      for (const [i, output] of golden.outputs.entries()) {
        largest = Math.max(largest, compare(outputs[output], decode(set.outputs[i]), golden, output));
      }
    }
    const { variant, threads } = await session.info();
    return {
      note: `largest difference ${largest.toExponential(1)}, ${variant}, ${threads} threads`,
      variant,
      threads,
    };
  } finally {
    await session.dispose();
  }
}

export default async (ctx) => {
  const names = await ctx.fetchJson(`${MODELS}/index.json`);
  // Without isolation only the number of threads differs; the optimiser is not at stake again.
  const levels = ctx.mode === "plain" ? ["all"] : ["all", "none"];
  const cases = names.flatMap((name) =>
    levels.map((optimize) => ({
      name: `${name}, optimize ${optimize}`,
      timeout: 300,
      run: async () => (await check(ctx, name, { optimize })).note,
    })),
  );
  const { Session } = ctx.weblane;
  const everyVariant = ["simd_st", "simd_mt", "relaxed_st", "relaxed_mt"].map((variant) => ({
    name: `${SMALL} in variant ${variant}`,
    async run() {
      const address = ctx.url(`${MODELS}/${SMALL}/model.onnx`);
      const impossible = variant.endsWith("mt") && !ctx.isolated;
      if (impossible) {
        await ctx.rejects(Session.load(address, { variant }), "unsupported_platform");
        return "refused, as it should be without shared memory";
      }
      let result;
      try {
        result = await check(ctx, SMALL, { variant });
      } catch (error) {
        // Relaxed SIMD is the only thing an engine of today may lack.
        const lacks = variant.startsWith("relaxed") && !relaxedSimd();
        if (error.code === "unsupported_platform" && lacks) ctx.skip(error.message);
        throw error;
      }
      ctx.equal(result.variant, variant, "variant");
      return result.note;
    },
  }));
  const notANumber = ["auto", "simd_st"].map((variant) => ({
    name: `one NaN in the image of mobilenet_v2 reaches all scores, variant ${variant}`,
    async run() {
      const data = new Float32Array(3 * 224 * 224);
      data[224 * 100 + 100] = NaN;
      const session = await Session.load(ctx.url(`${MODELS}/mobilenet_v2/model.onnx`), { variant });
      try {
        const { logits } = await session.run({ input: { type: "float32", dims: [1, 3, 224, 224], data } });
        ctx.equal(
          logits.data.findIndex((score) => !Number.isNaN(score)),
          -1,
          "first score that is a number",
        );
      } finally {
        await session.dispose();
      }
    },
  }));
  return [...cases, ...everyVariant, ...notANumber];
};
