// Opens an EventSource in a real Chromium, on a page of the given origin, and prints a JSON line for whatever it says.
// Ends when its standard input does.
//
//   node watch.mjs ORIGIN PATH [TYPE ...]
import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [origin, path, ...types] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"],
});
const page = await (await browser.newContext({ ignoreHTTPSErrors: true })).newPage();
await page.exposeFunction("say", (what) => process.stdout.write(JSON.stringify(what) + "\n"));
await page.goto(origin);
await page.evaluate(
  ([path, types]) => {
    const source = new EventSource(path);
    const event = ({ type, lastEventId, data }) => window.say({ event: type, id: lastEventId, data });
    source.onopen = () => window.say({ state: "open" });
    source.onerror = () => window.say({ state: source.readyState === EventSource.CLOSED ? "closed" : "reconnecting" });
    for (const type of ["message", ...types]) source.addEventListener(type, event);
  },
  [path, types],
);
process.stdin.resume();
process.stdin.on("end", () => browser.close().then(() => process.exit(0)));
