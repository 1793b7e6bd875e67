// Drives the console in Chromium, one step after the other, and prints what it saw as JSON.
//
//   node console.mjs http://GATEWAY [SCREENSHOTS]
import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [, , gateway, screenshots] = process.argv;
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const seen = { violations: [] };
const open = async (options, url = gateway) => {
  const page = await (await browser.newContext(options)).newPage();
  page.on("console", (message) => { if (message.type() === "error") seen.violations.push(message.text()); });
  page.on("pageerror", (error) => seen.violations.push(String(error)));
  page.on("dialog", (dialog) => { seen.violations.push("a dialog"); dialog.dismiss(); });
  await page.goto(url);
  return page;
};
const picture = (page, name) => (screenshots ? page.screenshot({ path: `${screenshots}/${name}.png` }) : null);
const text = (page, selector) => page.locator(selector).innerText();
const isLive = (page) => page.waitForFunction(() => document.querySelector("#status").textContent === "live");
const rows = (page) => page.locator("#events button").count();
const hasRow = (page, data) => page.locator("#events .data", { hasText: data }).first().waitFor();
const publish = async (page, subject, data) => {
  await page.fill("#subject", subject);
  await page.fill("#data", data);
  await page.click("#publish button");
  await page.locator("#published.good").waitFor();
};

try {
  const page = await open({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
  seen.url = page.url();
  await isLive(page);
  await publish(page, "orders.eu", '{"order": 42, "items": [{"sku": "a-1", "count": 2}], "note": "two words"}');
  await hasRow(page, '"order": 42');
  seen.curl = await page.locator("#curl").textContent();

  // What would run, if it were not text.
  await publish(page, "x".repeat(255), '<img src=x onerror="alert(1)"><script>alert(2)</script>');
  await hasRow(page, "<img src=x");
  seen.injected = await page.locator("#events img, #events script").count();

  // Paused, it keeps its position; what comes meanwhile is not lost, and not repeated.
  await page.click("#pause");
  await page.waitForFunction(() => document.querySelector("#status").textContent.startsWith("paused"));
  await publish(page, "while.paused", "while paused");
  seen.whilePaused = await page.locator("#events .data", { hasText: "while paused" }).count();
  await page.click("#pause");
  await hasRow(page, "while paused");
  await page.click("#cut");
  await publish(page, "while.cut", "while cut");
  await hasRow(page, "while cut");
  await page.waitForFunction(() => Number(document.querySelector("#reconnects").textContent) >= 2);
  seen.data = await page.locator("#events .data").allInnerTexts();

  // From an event on, everything behind it arrives again.
  await page.locator("#events button", { hasText: '"order": 42' }).first().click();
  seen.fields = await text(page, "#fields");
  await picture(page, "console-light");
  const before = await rows(page);
  await page.click("#resume");
  await page.waitForFunction((count) => document.querySelectorAll("#events button").length >= count, before + 3);
  seen.resumed = (await rows(page)) - before;

  // A part of them: a mistake is shown with its place, and the right condition lets its events through.
  await page.fill("#where", "@.data.order = 42");
  await page.click("#subscribe button");
  await page.locator("#mistake", { hasText: "==" }).waitFor();
  seen.mistake = await text(page, "#mistake");
  await picture(page, "console-mistake");
  await page.fill("#where", "@.data.order == 42");
  await page.fill("#every", "200ms");
  await page.click("#subscribe button");
  await hasRow(page, '"order": 42');
  seen.selected = await page.locator("#events .data").allInnerTexts();
  seen.hash = await page.evaluate(() => location.hash);
  await picture(page, "console-where");
  await page.fill("#where", "");
  await page.fill("#every", "");
  await page.click("#subscribe button");
  await hasRow(page, "while cut");

  // A conflict is told as one.
  await page.fill("#match", "000000-1");
  await page.click("#publish button");
  await page.locator("#published.bad").waitFor();
  seen.conflict = await text(page, "#published");

  // Ten thousand events at once, and one of 1 MB: the page goes on to answer.
  await page.evaluate(async () => {
    const lines = Array.from({ length: 10000 }, (_, n) => JSON.stringify({ subject: `flood.${n % 20}`, data: `flood ${n}` }));
    await fetch("/events", { method: "POST", headers: { "Content-Type": "application/x-ndjson" }, body: lines.join("\n") });
    await fetch("/events/large", { method: "POST", body: "y".repeat(999000) });
  });
  await page.waitForFunction(() => Number(document.querySelector("#counts").textContent.split(" ")[0].replaceAll(/\D/g, "")) >= 10005, null, { timeout: 60000 });
  seen.counts = await text(page, "#counts");
  seen.rows = await rows(page);
  await page.fill("#match", "");
  await publish(page, "after.flood", "after the flood");
  await hasRow(page, "after the flood");

  const dark = await open({ viewport: { width: 1600, height: 1000 }, colorScheme: "dark" });
  await isLive(dark);
  await hasRow(dark, "after the flood");
  await picture(dark, "console-dark");
  const narrow = await open({ viewport: { width: 400, height: 800 } });
  await isLive(narrow);
  await hasRow(narrow, "after the flood");
  seen.narrowOverflow = await narrow.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  await picture(narrow, "console-400");
  const wide = await open({ viewport: { width: 2500, height: 1300 } });
  await isLive(wide);
  await hasRow(wide, "after the flood");
  await picture(wide, "console-2500");

  // The wall shows the newest event, and the next one when it comes.
  const wall = await open({ viewport: { width: 1280, height: 720 } }, `${gateway}/console#wall=photos.%3E`);
  await publish(page, "photos.one", '{"title": "The first picture", "url": "https://elsewhere.example/one.jpg"}');
  await wall.locator("#wall", { hasText: "The first picture" }).waitFor();
  await publish(page, "photos.two", '{"title": "The second picture"}');
  await wall.locator("#wall", { hasText: "The second picture" }).waitFor();
  seen.wallImages = await wall.locator("#wall img").count();
  await picture(wall, "wall");
} catch (error) {
  seen.error = String(error);
}
process.stdout.write(JSON.stringify(seen) + "\n");
await browser.close();
