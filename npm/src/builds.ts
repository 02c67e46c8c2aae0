/**
 * The WebAssembly files, and how they are compiled: on the page while the worker starts, else in the worker.
 */
import { fetchOk, nodeModule, readNodeFile } from "./environment.js";
import { toWeblaneError } from "./errors.js";
import { chooseVariant, detectPlatform, type Variant, type VariantRequest } from "./variant.js";

/** The address of each build, beside this module. Bundlers recognise exactly these expressions. */
const ADDRESSES: Readonly<Record<Variant, URL>> = {
  simd_st: new URL("./weblane_simd_st.wasm", import.meta.url),
  simd_mt: new URL("./weblane_simd_mt.wasm", import.meta.url),
  relaxed_st: new URL("./weblane_relaxed_st.wasm", import.meta.url),
  relaxed_mt: new URL("./weblane_relaxed_mt.wasm", import.meta.url),
};

/** Fetches and compiles a build, from `address` if the caller has put it elsewhere. */
export async function compileBuild(
  variant: Variant,
  address: string | undefined,
): Promise<WebAssembly.Module> {
  const url = address === undefined ? ADDRESSES[variant] : new URL(address);
  try {
    if (url.protocol === "file:" && nodeModule("node:fs"))
      return await WebAssembly.compile(await readNodeFile(url));
    // The streaming form is what browsers keep compiled code of.
    const response = await fetchOk(url.href);
    const type = response.headers.get("content-type") ?? "";
    if (type.startsWith("application/wasm")) return await WebAssembly.compileStreaming(response);
    return await WebAssembly.compile(await response.arrayBuffer());
  } catch (error) {
    throw toWeblaneError(error, "unsupported_platform", `${url} could not be compiled: `);
  }
}

/** A build that the page has begun to compile. */
export interface EarlyBuild {
  readonly variant: Variant;
  /** `undefined` when that failed. The worker then tries by itself: what a page may not do a worker may, and it reports. */
  readonly module: Promise<WebAssembly.Module | undefined>;
}

/** Begins to compile the build that a worker of this page will choose; nothing where there is no page. */
export function compileEarly(
  request: VariantRequest,
  addresses: Readonly<Partial<Record<Variant, string>>>,
): EarlyBuild | undefined {
  if (nodeModule("node:worker_threads") !== undefined) return undefined;
  try {
    const { variant } = chooseVariant(detectPlatform(), request);
    const module = compileBuild(variant, addresses[variant]).catch(() => undefined);
    return { variant, module };
  } catch {
    // The worker makes the same choice and says what is wrong with it.
    return undefined;
  }
}
