/**
 * IEEE half precision for JavaScript engines without Float16Array, where float16 tensors hold raw bits.
 */

/** Class of arrays that hold half-precision numbers, when this engine has it. */
type HalfArrayConstructor = {
  new (length: number): HalfArray;
  new (values: ArrayLike<number>): HalfArray;
  new (buffer: ArrayBufferLike, byteOffset?: number, length?: number): HalfArray;
};

/**
 * `Float16Array` where the TypeScript library of the reader knows it, otherwise the members that weblane uses.
 */
export type HalfArray = typeof globalThis extends { Float16Array: { prototype: infer T } }
  ? T & HalfArrayMembers
  : HalfArrayMembers;

interface HalfArrayMembers extends ArrayLike<number> {
  readonly buffer: ArrayBufferLike;
  readonly byteLength: number;
  readonly byteOffset: number;
  readonly BYTES_PER_ELEMENT: number;
  [index: number]: number;
  [Symbol.iterator](): IterableIterator<number>;
}

/** This engine's `Float16Array`, if it has one. */
export function float16Array(): HalfArrayConstructor | undefined {
  return (globalThis as { Float16Array?: HalfArrayConstructor }).Float16Array;
}

/** Whether `data` is a `Float16Array`. */
export function isFloat16Array(data: unknown): data is HalfArray {
  const Half = float16Array();
  return Half !== undefined && data instanceof (Half as unknown as new () => object);
}

/**
 * Numbers to the bits of the nearest half-precision numbers (ties to even), as `uint16`.
 */
export function encodeFloat16(values: ArrayLike<number>): Uint16Array<ArrayBuffer> {
  const out = new Uint16Array(values.length);
  for (let i = 0; i < out.length; i++) out[i] = halfBits(values[i] as number);
  return out;
}

/** The numbers of half-precision bits, exactly. */
export function decodeFloat16(bits: ArrayLike<number>): Float32Array<ArrayBuffer> {
  const out = new Float32Array(bits.length);
  for (let i = 0; i < out.length; i++) {
    const h = bits[i] as number;
    const sign = h & 0x8000 ? -1 : 1;
    const exponent = (h >> 10) & 31;
    const mantissa = h & 0x3ff;
    if (exponent === 31) out[i] = mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
    else if (exponent === 0) out[i] = sign * mantissa * 2 ** -24;
    else out[i] = sign * (1024 + mantissa) * 2 ** (exponent - 25);
  }
  return out;
}

function halfBits(value: number): number {
  if (Number.isNaN(value)) return 0x7e00;
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const x = Math.abs(value);
  // Half of the last place above 65504 rounds to infinity.
  if (x >= 65520) return sign | 0x7c00;
  // Below 2^-14 the step is 2^-24; above, 2^-10 of the leading power of two. log2 may be off by one at a power of
  // two, which the two loops correct.
  let exponent = Math.max(-14, Math.floor(Math.log2(x)));
  while (exponent < 15 && x >= 2 ** (exponent + 1)) exponent++;
  while (exponent > -14 && x < 2 ** exponent) exponent--;
  const steps = roundToEven(x / 2 ** (exponent - 10));
  // A carry out of the mantissa moves into the exponent by plain addition.
  return sign | (((exponent + 14) << 10) + steps);
}

function roundToEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}
