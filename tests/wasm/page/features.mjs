/**
 * What the engine has, found without the package under test.
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

/** Whether the engine has 128-bit SIMD. */
export const simd = () => WebAssembly.validate(new Uint8Array(SIMD));

/** Whether the engine has relaxed SIMD. */
export const relaxedSimd = () => WebAssembly.validate(new Uint8Array(RELAXED));
