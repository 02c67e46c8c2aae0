/**
 * Whether each shipped binary is accepted by the engine, and whether the right one is chosen.
 */

/** A module whose only function uses `i8x16.relaxed_swizzle`: valid exactly where relaxed SIMD is there. */
const RELAXED = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 15, 1, 13, 0, 65, 1, 253, 15, 65, 2,
  253, 15, 253, 128, 2, 11,
];
/** The same with `i8x16.popcnt` of plain SIMD. */
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98,
  11,
];

const valid = (bytes) => WebAssembly.validate(new Uint8Array(bytes));

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
      const found = { simd: valid(SIMD), relaxed: valid(RELAXED) };
      for (const [key, want] of Object.entries(EXPECTED[ctx.engine])) ctx.equal(found[key], want, key);
      return `simd ${found.simd}, relaxed simd ${found.relaxed}, isolated ${ctx.isolated}`;
    },
  },
  ...VARIANTS.map((variant) => ({
    name: `binary ${variant} is valid where its instructions are`,
    async run(ctx) {
      const bytes = await ctx.fetchBytes(`/package/dist/weblane_${variant}.wasm`);
      const want = variant.startsWith("relaxed") ? valid(RELAXED) : valid(SIMD);
      ctx.equal(WebAssembly.validate(bytes), want, `${variant} accepted`);
      return `${bytes.length} bytes`;
    },
  })),
];
