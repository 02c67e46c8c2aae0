/**
 * Bundles src/worker.ts and wasm-bindgen's modules (build/<variant>/weblane_web.js) into dist/worker.js: one file,
 * so that every bundler of an application has a single worker to handle.
 *
 * WEBLANE_VARIANTS=simd_st,... limits the builds that must be there; the others answer that they are missing.
 */
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const ALL = ["simd_st", "simd_mt", "relaxed_st", "relaxed_mt"];
const wanted = process.env.WEBLANE_VARIANTS?.split(",") ?? ALL;
const unknown = wanted.filter((variant) => !ALL.includes(variant));
if (unknown.length > 0) throw new Error(`WEBLANE_VARIANTS names unknown builds: ${unknown.join(", ")}`);

const fileOf = (variant) => join(root, "build", variant, "weblane_web.js");

/** @type {import("esbuild").Plugin} */
const glue = {
  name: "wasm-bindgen-glue",
  setup({ onResolve, onLoad }) {
    onResolve({ filter: /^glue:/ }, ({ path }) => ({ path: path.slice("glue:".length), namespace: "glue" }));
    onLoad({ filter: /.*/, namespace: "glue" }, ({ path: variant }) => {
      if (!wanted.includes(variant)) return { contents: "export default null;" };
      if (!existsSync(fileOf(variant))) {
        return { errors: [{ text: `${fileOf(variant)} is missing; \`cargo xtask build\` makes it` }] };
      }
      // Builds that differ in their instructions only have the same module, which is bundled, and parsed, once.
      const text = readFileSync(fileOf(variant), "utf8");
      const file = wanted.map(fileOf).find((file) => existsSync(file) && readFileSync(file, "utf8") === text);
      const contents = `import * as glue from ${JSON.stringify(file)}; export default glue;`;
      return { contents, resolveDir: root };
    });
    // The worker always passes a compiled module; wasm-bindgen's default address would only mislead bundlers.
    onLoad({ filter: /weblane_web\.js$/ }, ({ path }) => ({
      contents: readFileSync(path, "utf8").replace(
        /new URL\(["'][^"']*\.wasm["'], import\.meta\.url\)/g,
        "undefined",
      ),
    }));
    // See src/pool.ts.
    onResolve({ filter: /workerHelpers(\.no-bundler)?\.js$/ }, () => ({
      path: join(root, "src", "pool.ts"),
    }));
  },
};

await build({
  entryPoints: [join(root, "src", "worker.ts")],
  outfile: join(root, "dist", "worker.js"),
  bundle: true,
  format: "esm",
  target: "es2022",
  minifySyntax: true,
  minifyWhitespace: true,
  legalComments: "none",
  plugins: [glue],
});
