// Drives the demos and tidegate.js in Chromium, and prints what was seen as JSON.
//
//   node library.mjs SCENARIO http://GATEWAY ARGUMENTS(JSON) [SCREENSHOTS]
import { createRequire } from "node:module";
import net from "node:net";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [, , scenario, gateway, text, screenshots] = process.argv;
const given = JSON.parse(text);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const seen = { violations: [] };
const contexts = [];

/** A page of a new context, or of one that is there. */
async function open(url, { context, ...options } = {}) {
  const used = context ?? (await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options }));
  if (!context) contexts.push(used);
  const page = await used.newPage();
  page.on("pageerror", (error) => seen.violations.push(String(error)));
  page.on("console", (message) => {
    // A refusal that a scenario wants, and a connection that was cut, are no mistakes.
    const isExpected = /status of 4(12|01|03)|ERR_CONNECTION|ERR_EMPTY|ERR_INCOMPLETE|ERR_FAILED|ERR_NETWORK/.test(message.text());
    if (message.type() === "error" && !isExpected) seen.violations.push(message.text());
  });
  await page.route("**/blank", (route) => route.fulfill({ contentType: "text/html", body: "<!doctype html><title>blank</title>" }));
  await page.goto(url);
  return page;
}
const picture = (page, name) => (screenshots ? page.screenshot({ path: `${screenshots}/${name}.png` }) : null);
const publish = (subject, body, query = "") => fetch(`${gateway}/events/${subject}${query}`, { method: "POST", body, headers: given.headers });
// The call is a function: a string would be evaluated again at every look, which the pages' policy refuses.
const isTrue = (page, call, argument) => page.waitForFunction(call, argument);
const shows = (page, text) => isTrue(page, (text) => document.querySelector("#status").textContent.includes(text), text);

/** A proxy whose connections can be cut, and that lets nobody in meanwhile. */
async function proxy() {
  const target = new URL(gateway);
  const sockets = new Set();
  let isCut = false;
  const server = net.createServer((socket) => {
    if (isCut) return socket.destroy();
    seen.connections = (seen.connections ?? 0) + 1;
    const other = net.connect(target.port, target.hostname);
    for (const [one, two] of [[socket, other], [other, socket]]) {
      sockets.add(one);
      one.on("error", () => {}).on("close", () => { sockets.delete(one); two.destroy(); }).pipe(two);
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const set = (cut) => { isCut = cut; if (cut) sockets.forEach((socket) => socket.destroy()); };
  // Connections that are there stay, and nothing passes on them any more; new ones are as ever.
  const freeze = () => sockets.forEach((socket) => { socket.unpipe(); socket.pause(); });
  return { url: `http://127.0.0.1:${server.address().port}`, set, freeze, close: () => { set(true); server.close(); } };
}

const scenarios = {
  async session() {
    const cut = await proxy();
    const pages = [await open(`${gateway}/demos/session?s=race`), await open(`${cut.url}/demos/session?s=race`)];
    await Promise.all(pages.map((page) => shows(page, "live")));
    const race = (count) => async () => {
      let stored = 0;
      for (let turn = 0; turn < count; turn++) {
        const { picture = 0 } = demo.value() ?? {};
        stored += (await demo.put({ picture: picture + 1 })).stored;
      }
      return stored;
    };
    const racer = `(${race})(500)()`;
    const stored = await Promise.all(pages.map((page) => page.evaluate(racer)));
    seen.stored = stored;
    const total = stored[0] + stored[1];
    for (const page of pages) await isTrue(page, (total) => demo.at() === total, total);
    seen.pictures = await Promise.all(pages.map((page) => page.evaluate(() => demo.at())));

    // Cut off, it misses strokes, words and steps; back, it has all of them once.
    cut.set(true);
    await shows(pages[1], "cut");
    await pages[0].mouse.move(300, 300);
    await pages[0].mouse.down();
    for (let step = 1; step < 20; step++) await pages[0].mouse.move(300 + step * 15, 300 + Math.sin(step / 3) * 60);
    await pages[0].mouse.up();
    for (let number = 0; number < 100; number++) await publish("sessions.race.chat", JSON.stringify({ text: `word ${number}` }));
    await publish("sessions.race.chat", JSON.stringify({ text: "<img src=x onerror=alert(1)>" }));
    await pages[0].click("#next");
    await isTrue(pages[0], (total) => demo.at() === total + 1, total);
    if (process.env.CUT_SECONDS) await new Promise((resolve) => setTimeout(resolve, process.env.CUT_SECONDS * 1000));
    cut.set(false);
    await shows(pages[1], "live");
    for (const page of pages) {
      await isTrue(page, () => document.querySelectorAll("#chat li").length >= 101 && demo.strokes() >= 1);
      await isTrue(page, (total) => demo.at() === total + 1, total);
    }
    seen.chat = await pages[1].locator("#chat li").allInnerTexts();
    seen.strokes = await pages[1].evaluate(() => demo.strokes());
    seen.injected = await pages[1].locator("#chat img").count();

    // On its own, and back to where the others are.
    await pages[1].click("#own");
    await pages[0].click("#next");
    await isTrue(pages[0], (total) => demo.at() === total + 2, total);
    seen.own = (await pages[1].evaluate(() => demo.at())) - total;
    await pages[1].click("#own");
    await isTrue(pages[1], (total) => demo.at() === total + 2, total);
    await pages[0].click("#back");
    for (const page of pages) await isTrue(page, (total) => demo.at() === total + 1, total);
    await picture(pages[1], "session");
    await pages[1].setViewportSize({ width: 400, height: 800 });
    seen.overflow = await pages[1].evaluate(() => document.documentElement.scrollWidth - innerWidth);
    await picture(pages[1], "session-400");
    await pages[1].setViewportSize({ width: 2500, height: 1300 });
    await picture(pages[1], "session-2500");
    cut.close();
  },

  async board() {
    const pages = [await open(`${gateway}/demos/board`), await open(`${gateway}/demos/board`)];
    await Promise.all(pages.map((page) => shows(page, "live")));
    // What is being typed stays while the other's card comes.
    for (const [number, page] of pages.entries()) await page.fill("#board-harbour input", `card ${number}`);
    await pages[0].click("#board-harbour form button");
    await isTrue(pages[1], () => document.querySelectorAll("#board-harbour .card").length === 1);
    await pages[1].click("#board-harbour form button");
    for (const page of pages) await isTrue(page, () => document.querySelectorAll("#board-harbour .card").length === 2);
    // What could not be stored is not lost.
    await pages[0].route("**/events/board.*", (route) => route.abort());
    await pages[0].fill("#board-harbour input", "kept");
    await pages[0].click("#board-harbour form button");
    await shows(pages[0], "not stored");
    await isTrue(pages[0], () => document.querySelector("#board-harbour input").value === "kept");
    await pages[0].fill("#board-harbour input", "");
    await pages[0].unroute("**/events/board.*");
    // Another document joins: its state comes, and what changes in the first meanwhile.
    await publish("board.lighthouse.lamp", JSON.stringify({ text: "mend the lamp", column: 0 }));
    await publish("board.lighthouse.lamp", JSON.stringify({ column: 2 }), "?type=merge-patch");
    await pages[0].check("#lighthouse");
    await pages[0].locator("#board-lighthouse .column:nth-child(3) .card", { hasText: "mend the lamp" }).waitFor();
    await pages[0].locator("#board-harbour .card").first().click();
    for (const page of pages) await isTrue(page, () => document.querySelectorAll("#board-harbour .column:nth-child(2) .card").length === 1);
    seen.connections = await pages[0].evaluate(() => demo.board.source.url.split("subject=").length - 1);
    // Closed, changed, and opened again: as it is by then.
    await pages[0].uncheck("#lighthouse");
    await shows(pages[0], "live");
    await publish("board.lighthouse.lamp", JSON.stringify({ text: "lamp mended" }), "?type=merge-patch");
    await pages[0].check("#lighthouse");
    await pages[0].locator("#board-lighthouse .card", { hasText: "lamp mended" }).waitFor();
    // Both move one card at once, many times: no move is lost, and none is made twice.
    const moves = await Promise.all(pages.map((page) => page.evaluate(async () => {
      const [subject] = [...demo.board.values.keys()].filter((key) => key.startsWith("board.harbour.")).sort();
      let stored = 0;
      for (let turn = 0; turn < 100; turn++) {
        const { count = 0, ...card } = demo.board.values.get(subject);
        stored += (await demo.board.put(subject, { ...card, count: count + 1 })).stored;
      }
      return stored;
    })));
    seen.moves = moves[0] + moves[1];
    const isCounted = (moves) => [...demo.board.values.values()].map(({ count = 0 }) => count).reduce((a, b) => a + b) === moves;
    for (const page of pages) await isTrue(page, isCounted, seen.moves);
    await picture(pages[0], "board");
    await pages[0].setViewportSize({ width: 400, height: 800 });
    seen.overflow = await pages[0].evaluate(() => document.documentElement.scrollWidth - innerWidth);
  },

  async wall() {
    const page = await open(`${gateway}/demos/wall`);
    await shows(page, "live");
    for (let number = 0; number < 12; number++) await page.click("#add");
    await isTrue(page, () => document.querySelectorAll("#tiles article").length === 12);
    await page.click("#cut");
    await publish("wall.curl", "just text, not JSON <b>");
    await page.locator("#tiles article", { hasText: "just text" }).waitFor();
    await isTrue(page, () => document.querySelectorAll("#tiles article").length === 13);
    seen.newest = await page.locator("#tiles article").first().innerText();
    await picture(page, "wall-demo");
    await page.setViewportSize({ width: 400, height: 800 });
    seen.overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  },

  async log() {
    const page = await open(`${gateway}/demos/log`);
    await shows(page, "live");
    const lines = given.log.map((data) => JSON.stringify({ subject: "log.access", data })).join("\n");
    seen.answer = await (await fetch(`${gateway}/events`, { method: "POST", body: lines, headers: { "Content-Type": "application/x-ndjson" } })).text();
    await isTrue(page, (count) => document.querySelectorAll("#lines div").length === count, given.log.length);
    seen.lines = await page.locator("#lines div").allInnerTexts();
    seen.classes = await page.locator("#classes").innerText();
    await page.fill("#find", "missing");
    await isTrue(page, () => document.querySelectorAll("#lines div").length === 1);
    await picture(page, "log");
  },

  /** Tokens that end, reloads, storage that fails. */
  async source() {
    const page = await open(`${gateway}/blank`);
    let asked = 0;
    await page.exposeFunction("token", () => given.tokens[Math.min(asked++, given.tokens.length - 1)]);
    const start = (options) => page.evaluate(async (options) => {
      const { TidegateSource } = await import("/tidegate.js");
      window.got = [];
      window.errors = [];
      const storage = options.storage === "full" ? { getItem: () => { throw new Error("no"); }, setItem: () => { throw new Error("full"); } } : localStorage;
      window.source = new TidegateSource("/events/demo.%3E?from=first", { token: () => window.token(), storage });
      source.onmessage = ({ data }) => got.push(data);
      source.addEventListener("order.paid", ({ data, lastEventId }) => got.push(`paid ${data} ${lastEventId !== ""}`));
      source.onerror = ({ status, code, willRetry }) => errors.push([status, code, willRetry]);
    }, options);
    const got = (count) => isTrue(page, (count) => got.length === count, count);
    await start({});
    await publish("demo.a", "1");
    await publish("demo.a", "2", "?type=order.paid");
    await got(2);
    // The first token ends: the stream goes on with the next.
    await isTrue(page, () => errors.length > 0);
    await publish("demo.a", "3");
    await got(3);
    seen.got = await page.evaluate(() => got);
    seen.tokens = asked;
    // A reload goes on where the page was.
    await page.evaluate(() => source.close());
    await publish("demo.a", "while away");
    await page.reload();
    await start({});
    await got(1);
    seen.reloaded = await page.evaluate(() => got);
    await page.evaluate(() => source.close());
    await page.reload();
    await start({ storage: "full" });
    await got(4);
    seen.withoutStorage = await page.evaluate(() => got.length);
    // What may not be read is an end, and said to be.
    seen.refused = await page.evaluate(async () => {
      const { TidegateSource } = await import("/tidegate.js");
      const source = new TidegateSource("/events/secret", { token: () => window.token() });
      const { status, code, willRetry } = await new Promise((resolve) => { source.onerror = resolve; });
      return [status, code, willRetry, source.readyState];
    });
  },

  /** A node that has no room, and a connection that is open and dead. */
  async patience() {
    const cut = await proxy();
    const page = await open(`${cut.url}/blank`);
    const only = new AbortController();
    await fetch(`${gateway}/events/other`, { signal: only.signal });
    await page.evaluate(async () => {
      const { TidegateSource } = await import("/tidegate.js");
      window.got = [];
      window.errors = [];
      window.source = new TidegateSource("/events/demo", { silence: 3000 });
      source.onmessage = ({ data }) => got.push(data);
      source.onerror = ({ status, code, willRetry }) => errors.push([status, code, willRetry]);
    });
    await isTrue(page, () => errors.length >= 2);
    seen.refused = await page.evaluate(() => errors[0]);
    only.abort();
    await isTrue(page, () => source.readyState === 1);
    await publish("demo", "1");
    await isTrue(page, () => got.length === 1);
    const before = seen.connections;
    cut.freeze();
    await publish("demo", "2");
    await isTrue(page, () => got.length === 2);
    seen.isAnother = seen.connections > before;
    await publish("demo", "3");
    // What JavaScript takes for ends of lines, and an event stream does not.
    await publish("demo", "4\u2028: \u2029x");
    await isTrue(page, () => got.length === 4);
    seen.got = await page.evaluate(() => got);
    cut.close();
  },

  /** One connection for all tabs. */
  async share() {
    const tabs = [await open(`${gateway}/blank`)];
    const [context] = contexts;
    for (let number = 0; number < 2; number++) tabs.push(await open(`${gateway}/blank`, { context }));
    const start = (page, filter) => page.evaluate(async (filter) => {
      const { TidegateSource } = await import("/tidegate.js");
      window.got = [];
      window.source = new TidegateSource(`/events/${encodeURIComponent(filter)}?from=first`, { share: true });
      source.onmessage = ({ data }) => got.push(data);
      await new Promise((resolve) => { source.onopen = resolve; });
    }, filter);
    const got = (page) => page.evaluate(() => got);
    await publish("a.1", "before");
    await start(tabs[0], "a.>");
    await start(tabs[1], "b.*");
    await start(tabs[2], "a.*");
    for (const [subject, data] of [["a.1", "one"], ["b.1", "two"], ["c.1", "three"], ["a.1.deep", "four"], ["a.2", "five"]]) await publish(subject, data);
    await isTrue(tabs[0], () => got.length === 4);
    await isTrue(tabs[1], () => got.length === 1);
    await isTrue(tabs[2], () => got.length === 3);
    seen.streams = Number(/^tidegate_streams (\d+)/m.exec(await (await fetch(`${given.admin}/metrics`)).text())[1]);
    // The tab that reads is killed: another goes on where it was.
    const publishing = (async () => {
      for (let number = 0; number < 200; number++) await publish("a.3", String(number));
    })();
    await isTrue(tabs[2], () => got.length > 20);
    await tabs[0].close();
    await publishing;
    await publish("b.2", "last");
    await publish("a.3", "last");
    for (const tab of tabs.slice(1)) await isTrue(tab, () => got.at(-1) === "last");
    seen.killed = (await got(tabs[2])).slice(3);
    seen.other = await got(tabs[1]);
    // One that comes later gets what is kept, and then what all get.
    const late = await open(`${gateway}/blank`, { context });
    await start(late, "a.>");
    await publish("a.4", "end");
    await isTrue(late, () => got.at(-1) === "end");
    seen.late = (await got(late)).length;
    
  },
};

try {
  await scenarios[scenario]();
} catch (error) {
  seen.error = String(error.stack ?? error);
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
process.exit(0);
