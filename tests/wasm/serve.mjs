/**
 * Serves one directory: node serve.mjs [--port N] [--plain] DIRECTORY
 */
import { parseArgs } from "node:util";
import { serve } from "./lib/server.mjs";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { port: { type: "string", default: "8080" }, plain: { type: "boolean", default: false } },
});
if (positionals.length !== 1) throw new Error("usage: node serve.mjs [--port N] [--plain] DIRECTORY");
const { url } = await serve({ "/": positionals[0] }, { port: Number(values.port), isolated: !values.plain });
console.log(`serving on ${url}/ - end with Ctrl+C`);
