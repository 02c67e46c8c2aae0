/**
 * The JSON form of tensors that goldens and conformance cases share, and the comparison both use.
 * The form is described in models/tensors.py.
 */

const TYPES = {
  float: "float32",
  double: "float64",
  float16: "float16",
  bfloat16: "bfloat16",
  int8: "int8",
  uint8: "uint8",
  int16: "int16",
  uint16: "uint16",
  int32: "int32",
  uint32: "uint32",
  int64: "int64",
  uint64: "uint64",
  bool: "bool",
  string: "string",
};

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
};

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** A feed for `Session.run` from a JSON tensor; float16 and bfloat16 as bits. */
export function decode({ dtype, dims, b64, strings }) {
  const type = TYPES[dtype];
  if (!type) throw new Error(`the API has no tensor type for ONNX's ${dtype}`);
  const data = type === "string" ? strings : new ARRAYS[type](bytesOf(b64).buffer);
  return { type, data, dims };
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

const FLOAT = new Float32Array(1);
const BITS = new Uint32Array(FLOAT.buffer);

function toNumbers(type, data) {
  if (type === "float16" && data instanceof Uint16Array) return Float64Array.from(data, halfToNumber);
  if (type === "bfloat16") {
    return Float64Array.from(data, (bits) => {
      BITS[0] = bits << 16;
      return FLOAT[0];
    });
  }
  return data;
}

/** The angle between two outputs as a cosine, for quantised models. */
function cosine(a, b) {
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return ab / Math.sqrt(aa * bb);
}

/**
 * Throws unless type and shape are the same and every |got - want| <= atol + rtol * |want|. NaN equals NaN,
 * infinities are equal by sign; integers, booleans and strings are compared with the tolerance of the case too,
 * except 64-bit integers, which must be equal. Where the golden has a `cosine`, that of both must be at least so large, and
 * nothing else counts. Returns the largest difference.
 */
export function compare(got, want, { rtol, atol, cosine: least }, what) {
  const fail = (text) => {
    throw new Error(`${what}: ${text}`);
  };
  if (!got) fail("missing");
  if (got.type !== want.type) fail(`type ${got.type}, wanted ${want.type}`);
  if (got.dims.length !== want.dims.length || got.dims.some((d, i) => d !== want.dims[i])) {
    fail(`dims [${got.dims.join(", ")}], wanted [${want.dims.join(", ")}]`);
  }
  const [a, b] = [toNumbers(got.type, got.data), toNumbers(want.type, want.data)];
  if (a.length !== b.length) fail(`${a.length} elements, wanted ${b.length}`);
  if (least !== undefined) {
    const met = cosine(a, b);
    if (!(met >= least)) fail(`the cosine is ${met}, at least ${least} was wanted`);
  }
  const exact = want.type === "string" || want.type === "int64" || want.type === "uint64";
  let largest = 0;
  let wrong = 0;
  let first = "";
  for (let i = 0; i < a.length; i++) {
    if (a[i] === b[i]) continue;
    let off = true;
    if (!exact) {
      if (Number.isNaN(a[i]) && Number.isNaN(b[i])) continue;
      const difference = Math.abs(a[i] - b[i]);
      off = least === undefined && !(difference <= atol + rtol * Math.abs(b[i]) && Number.isFinite(b[i]));
      if (difference > largest) largest = difference;
    }
    if (off && wrong++ === 0) first = `element ${i} is ${a[i]}, wanted ${b[i]}`;
  }
  if (wrong) fail(`${wrong} of ${a.length} elements differ; ${first}; largest difference ${largest}`);
  return largest;
}
