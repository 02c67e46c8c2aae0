/** What the benches of this directory share on Node's side: models, pages, records. */
import { existsSync } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { cpus } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { serve } from "../../tests/wasm/lib/server.mjs";
import { WORKLOADS } from "./workloads.mjs";

const here = dirname(fileURLToPath(import.meta.url));
/** Root of the repository. */
export const root = resolve(here, "../..");

const mirror = process.env.WEBLANE_MODEL_MIRROR ?? resolve(root, "../shared/models");
/** Built models come first, then those of the mirror. */
const folders = { "/built/": join(root, "target/models"), "/mirror/": mirror };

/** Version of an npm package that stands beside weblane here. */
export async function peerVersion(name) {
  return JSON.parse(await readFile(join(here, "node_modules", name, "package.json"), "utf8")).version;
}

/**
 * The wanted workloads whose models are there, as `{ name, inputs, url, file }`, quantised ones with the float model's
 * `float: { url, inputs }`; a line is printed for each that is not.
 *
 * @param {string | undefined} names - comma-separated; all by default
 */
export function findWorkloads(names) {
  const wanted = names?.split(",");
  const unknown = wanted?.filter((name) => !WORKLOADS.some((w) => w.name === name)) ?? [];
  if (unknown.length)
    throw new Error(
      `no such workload: ${unknown.join(", ")}; there are ${WORKLOADS.map((w) => w.name).join(", ")}`,
    );
  const found = [];
  for (const workload of WORKLOADS.filter((w) => !wanted || wanted.includes(w.name))) {
    const at = locate(workload.name);
    if (!at) {
      console.log(`${workload.name.padEnd(20)}  skipped: the model is not built and not in the mirror`);
      continue;
    }
    // Big integers do not pass through JSON.
    const inputs = workload.inputs.map((input) => ({ ...input, kind: String(input.kind) }));
    const float = workload.float && locate(workload.float);
    found.push({ name: workload.name, inputs, ...at, ...(float && { float: { url: float.url, inputs } }) });
  }
  return found;
}

/** Where a model lies, and where the server has it. */
export function locate(name) {
  const folder = Object.entries(folders).find(([, path]) => existsSync(join(path, name, "model.onnx")));
  return folder && { url: `${folder[0]}${name}/model.onnx`, file: join(folder[1], name, "model.onnx") };
}

/** Serves the page, the runtimes and the models. */
export function serveBench(options) {
  return serve(
    {
      "/": join(here, "page"),
      "/weblane/": join(root, "npm"),
      "/ort/": join(here, "node_modules/onnxruntime-web/dist"),
      "/litert/": join(here, "node_modules/@litertjs/core"),
      "/litert-utils/": join(here, "node_modules/@litertjs/wasm-utils"),
      "/tflite/": join(root, "target/models-tflite"),
      ...folders,
    },
    options,
  );
}

/** Opens the page of the benches in a browser of puppeteer's; its functions are in `window.harness`. */
export async function openPage(browser, url) {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(`page: ${error.message}`));
  await page.goto(url);
  await page.waitForFunction("window.createHarness");
  await page.evaluate(async () => {
    window.harness = await window.createHarness();
  });
  return page;
}

/** Four digits are more than any of these measurements has. */
export const round = (x) => Number(x.toPrecision(4));

/** Writes a record: what was measured, where, and the results. */
export async function writeRecord(path, record) {
  const { what, command, browser, ...rest } = record;
  const whole = {
    what,
    command,
    ...(browser && { browser }),
    cpu: cpus()[0].model,
    cores: cpus().length,
    ...rest,
  };
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, `${JSON.stringify(whole, null, 2)}\n`);
  console.log(`record: ${path}`);
}

/**
 * A long table measured in parts: adds the rows of the record that were not measured now, in the order of the list. A row
 * is of a workload, and of a number of threads where they differ.
 */
export async function mergeRows(path, results) {
  if (!existsSync(path)) return;
  const { results: old } = JSON.parse(await readFile(path, "utf8"));
  const measured = (row) => results.some((r) => r.workload === row.workload && r.threads === row.threads);
  results.push(...old.filter((row) => !measured(row)));
  const place = ({ workload }) => WORKLOADS.findIndex(({ name }) => name === workload);
  results.sort((a, b) => (a.threads ?? 0) - (b.threads ?? 0) || place(a) - place(b));
}

/** Where the record of a bench lies. */
export function recordPath(name) {
  return join(root, "benches/records", `${name}.json`);
}
