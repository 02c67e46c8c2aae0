/**
 * One way to drive every place in which cases run. A driver is
 * `{ version, open(), call(name, args), close() }`: `open` loads the test page anew, `call("create", config)` makes the
 * harness there and `call("list")`, `call("run", index)` use it.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createServer } from "node:net";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";
import { Builder, Capabilities } from "selenium-webdriver";

/** No single call may take longer than this; cases have tighter limits of their own. */
const CALL_LIMIT_MS = 15 * 60_000;

function program(variable) {
  const path = process.env[variable];
  if (!path)
    throw new Error(`${variable} is not set: run this through cargo xtask, or set it to the program`);
  return path;
}

/** Runs in the page. Must not refer to anything outside itself. */
async function inPage(name, argument) {
  if (name === "create") {
    while (!window.createHarness) await new Promise((resolve) => setTimeout(resolve, 10));
    window.harness = await window.createHarness(argument);
    return null;
  }
  return window.harness[name](argument);
}

/**
 * Chromium or Firefox through puppeteer. `userDataDir` is a profile that outlives it; by default it has a fresh one.
 * `networkEnabled: false` leaves out the events of the network.
 */
export async function launchPuppeteer(engine, { userDataDir, networkEnabled } = {}) {
  const chromium = engine === "chromium";
  const root = process.getuid?.() === 0;
  return puppeteer.launch({
    browser: chromium ? "chrome" : "firefox",
    executablePath: program(chromium ? "WEBLANE_CHROMIUM" : "WEBLANE_FIREFOX"),
    headless: true,
    userDataDir,
    networkEnabled,
    protocolTimeout: CALL_LIMIT_MS,
    // Chromium's sandbox does not start as root, as in containers.
    args: chromium ? ["--disable-gpu", "--disable-dev-shm-usage", ...(root ? ["--no-sandbox"] : [])] : [],
  });
}

async function puppeteerDriver(engine, url, quiet) {
  const browser = await launchPuppeteer(engine);
  let page;
  return {
    version: await browser.version(),
    async open() {
      // A page that hangs cannot be navigated, but it can be left.
      const old = page;
      page = await browser.newPage();
      page.on("pageerror", (error) => console.error(`page: ${error.message}`));
      page.on("console", (message) => {
        if (!quiet && ["error", "warn"].includes(message.type())) console.error(`page: ${message.text()}`);
      });
      if (old) await Promise.race([old.close().catch(() => {}), delay(2000)]);
      await page.goto(url);
    },
    call: (name, argument) => page.evaluate(inPage, name, argument ?? null),
    async close() {
      await Promise.race([browser.close().catch(() => {}), delay(5000)]);
      browser.process()?.kill("SIGKILL");
    },
  };
}

/** A driver process of its own group, since xvfb-run and dbus-run-session start more processes. */
async function webkitDriver(url) {
  const port = await freePort();
  const child = spawn(
    program("WEBLANE_XVFB_RUN"),
    ["-a", program("WEBLANE_DBUS_RUN"), "--", program("WEBLANE_WEBKITDRIVER"), `--port=${port}`],
    { detached: true, stdio: "ignore" },
  );
  const end = async () => {
    if (child.exitCode !== null) return;
    const ended = once(child, "exit");
    try {
      process.kill(-child.pid, "SIGTERM");
    } catch {
      return;
    }
    await Promise.race([ended, delay(5000)]);
  };
  const options = { binary: program("WEBLANE_MINIBROWSER"), args: ["--automation"] };
  const capabilities = new Capabilities({ browserName: "MiniBrowser", "webkitgtk:browserOptions": options });
  let driver;
  const connect = async () => {
    for (let attempt = 0; ; attempt++) {
      try {
        driver = await new Builder()
          .usingServer(`http://127.0.0.1:${port}`)
          .withCapabilities(capabilities)
          .build();
        await driver.manage().setTimeouts({ script: CALL_LIMIT_MS, pageLoad: 60_000 });
        return;
      } catch (error) {
        // The display and the bus take a moment to come up.
        if (attempt === 40 || child.exitCode !== null) throw error;
        await delay(500);
      }
    }
  };
  try {
    await connect();
  } catch (error) {
    await end();
    throw error;
  }
  const found = await driver.getCapabilities();
  return {
    version: `WebKitGTK ${found.get("browserVersion")}`,
    open: () => driver.get(url),
    async call(name, argument) {
      const script = `const [name, argument, done] = arguments;
        (${inPage})(name, argument).then((value) => done({ value }), (error) => done({ error: String(error) }));`;
      const { value, error } = await driver.executeAsyncScript(script, name, argument ?? null);
      if (error) throw new Error(error);
      return value;
    },
    async close() {
      await Promise.race([driver.quit().catch(() => {}), delay(5000)]);
      await end();
    },
  };
}

/** Node itself, with the package imported from its files. */
async function nodeDriver(packageDirectory) {
  const { Harness } = await import("../page/harness.mjs");
  const load = (path) => import(pathToFileURL(`${packageDirectory}/${path}`).href);
  const packages = {
    weblane: await load("dist/index.js"),
    ort: await load("dist/ort.js"),
    quantizing: await load("dist/quantize.js"),
  };
  let harness;
  return {
    version: `Node ${process.version}`,
    open: async () => {},
    async call(name, argument) {
      if (name !== "create") return harness[name](argument);
      harness = await Harness.load(packages, (file) => import(`../cases/${file}.mjs`), argument);
    },
    close: async () => {},
  };
}

/** The driver of an engine by name. With `quiet` only uncaught errors of a page are shown, not what it logs. */
export function startDriver(engine, { url, packageDirectory, quiet = false }) {
  if (engine === "node") return nodeDriver(packageDirectory);
  if (engine === "webkit") return webkitDriver(url);
  return puppeteerDriver(engine, url, quiet);
}

export function delay(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}
