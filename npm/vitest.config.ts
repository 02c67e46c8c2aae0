import { defineConfig } from "vitest/config";

// Generous, since machines that build at the same time are slow: a test fails by what it finds, not by its time.
export default defineConfig({ test: { testTimeout: 120_000 } });
