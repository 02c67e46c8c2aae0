/**
 * A static server with the headers that make a page cross-origin isolated, or without them.
 */
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { join, normalize } from "node:path";
import { lookup } from "mrmime";
import sirv from "sirv";

const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

/**
 * Serves directories until `close` is called.
 *
 * @param {Record<string, string>} mounts - directory by path prefix; prefixes start and end with a slash
 * @param {{ isolated?: boolean, port?: number, cacheControl?: string, fromMemory?: boolean }} [options]
 * @returns {Promise<{ url: string, close(): Promise<void> }>}
 */
export async function serve(
  mounts,
  { isolated = true, port = 0, cacheControl = "no-store", fromMemory = false } = {},
) {
  const setHeaders = (response) => {
    response.setHeader("Cache-Control", cacheControl);
    if (!isolated) return;
    for (const [name, value] of Object.entries(ISOLATION)) response.setHeader(name, value);
  };
  const routes = Object.entries(mounts)
    // The longest prefix that fits wins.
    .sort(([a], [b]) => b.length - a.length)
    .map(([prefix, directory]) => {
      const handle = sirv(directory, { dev: true, setHeaders });
      return { prefix, handle: fromMemory ? inMemory(directory, setHeaders, handle) : handle };
    });

  const server = createServer((request, response) => {
    const missing = () => {
      response.statusCode = 404;
      setHeaders(response);
      response.end("not found");
    };
    const route = routes.find(({ prefix }) => request.url.startsWith(prefix));
    if (!route) return missing();
    request.url = request.url.slice(route.prefix.length - 1);
    route.handle(request, response, missing);
  });
  await new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", resolve);
  });
  return {
    url: `http://localhost:${server.address().port}`,
    close: () =>
      new Promise((resolve) => {
        server.close(resolve);
        server.closeAllConnections();
      }),
  };
}

/**
 * Gives out whole files, from memory after their first time: to read 14 MB piece by piece takes as much of the machine as to
 * send them, and where the server runs on the machine that is measured that counts. `otherwise` handles what is no file.
 */
function inMemory(directory, setHeaders, otherwise) {
  const files = new Map();
  return (request, response, missing) => {
    const path = join(directory, normalize(request.url.split("?")[0]));
    if (!files.has(path)) files.set(path, readFile(path));
    files.get(path).then(
      (bytes) => {
        setHeaders(response);
        response.setHeader("Content-Type", lookup(path) ?? "application/octet-stream");
        response.setHeader("Content-Length", bytes.length);
        response.end(bytes);
      },
      () => otherwise(request, response, missing),
    );
  };
}
