import { availableParallelism } from "node:os";
import { expect, test } from "vitest";
import { chooseVariant, detectPlatform, type Platform } from "../src/variant.js";

const chrome: Platform = {
  simd: true,
  relaxedSimd: true,
  sharedMemory: true,
  isolated: true,
  processors: 16,
};

test("the best build for the platform is chosen", () => {
  const chosen = (platform: Partial<Platform>, request = {}) => {
    const { variant, threads } = chooseVariant({ ...chrome, ...platform }, request);
    return `${variant} ${threads}`;
  };
  expect(chosen({})).toBe("relaxed_mt 8");
  expect(chosen({}, { threads: 12 })).toBe("relaxed_mt 12");
  expect(chosen({}, { threads: 1 })).toBe("relaxed_st 1");
  expect(chosen({ processors: 2 })).toBe("relaxed_mt 2");
  expect(chosen({ processors: 1 })).toBe("relaxed_st 1");
  expect(chosen({ sharedMemory: false })).toBe("relaxed_st 1");
  expect(chosen({ sharedMemory: false }, { threads: 4 })).toBe("relaxed_st 1");
  expect(chosen({ relaxedSimd: false })).toBe("simd_mt 8");
  expect(chosen({ relaxedSimd: false, sharedMemory: false })).toBe("simd_st 1");
  expect(chosen({}, { variant: "simd_st", threads: 4 })).toBe("simd_st 1");
  expect(chosen({}, { variant: "simd_mt", threads: 3 })).toBe("simd_mt 3");
});

test("reasons are sentences about what was found", () => {
  const here = chooseVariant({ ...chrome, sharedMemory: false, isolated: false, relaxedSimd: false });
  expect(here.variantReason).toContain("no relaxed SIMD");
  expect(here.threadsReason).toContain("Cross-Origin-Opener-Policy");
  // WebKitGTK isolates pages but has no SharedArrayBuffer; headers would not help there.
  expect(chooseVariant({ ...chrome, sharedMemory: false }).threadsReason).toContain("no shared memory");
});

test("what cannot run is refused", () => {
  const code = (platform: Partial<Platform>, request = {}) => {
    try {
      chooseVariant({ ...chrome, ...platform }, request);
    } catch (error) {
      return (error as { code: string }).code;
    }
    return "nothing was thrown";
  };
  expect(code({ simd: false })).toBe("unsupported_platform");
  expect(code({ relaxedSimd: false }, { variant: "relaxed_st" })).toBe("unsupported_platform");
  expect(code({ sharedMemory: false }, { variant: "simd_mt" })).toBe("unsupported_platform");
  for (const threads of [-1, 0.5, Number.NaN, 1e6]) expect(code({}, { threads })).toBe("invalid_option");
  expect(code({}, { variant: "best" })).toBe("invalid_option");
});

test("the probes are well-formed", () => {
  // Every Node.js that runs this has SIMD; a malformed probe would say no. Relaxed SIMD came with V8 11.4.
  const [major = 0, minor = 0] = process.versions.v8.split(".").map(Number);
  const platform = detectPlatform();
  expect(platform.simd).toBe(true);
  expect(platform.sharedMemory).toBe(true);
  expect(platform.processors).toBe(availableParallelism());
  expect(platform.relaxedSimd).toBe(major > 11 || (major === 11 && minor >= 4));
});
