// What runs in a browser's page: EventSource itself, and the libraries that are made for pages.
import { EventStreamContentType, fetchEventSource } from "./modules/@microsoft/fetch-event-source/lib/esm/index.js";
import ReconnectingEventSource from "./modules/reconnecting-eventsource/build/esm/reconnecting-eventsource.js";

const TYPES = ["message", "tidegate.position", "tidegate.refused", "tidegate.bye", "tidegate.gap"];
const open = new Map();

/** Tells what anything with the interface of EventSource says. Returns what closes it. */
function listen(source, told, types = TYPES) {
  for (const type of types) source.addEventListener(type, (event) => told.event(event.type, event.lastEventId, event.data));
  source.addEventListener("error", (event) => {
    told.error(event.type);
    if (source.readyState === 2) told.end("readyState is CLOSED");
  });
  return () => source.close();
}

const CLIENTS = {
  native(url, told) {
    const show = (event) => told.event(event.type, event.lastEventId, event.data);
    const missing = (gap) => told.event("tidegate.gap", gap.resumed, gap.reason);
    // docs: EventSource
    const source = new EventSource(url);
    source.onmessage = (event) => show(event); // events without a type
    source.addEventListener("order.paid", (event) => show(event)); // and those of each type that you name
    source.addEventListener("tidegate.gap", (event) => missing(JSON.parse(event.data))); // history was lost: load anew
    // docs end
    return listen(source, told, ["tidegate.position", "tidegate.refused", "tidegate.bye"]);
  },

  "reconnecting-eventsource"(url, told) {
    // docs: reconnecting-eventsource
    const source = new ReconnectingEventSource(url);
    // docs end
    return listen(source, told);
  },

  /** The first example of its README. */
  "fetch-event-source once"(url, told) {
    const abort = new AbortController();
    const ended = fetchEventSource(url, {
      signal: abort.signal,
      onmessage: ({ event, id, data }) => told.event(event || "message", id, data),
      onerror: (error) => told.error(error),
    });
    ended.then(() => abort.signal.aborted || told.end("the promise is resolved"), (error) => told.end(`${error}`));
    return () => abort.abort();
  },

  /** The second one. */
  "fetch-event-source"(url, told) {
    const abort = new AbortController();
    const show = ({ event, id, data }) => told.event(event || "message", id, data);
    const note = (error) => told.error(error.message);
    const signal = abort.signal;
    // docs: fetch-event-source
    class Fatal extends Error {}
    const ended = fetchEventSource(url, {
      signal,
      async onopen(response) {
        if (response.status === 200 && response.headers.get("Content-Type") === EventStreamContentType) return;
        // 400, 401, 403 and 404 do not pass by themselves.
        throw new (response.status < 500 && response.status !== 429 ? Fatal : Error)(`status ${response.status}`);
      },
      onmessage: (message) => show(message), // message.event is "" for a plain message
      onclose() {
        throw new Error("the stream ended"); // without this, the end of a response is the end of it all
      },
      onerror(error) {
        if (error instanceof Fatal) throw error;
        note(error);
      },
    });
    // docs end
    ended.then(() => abort.signal.aborted || told.end("the promise is resolved"), (error) => told.end(`${error}`));
    return () => abort.abort();
  },
};

/** Begins to read. What is seen goes to `say`, as text. */
export function begin(of, client, url, say) {
  const told = {
    event: (type, id, data) => say(JSON.stringify({ of, event: { type, id, data } })),
    error: (text) => say(JSON.stringify({ of, error: `${text}` })),
    end: (text) => say(JSON.stringify({ of, end: text })),
  };
  open.set(of, CLIENTS[client](url, told));
}

export function end(of) {
  open.get(of)?.();
  open.delete(of);
}
