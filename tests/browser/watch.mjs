// Opens an EventSource in a real Chromium, on a page of the given origin, and prints a JSON line for whatever it says.
// Fetches, on that page, what it reads from its standard input (a JSON line [URL, OPTIONS]), and ends when that does.
// Every name below example.com is this machine.
//
//   node watch.mjs ORIGIN URL [TYPE ...]
import { createInterface } from "node:readline";
import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [origin, url, ...types] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync", "--host-resolver-rules=MAP *.example.com 127.0.0.1"],
});
const page = await (await browser.newContext({ ignoreHTTPSErrors: true })).newPage();
await page.exposeFunction("say", (what) => process.stdout.write(JSON.stringify(what) + "\n"));
await page.goto(origin);
await page.evaluate(
  ([url, types]) => {
    const source = new EventSource(url);
    const event = ({ type, lastEventId, data }) => window.say({ event: type, id: lastEventId, data });
    source.onopen = () => window.say({ state: "open" });
    source.onerror = () => window.say({ state: source.readyState === EventSource.CLOSED ? "closed" : "reconnecting" });
    for (const type of ["message", ...types]) source.addEventListener(type, event);
  },
  [url, types],
);
const lines = createInterface({ input: process.stdin });
lines.on("line", async (line) => {
  const fetched = await page.evaluate(async ([url, options]) => {
    try {
      const response = await fetch(url, options);
      return { status: response.status, id: response.headers.get("X-Request-Id"), body: await response.text() };
    } catch (error) {
      return { error: error.name };
    }
  }, JSON.parse(line));
  process.stdout.write(JSON.stringify({ fetched }) + "\n");
});
lines.on("close", () => browser.close().then(() => process.exit(0)));
