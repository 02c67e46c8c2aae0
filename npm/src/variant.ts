/**
 * Which of the four WebAssembly builds fits this engine, and with how many threads.
 */
import { nodeModule } from "./environment.js";
import { WeblaneError } from "./errors.js";

/** The builds, best first: relaxed SIMD or SIMD128, each with threads (`mt`) or for a single thread (`st`). */
export const VARIANTS = ["relaxed_mt", "relaxed_st", "simd_mt", "simd_st"] as const;

/** Name of a WebAssembly build. */
export type Variant = (typeof VARIANTS)[number];

/** What the engine around us can do. */
export interface Platform {
  /** Fixed-width 128-bit SIMD. */
  readonly simd: boolean;
  /** The relaxed SIMD instructions. */
  readonly relaxedSimd: boolean;
  /** Shared memory may be posted between workers. */
  readonly sharedMemory: boolean;
  /** The page is cross-origin isolated, or there is no such thing here. */
  readonly isolated: boolean;
  /** Logical processors. */
  readonly processors: number;
}

/** What the caller asks for. */
export interface VariantRequest {
  /** Number of threads; 0 or none for the default. */
  readonly threads?: number | undefined;
  /** A certain build, or `"auto"`. */
  readonly variant?: Variant | "auto" | undefined;
}

/** A build, a number of threads, and a sentence for each that says why. */
export interface VariantChoice {
  readonly variant: Variant;
  readonly variantReason: string;
  readonly threads: number;
  readonly threadsReason: string;
}

/** More threads than this rarely help one model, and they cost memory. */
export const DEFAULT_MAX_THREADS = 8;

const HEADER = [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0];
// (module (func (result v128)  i32.const 0  i8x16.splat  i8x16.popcnt))
const SIMD_PROBE = [1, 5, 1, 0x60, 0, 1, 0x7b, 3, 2, 1, 0, 10, 10, 1, 8, 0, 0x41, 0, 0xfd, 15, 0xfd, 98, 11];
// (module (func (result v128)  i32.const 1  i8x16.splat  i32.const 2  i8x16.splat  i8x16.relaxed_swizzle))
const RELAXED_PROBE = [
  1, 5, 1, 0x60, 0, 1, 0x7b, 3, 2, 1, 0, 10, 15, 1, 13, 0, 0x41, 1, 0xfd, 15, 0x41, 2, 0xfd, 15, 0xfd, 0x80,
  2, 11,
];

/** Asks the engine around us what it can do. */
export function detectPlatform(): Platform {
  const validates = (body: number[]) =>
    typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array([...HEADER, ...body]));
  return {
    simd: validates(SIMD_PROBE),
    relaxedSimd: validates(RELAXED_PROBE),
    sharedMemory: canShareMemory(),
    isolated: globalThis.crossOriginIsolated !== false,
    // Node.js has a navigator only since version 21.
    processors:
      globalThis.navigator?.hardwareConcurrency ?? nodeModule("node:os")?.availableParallelism() ?? 1,
  };
}

function canShareMemory(): boolean {
  // Browsers keep the constructor but refuse to post shared memory unless the page is isolated; Node.js has no such flag.
  if (typeof SharedArrayBuffer === "undefined" || globalThis.crossOriginIsolated === false) return false;
  try {
    return (
      new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true }).buffer instanceof SharedArrayBuffer
    );
  } catch {
    return false;
  }
}

/**
 * Chooses a build and a number of threads.
 *
 * @throws WeblaneError `unsupported_platform` when the engine lacks SIMD or what a requested build needs;
 * `invalid_option` for options out of range.
 */
export function chooseVariant(platform: Platform, request: VariantRequest = {}): VariantChoice {
  const { threads: wanted = 0, variant: asked = "auto" } = request;
  if (!Number.isSafeInteger(wanted) || wanted < 0 || wanted > 1024) {
    throw new WeblaneError(
      "invalid_option",
      `threads must be a whole number from 0 (automatic) to 1024, not ${wanted}`,
    );
  }
  if (asked !== "auto" && !VARIANTS.includes(asked)) {
    throw new WeblaneError(
      "invalid_option",
      `variant must be "auto" or one of ${VARIANTS.join(", ")}, not ${JSON.stringify(asked)}`,
    );
  }
  if (!platform.simd) {
    throw new WeblaneError(
      "unsupported_platform",
      "this browser has no WebAssembly SIMD; Chrome 91, Firefox 89, Safari 16.4 and later have it",
    );
  }
  if (asked.startsWith("relaxed") && !platform.relaxedSimd) {
    throw new WeblaneError(
      "unsupported_platform",
      `variant ${asked} was asked for, but this engine has no relaxed SIMD`,
    );
  }
  if (asked.endsWith("_mt") && !platform.sharedMemory) {
    throw new WeblaneError(
      "unsupported_platform",
      `variant ${asked} was asked for, but ${notShared(platform)}`,
    );
  }
  const [threads, threadsReason] = chooseThreads(platform, wanted, asked);
  if (asked !== "auto") {
    return { variant: asked, variantReason: "this build was asked for", threads, threadsReason };
  }
  const simd = platform.relaxedSimd ? "relaxed" : "simd";
  return {
    variant: `${simd}_${threads > 1 ? "mt" : "st"}`,
    variantReason: platform.relaxedSimd
      ? "this engine has relaxed SIMD"
      : "this engine has SIMD128 but no relaxed SIMD",
    threads,
    threadsReason,
  };
}

function notShared({ isolated }: Platform): string {
  const why = isolated
    ? "this browser has no shared memory for WebAssembly"
    : "the page is not cross-origin isolated (serve it with the headers Cross-Origin-Opener-Policy: same-origin " +
      "and Cross-Origin-Embedder-Policy: require-corp)";
  return `memory cannot be shared between threads here: ${why}`;
}

function chooseThreads(platform: Platform, wanted: number, asked: Variant | "auto"): [number, string] {
  if (asked.endsWith("_st")) return [1, `the build ${asked} has one thread`];
  if (!platform.sharedMemory) return [1, notShared(platform)];
  if (wanted > 0) return [wanted, "this number was asked for"];
  const threads = Math.max(1, Math.min(platform.processors, DEFAULT_MAX_THREADS));
  return [
    threads,
    threads === platform.processors
      ? "one per logical processor"
      : `${platform.processors} logical processors, at most ${DEFAULT_MAX_THREADS} are used unless asked for`,
  ];
}
