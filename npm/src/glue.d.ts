/** What the build puts in the place of `glue:<variant>`: wasm-bindgen's module, or `null` if that build is missing. */
declare module "glue:*" {
  const glue: import("./wasm.js").Glue | null;
  export default glue;
}
