/**
 * Runs the cases in one place and prints a table.
 *
 *     node run.mjs --browser chromium|firefox|webkit|node [--mode isolated|plain] [--cases FILE,...]
 *                  [--match REGEX] [--json REPORT] [--package DIRECTORY] [--quiet]
 *
 * Without --cases every file of cases/ runs, except conformance, which has a command of its own.
 */
import { readdir, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { delay, startDriver } from "./lib/drivers.mjs";
import { serve } from "./lib/server.mjs";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const ROOT = resolve(HERE, "../..");
const OWN_COMMAND = ["conformance"];

const { values: options } = parseArgs({
  options: {
    browser: { type: "string" },
    mode: { type: "string", default: "isolated" },
    cases: { type: "string" },
    match: { type: "string" },
    json: { type: "string" },
    package: { type: "string", default: resolve(ROOT, "npm") },
    quiet: { type: "boolean", default: false },
  },
});
if (!["chromium", "firefox", "webkit", "node"].includes(options.browser)) {
  throw new Error("--browser must be chromium, firefox, webkit or node");
}
const files =
  options.cases?.split(",") ??
  (await readdir(resolve(HERE, "cases")))
    .filter((name) => name.endsWith(".mjs"))
    .map((name) => name.slice(0, -4))
    .filter((name) => !OWN_COMMAND.includes(name));

const server = await serve(
  {
    "/": resolve(HERE, "page"),
    "/page/": resolve(HERE, "page"),
    "/cases/": resolve(HERE, "cases"),
    "/package/": resolve(options.package),
    "/target/": resolve(ROOT, "target"),
    // Pictures and speech that are not part of the project; cases that want them skip where they are missing.
    "/samples/": process.env.WEBLANE_SAMPLES ?? resolve(ROOT, "../shared/samples"),
  },
  { isolated: options.mode === "isolated" },
);
const config = { engine: options.browser, mode: options.mode, base: server.url, files };
let driver;
let results = [];
try {
  driver = await startDriver(options.browser, {
    url: `${server.url}/`,
    packageDirectory: resolve(options.package),
  });
  console.log(`   ${driver.version}, ${options.mode}`);
  results = await runAll();
} finally {
  await driver?.close();
  await server.close();
}

const count = (status) => results.filter((result) => result.status === status).length;
const summary = `${count("pass")} passed, ${count("fail")} failed, ${count("skip")} skipped`;
console.log(`   ${driver.version}, ${options.mode}: ${summary}`);
if (options.json) {
  const report = { engine: options.browser, version: driver.version, mode: options.mode, results };
  await writeFile(options.json, `${JSON.stringify(report, null, 1)}\n`);
}
// Worker threads of an abandoned case would keep Node alive.
process.exit(count("fail") > 0 || count("pass") === 0 ? 1 : 0);

function start() {
  return startDriver(options.browser, { url: `${server.url}/`, packageDirectory: resolve(options.package) });
}

async function runAll() {
  const pattern = new RegExp(options.match ?? "");
  await openPage();
  const cases = await driver.call("list");
  const results = [];
  for (const [index, { name, timeout }] of cases.entries()) {
    if (!pattern.test(name)) continue;
    let result;
    try {
      result = await within(timeout, driver.call("run", index));
    } catch (error) {
      // The page hangs or is gone: the other cases get a new one.
      result = { status: "fail", message: String(error.message ?? error), ms: timeout * 1000 };
      await openPage();
    }
    results.push({ name, ...result });
    print(name, result);
  }
  return results;
}

async function openPage() {
  try {
    await driver.open();
  } catch (error) {
    // Not only the page but the whole browser is gone.
    console.error(`   ${error.message}; starting ${options.browser} again`);
    await driver.close();
    driver = await start();
    await driver.open();
  }
  await within(120, driver.call("create", config));
}

async function within(seconds, promise) {
  // A call that loses the race may still fail later, when its page is closed.
  promise.catch(() => {});
  const late = delay(seconds * 1000).then(() => {
    throw new Error(`no answer within ${seconds} s`);
  });
  late.catch(() => {});
  return Promise.race([promise, late]);
}

function print(name, { status, message, ms }) {
  if (options.quiet && status !== "fail") return;
  const lines = options.quiet ? message.split("\n")[0] : message;
  console.log(`   ${status.padEnd(4)} ${ms.toFixed(0).padStart(6)} ms  ${name}${lines ? `: ${lines}` : ""}`);
}
