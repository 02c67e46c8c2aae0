/**
 * A static server with the headers that make a page cross-origin isolated, or without them.
 */
import { createServer } from "node:http";
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
 * @param {{ isolated?: boolean, port?: number, cacheControl?: string }} [options]
 * @returns {Promise<{ url: string, close(): Promise<void> }>}
 */
export async function serve(mounts, { isolated = true, port = 0, cacheControl = "no-store" } = {}) {
  const setHeaders = (response) => {
    response.setHeader("Cache-Control", cacheControl);
    if (!isolated) return;
    for (const [name, value] of Object.entries(ISOLATION)) response.setHeader(name, value);
  };
  const routes = Object.entries(mounts)
    // The longest prefix that fits wins.
    .sort(([a], [b]) => b.length - a.length)
    .map(([prefix, directory]) => ({ prefix, handle: sirv(directory, { dev: true, setHeaders }) }));

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
