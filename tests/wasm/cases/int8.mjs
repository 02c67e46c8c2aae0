/**
 * Products of 8-bit integers have the same bits in every engine and in every form that is exact there. The digest is that
 * of the native tests, see kernels/src/int8/digest.rs.
 */
const DIGEST = 4_238_780_685_819_252_297n;
const FORMS = ["i16", "u8s8 split", "u8s8", "s8s8"];

/** The build's own exports, without its glue: the digest calls nothing from outside. */
async function exportsOf(ctx, variant) {
  const bytes = await ctx.fetchBytes(`/package/dist/weblane_${variant}.wasm`);
  if (!WebAssembly.validate(bytes)) ctx.skip(`no engine for ${variant}`);
  const module = await WebAssembly.compile(bytes);
  const imports = {};
  for (const { module: from, name } of WebAssembly.Module.imports(module)) {
    imports[from] ??= {};
    imports[from][name] = () => {
      throw new Error(`${from}.${name} was called`);
    };
  }
  return (await WebAssembly.instantiate(module, imports)).exports;
}

export default ["simd_st", "relaxed_st"].map((variant) => ({
  name: `8-bit products of ${variant} have the digest of the native ones`,
  timeout: 120,
  async run(ctx) {
    const { int8Digest } = await exportsOf(ctx, variant);
    const digests = FORMS.map((_, form) => BigInt.asUintN(64, int8Digest(form)));
    ctx.equal(digests[0], DIGEST, FORMS[0]);
    const exact = FORMS.filter((_, form) => digests[form] !== 0n);
    for (const form of exact) ctx.equal(digests[FORMS.indexOf(form)], DIGEST, form);
    return `exact: ${exact.join(", ")}`;
  },
}));
