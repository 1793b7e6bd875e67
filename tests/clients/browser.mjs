// Runs streams in the pages of a real browser: Chromium, driven by Playwright, or Firefox as it is, driven by WebDriver
// BiDi. NODE_PATH names the packages. Reads and writes one JSON object a line, as tests/clients/drivers.rs has it; ends
// with its standard input.
//
//   node browser.mjs chromium|firefox
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, extname, join } from "node:path";
import { createInterface } from "node:readline";

const require = createRequire(import.meta.url);
const modules = process.env.NODE_PATH.split(":").find((folder) => {
  try { return readFileSync(join(folder, "reconnecting-eventsource/package.json")); } catch { return false; }
});
const say = (text) => process.stdout.write(text + "\n");

/** Every page of another origin than the streams', and the modules for all pages. */
const site = createServer((request, response) => {
  response.setHeader("Access-Control-Allow-Origin", "*");
  if (request.url === "/page") {
    response.setHeader("Content-Type", "text/html");
    return response.end("<!doctype html><title>a page</title>");
  }
  try {
    let path = request.url === "/page.mjs" ? join(import.meta.dirname, "page.mjs") : join(modules, request.url.replace("/modules/", "/"));
    if (extname(path) === "") path += ".js"; // as bundlers take an import
    const text = readFileSync(path);
    response.setHeader("Content-Type", "text/javascript");
    response.end(text);
  } catch {
    response.statusCode = 404;
    response.end();
  }
}).listen(0, "127.0.0.1");
await new Promise((listens) => site.once("listening", listens));
const origin = `http://127.0.0.1:${site.address().port}`;

async function chromium() {
  const { chromium } = require("playwright-core");
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"],
  });
  const context = await browser.newContext({ ignoreHTTPSErrors: true });
  await context.exposeFunction("say", say);
  return {
    version: `Chromium ${browser.version()}`,
    async page(url) {
      const page = await context.newPage();
      await page.goto(url);
      return {
        begin: (of, client, url) => page.evaluate(async ([module, ...order]) => (await import(module)).begin(...order, window.say), [`${origin}/page.mjs`, of, client, url]),
        end: (of) => page.evaluate(async ([module, of]) => (await import(module)).end(of), [`${origin}/page.mjs`, of]),
        close: () => page.close(),
      };
    },
    quit: () => browser.close(),
  };
}

async function firefox() {
  const profile = mkdtempSync(join(tmpdir(), "tidegate-firefox-"));
  // As its users have it, but for what it would look up elsewhere.
  const preferences = {
    "remote.prefs.recommended": false,
    "app.update.enabled": false,
    "browser.aboutwelcome.enabled": false,
    "browser.safebrowsing.malware.enabled": false,
    "browser.safebrowsing.phishing.enabled": false,
    "browser.shell.checkDefaultBrowser": false,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": false,
    "extensions.getAddons.cache.enabled": false,
    "network.captive-portal-service.enabled": false,
    "network.connectivity-service.enabled": false,
    "services.settings.server": "",
  };
  const lines = Object.entries(preferences).map(([name, value]) => `user_pref(${JSON.stringify(name)}, ${JSON.stringify(value)});\n`);
  writeFileSync(join(profile, "user.js"), lines.join(""));
  const child = spawn(process.env.FIREFOX ?? "firefox-esr", ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0", "about:blank"], {
    stdio: ["ignore", "ignore", "pipe"],
    env: { ...process.env, HOME: profile },
  });
  let log = "";
  const address = await new Promise((found, failed) => {
    child.stderr.on("data", (piece) => {
      log += piece;
      const listening = /WebDriver BiDi listening on (ws:\S+)/.exec(log);
      if (listening) found(listening[1]);
    });
    child.once("error", failed);
    child.once("exit", (code) => failed(new Error(`Firefox ended (${code}): ${log}`)));
  });
  const socket = new WebSocket(`${address}/session`);
  await new Promise((opened, failed) => Object.assign(socket, { onopen: opened, onerror: (event) => failed(event.error) }));
  const waiting = new Map();
  let count = 0;
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "event") return say(message.params.data.value);
    const [done, failed] = waiting.get(message.id);
    message.type === "error" ? failed(new Error(`${message.error}: ${message.message}`)) : done(message.result);
  };
  const command = (method, params = {}) => new Promise((done, failed) => {
    waiting.set(++count, [done, failed]);
    socket.send(JSON.stringify({ id: count, method, params }));
  });
  const { capabilities } = await command("session.new", { capabilities: { alwaysMatch: { acceptInsecureCerts: true } } });
  await command("session.subscribe", { events: ["script.message"] });
  const call = async (context, text, values, more = []) => {
    const answer = await command("script.callFunction", {
      functionDeclaration: text,
      target: { context },
      awaitPromise: true,
      arguments: [...values.map((value) => ({ type: typeof value, value })), ...more],
    });
    if (answer.type === "exception") throw new Error(answer.exceptionDetails.text);
  };
  return {
    version: `Firefox ${capabilities.browserVersion}`,
    async page(url) {
      const { context } = await command("browsingContext.create", { type: "tab", background: true });
      await command("browsingContext.navigate", { context, url, wait: "complete" });
      return {
        begin: (of, client, url) => call(context, "async (module, of, client, url, say) => { (await import(module)).begin(of, client, url, say); }", [`${origin}/page.mjs`, of, client, url], [{ type: "channel", value: { channel: "say" } }]),
        end: (of) => call(context, "async (module, of) => { (await import(module)).end(of); }", [`${origin}/page.mjs`, of]),
        close: () => command("browsingContext.close", { context }),
      };
    },
    async quit() {
      child.removeAllListeners("exit");
      const ended = new Promise((ends) => child.once("exit", ends));
      child.kill();
      await ended;
      rmSync(profile, { recursive: true, force: true });
    },
  };
}

const browser = await { chromium, firefox }[process.argv[2]]();
/** The page of each stream, and how many streams each page has. */
const open = new Map(), pages = new Map();

async function follow(order) {
  if (order.close) {
    const page = open.get(order.close);
    open.delete(order.close);
    await page.ready.then((page) => page.end(order.close));
    if (--page.streams === 0 && page.url !== `${origin}/page`) {
      pages.delete(page.url);
      await (await page.ready).close();
    }
    return;
  }
  const url = order.page ?? `${origin}/page`;
  if (!pages.has(url)) pages.set(url, { url, streams: 0, ready: browser.page(url) });
  const page = pages.get(url);
  page.streams += 1;
  open.set(order.open, page);
  await (await page.ready).begin(order.open, order.client, order.url);
}

const orders = createInterface({ input: process.stdin });
orders.on("line", (line) => {
  const order = JSON.parse(line);
  follow(order).catch((error) => say(JSON.stringify({ of: order.open ?? order.close, end: `the page fails: ${error.stack}` })));
});
orders.on("close", () => browser.quit().then(() => process.exit(0)));
say(JSON.stringify({ ready: browser.version }));
