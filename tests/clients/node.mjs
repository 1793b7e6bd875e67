// Runs npm's SSE clients, each as its README has it, as many streams at once as it is told to. NODE_PATH names the packages.
// Reads and writes one JSON object a line, as tests/clients/drivers.rs has it; ends with its standard input.
import { createInterface } from "node:readline";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const { EventSource } = require("eventsource");
const { EventSource: UndiciEventSource } = require("undici");
const { EventSourcePolyfill } = require("event-source-polyfill");
const { createEventSource } = require("eventsource-client");
const { createParser } = require("eventsource-parser");

const TYPES = ["message", "tidegate.position", "tidegate.refused", "tidegate.bye", "tidegate.gap"];

/** Reads with anything that has the interface of EventSource. Returns what closes it. */
function listen(source, told) {
  for (const type of TYPES) source.addEventListener(type, (event) => told.event(event.type, event.lastEventId, event.data));
  source.onerror = (event) => {
    told.error(event.message ?? event.error ?? event.type);
    if (source.readyState === 2) told.end("readyState is CLOSED");
  };
  return () => source.close();
}

const CLIENTS = {
  "eventsource"(url, told) {
    // docs: eventsource
    const source = new EventSource(url);
    // docs end
    return listen(source, told);
  },

  "undici": (url, told) => listen(new UndiciEventSource(url), told),

  "event-source-polyfill"(url, told) {
    // docs: event-source-polyfill
    const source = new EventSourcePolyfill(url);
    // docs end
    return listen(source, told);
  },

  "eventsource-client"(url, told) {
    const show = ({ event = "message", id, data }) => told.event(event, id, data);
    // docs: eventsource-client
    const source = createEventSource({
      url,
      onMessage: ({ event, id, data }) => show({ event, id, data }), // tidegate.gap comes here, too
    });
    // docs end
    return () => source.close();
  },

  "eventsource-parser"(url, told) {
    const abort = new AbortController();
    const show = ({ event = "message", id, data }) => told.event(event, id, data);
    const note = (error) => told.error(error.message);
    const sleep = (time) => new Promise((wake) => setTimeout(wake, time));
    const read = async (signal) => {
      // docs: eventsource-parser
      let lastEventId, retry = 2000;
      const parser = createParser({
        onEvent(event) {
          lastEventId = event.id ?? lastEventId;
          show(event); // event.event is undefined for a plain message
        },
        onRetry: (time) => (retry = time),
      });
      while (!signal.aborted) {
        try {
          const headers = { Accept: "text/event-stream", ...(lastEventId && { "Last-Event-ID": lastEventId }) };
          const response = await fetch(url, { headers, signal });
          if (response.status !== 200) throw new Error(`status ${response.status}`);
          parser.reset(); // half an event of the connection before does not count
          const text = response.body.pipeThrough(new TextDecoderStream());
          for await (const piece of text) parser.feed(piece);
        } catch (error) {
          note(error); // a status of 400, 401, 403 or 404 does not pass by itself: give up there
        }
        await sleep(retry);
      }
      // docs end
    };
    read(abort.signal).catch((error) => told.end(`${error}`));
    return () => abort.abort();
  },
};

const write = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const open = new Map();
process.on("uncaughtException", (error) => write({ error: `uncaught: ${error.stack}` }));
process.on("unhandledRejection", (error) => write({ error: `unhandled rejection: ${error?.stack ?? error}` }));
const orders = createInterface({ input: process.stdin });
orders.on("line", (line) => {
  const order = JSON.parse(line);
  if (order.close) return open.get(order.close)();
  const of = order.open;
  open.set(of, CLIENTS[order.client](order.url, {
    event: (type, id, data) => write({ of, event: { type, id, data } }),
    error: (text) => write({ of, error: `${text}` }),
    end: (text) => write({ of, end: text }),
  }));
});
orders.on("close", () => process.exit(0));
write({ ready: process.version });
