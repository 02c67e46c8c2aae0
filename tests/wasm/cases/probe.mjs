/**
 * Whether each shipped binary is accepted by the engine, and whether the right one is chosen.
 */
import { relaxedSimd, simd } from "../page/features.mjs";

/** What each engine of the project is known to have; another answer means that tests run in the wrong browser. */
const EXPECTED = {
  chromium: { simd: true, relaxed: true },
  firefox: { simd: true, relaxed: true },
  webkit: { simd: true },
  node: { simd: true },
};

const VARIANTS = ["simd_st", "simd_mt", "relaxed_st", "relaxed_mt"];

export default [
  {
    name: "engine has the instruction sets it should have",
    run(ctx) {
      const found = { simd: simd(), relaxed: relaxedSimd() };
      for (const [key, want] of Object.entries(EXPECTED[ctx.engine])) ctx.equal(found[key], want, key);
      return `simd ${found.simd}, relaxed simd ${found.relaxed}, isolated ${ctx.isolated}`;
    },
  },
  ...VARIANTS.map((variant) => ({
    name: `binary ${variant} is valid where its instructions are`,
    async run(ctx) {
      const bytes = await ctx.fetchBytes(`/package/dist/weblane_${variant}.wasm`);
      const want = variant.startsWith("relaxed") ? relaxedSimd() : simd();
      ctx.equal(WebAssembly.validate(bytes), want, `${variant} accepted`);
      return `${bytes.length} bytes`;
    },
  })),
];
