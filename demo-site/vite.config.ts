import { resolve } from "node:path";
import { defineConfig } from "vite";

// Threads need shared memory, which browsers give to isolated pages only.
const headers = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

export default defineConfig({
  base: "./",
  server: { headers },
  preview: { headers },
  worker: { format: "es" },
  // The pre-bundler of the development server would move the package's worker away from its WebAssembly files.
  optimizeDeps: { exclude: ["weblane"] },
  build: {
    target: "es2022",
    rollupOptions: {
      input: ["index.html", "digits.html", "model.html"].map((page) => resolve(import.meta.dirname, page)),
    },
  },
});
