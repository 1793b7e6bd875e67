// Tidegate's client for pages that want more than EventSource gives: see tidegate.d.ts. Where an EventSource is enough, use that.

const RETRY_MAX = 30_000;
const PATCH = /(^|[.+])merge-patch$/;

const json = (text) => { try { return JSON.parse(text); } catch { /* undefined */ } };
const sequence = (id) => Number(/-(\d+)/.exec(id)?.[1] ?? 0);
const absolute = (url) => new URL(url, globalThis.location?.href);
const never = () => new Promise(() => {});
const sleep = (ms, signal) =>
  new Promise((resolve) => {
    setTimeout(resolve, ms);
    signal.addEventListener("abort", resolve);
  });

function filtersOf(url) {
  const path = /\/events\/(.+)$/.exec(url.pathname)?.[1];
  return path ? [decodeURIComponent(path)] : url.searchParams.getAll("subject");
}

function matches(filter, subject) {
  const [wanted, tokens] = [filter.split("."), subject.split(".")];
  const fits = wanted.at(-1) === ">" ? tokens.length >= wanted.length : tokens.length === wanted.length;
  return fits && wanted.every((token, at) => token === "*" || token === ">" || token === tokens[at]);
}

async function refusal(answer) {
  const { title, code, detail } = json(await answer.text()) ?? {};
  const wait = Number(answer.headers.get("Retry-After")) * 1000;
  return Object.assign(new Error(title ?? `HTTP ${answer.status}`), { status: answer.status, code, detail, wait });
}

/** Hands each event of a response to `take`, until the response ends. */
async function read(answer, heard, take) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", event = {}, data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const [, field, text] = /^([^:\r]*):? ?(.*?)\r?$/s.exec(line);
      if (field === "data") data.push(text);
      else if (field) event[field] = text;
      else if (line === "" || line === "\r") {
        if (data.length || event.id) take({ ...event, data: data.join("\n") });
        [event, data] = [{}, []];
      }
    }
  }
}

export class TidegateSource extends EventTarget {
  static CONNECTING = 0;
  static OPEN = 1;
  static CLOSED = 2;
  readyState = 0;
  onopen = null;
  onmessage = null;
  onerror = null;
  #options;
  #key;
  #token;
  #retry = 2_000;
  #failures = 0;
  #heard = 0;
  #saved = 0;
  #turn = new AbortController();
  #over = new AbortController();
  #share;

  constructor(url, options = {}) {
    super();
    this.url = absolute(url).href;
    this.#options = options;
    this.#key = options.key ?? `tidegate ${this.url}`;
    this.lastEventId = options.lastEventId ?? "";
    // Storage may be forbidden, or full: then a reload begins as a first visit does.
    try { this.lastEventId ||= options.storage?.getItem(this.#key) ?? ""; } catch { /* as said */ }
    const { signal } = this.#over;
    const listen = (target, type, call) => target?.addEventListener?.(type, call, { signal });
    // A laptop that was closed comes back to a connection that is open and dead.
    const look = () => Date.now() - this.#heard > (options.silence ?? 60_000) && this.#again();
    const timer = setInterval(look, 5_000);
    listen(signal, "abort", () => clearInterval(timer));
    listen(globalThis.document, "visibilitychange", look);
    listen(globalThis, "online", () => this.#again());
    listen(globalThis, "pagehide", () => this.#save());
    if (options.share && globalThis.BroadcastChannel && navigator.locks) this.#share = Share.of(this.url, options);
    queueMicrotask(() => this.#run());
  }

  move(url) {
    this.url = absolute(url).href;
    this.#again();
  }

  close() {
    this.readyState = 2;
    this.#save();
    this.#share?.remove(this);
    this.#over.abort();
    this.#turn.abort();
  }

  /** Lets go of the connection, or of the wait for one. */
  #again() {
    this.#heard = Date.now();
    this.#failures = 0;
    if (!this.#share) this.#turn.abort();
  }

  async #run() {
    while (this.readyState !== 2) {
      const { signal } = (this.#turn = new AbortController());
      let error;
      try {
        if (this.#share ? await this.#follow() : await this.#connect({}, (event) => this.#take(event))) return;
      } catch (caught) {
        error = caught;
      }
      if (this.readyState === 2) return;
      this.readyState = 0;
      if (signal.aborted) continue;
      const wait = this.#wait(error);
      if (wait === undefined) this.close();
      this.fail(error);
      await sleep(wait, signal);
    }
  }

  /** How long to wait before the next connection; undefined if there is to be none. */
  #wait(error) {
    const status = error?.status;
    const isFirst = this.#failures++ === 0;
    if (status === 401 && this.#options.token) {
      this.#token = undefined;
      // It was the token's time.
      if (isFirst) return 0;
    } else if (status === 204 || (status >= 400 && status < 500 && status !== 408 && status !== 429)) {
      return undefined;
    } else if (!error && isFirst) {
      return this.#retry;
    }
    const most = Math.min(RETRY_MAX, this.#retry * 2 ** this.#failures);
    return Math.max(error?.wait || 0, most * (0.5 + Math.random() / 2));
  }

  async #connect(parameters, take, method = "GET") {
    this.#heard = Date.now();
    this.#token ??= await this.#options.token?.();
    const url = new URL(this.url);
    if (this.lastEventId) parameters = { ...parameters, lastEventId: this.lastEventId };
    Object.entries(parameters).forEach((parameter) => url.searchParams.set(...parameter));
    const answer = await fetch(url, {
      method,
      headers: { Accept: "text/event-stream", ...(this.#token && { Authorization: `Bearer ${this.#token}` }) },
      credentials: this.#options.withCredentials ? "include" : "same-origin",
      cache: "no-store",
      signal: this.#turn.signal,
    });
    // A page of a hotel's network, or of a proxy, is no stream.
    const isStream = answer.headers.get("Content-Type")?.startsWith("text/event-stream");
    if (answer.status !== 200 || !isStream) throw await refusal(answer);
    if (!this.#share) this.opened();
    if (method === "GET") await read(answer, () => { this.#heard = Date.now(); }, take);
  }

  #take({ event: type = "message", data, id, retry }) {
    // What comes behind close() or move() will come again, if it is wanted.
    if (this.#turn.signal.aborted) return;
    if (retry) this.#retry = Number(retry);
    const { reason } = type.startsWith("tidegate.") ? json(data) : {};
    if (type === "tidegate.refused") throw Object.assign(new Error("refused for now"), { status: 503, code: reason });
    this.#failures = 0;
    if (reason === "token_expired") this.#token = undefined;
    this.deliver(type, data, id);
  }

  /** For Share. */
  opened() {
    this.readyState = 1;
    this.#emit(new Event("open"));
  }

  fail({ status, code, detail, message: reason } = {}) {
    this.#emit(Object.assign(new Event("error"), { status, code, detail, reason, willRetry: this.readyState !== 2 }));
  }

  deliver(type, data, id) {
    if (id) this.lastEventId = id;
    this.#emit(new MessageEvent(type, { data, lastEventId: this.lastEventId, origin: new URL(this.url).origin }));
    if (Date.now() - this.#saved > 250) this.#save();
  }

  #emit(event) {
    this[`on${event.type}`]?.(event);
    this.dispatchEvent(event);
  }

  #save() {
    this.#saved = Date.now();
    try { if (this.lastEventId) this.#options.storage?.setItem(this.#key, this.lastEventId); } catch { /* see above */ }
  }

  /** Reads what is there on a connection of its own, then what comes on the one that all tabs share. */
  async #follow() {
    // Whether it may: a filter that may not be read would end the connection of all.
    await this.#connect({}, null, "HEAD");
    const filters = filtersOf(new URL(this.url));
    const isJson = new URL(this.url).searchParams.get("format") === "json";
    const seen = new Set();
    let late = [], since = 0;
    const deliver = (event, id) => {
      if (seen.has(event.id)) return;
      if (sequence(event.id) > since) seen.add(event.id);
      if (!late && seen.size > 1_000) seen.delete(seen.values().next().value);
      if (isJson) this.deliver("message", JSON.stringify(event), id);
      else if ("data_base64" in event) this.deliver("tidegate.binary", JSON.stringify(event), id);
      else this.deliver(event.type ?? "message", event.data, id);
    };
    const pass = (told) => {
      this.#heard = Date.now();
      if (told.isLost) { this.readyState = 0; this.#run(); }
      else if (told.error) this.fail(told.error);
      else if (late) late.push(told);
      else if (told.own) this.deliver(told.own.type, told.own.data, told.id);
      else if (filters.some((filter) => matches(filter, told.event.subject))) deliver(told.event, told.id);
    };
    since = await this.#share.add(this, filters, pass);
    await this.#connect({ format: "json", follow: "0" }, (event) => {
      if (event.event === "tidegate.bye" && json(event.data).reason === "caught-up") {
        this.lastEventId = event.id ?? this.lastEventId;
        const told = late;
        late = undefined;
        this.opened();
        told.forEach(pass);
      } else if (event.event) this.#take(event);
      else deliver(json(event.data), event.id);
    });
    return !late;
  }
}

/** One connection for all tabs of an origin: the tab that holds the lock reads, and tells the others. */
class Share {
  static #all = new Map();
  static of(url, options) {
    const name = `tidegate ${new URL(url).origin} ${options.share}`;
    if (!Share.#all.has(name)) Share.#all.set(name, new Share(name, url, options));
    return Share.#all.get(name);
  }

  #name;
  #url;
  #options;
  #channel;
  #tab = crypto.randomUUID();
  #isReady;
  #sources = new Map();
  #id = "";
  #has = [];
  /** Of the tab that reads: what each tab wants. */
  #wanted;
  #source;
  #timer;

  constructor(name, url, { token, withCredentials }) {
    [this.#name, this.#url, this.#options] = [name, url, { token, withCredentials }];
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#isReady = new Promise((resolve) => {
      navigator.locks.request(`${name} ${this.#tab}`, () => { resolve(); return never(); });
    });
    navigator.locks.request(name, () => {
      // What all had goes on until all have said what they want.
      this.#wanted = new Map([["", this.#has]]);
      setTimeout(() => { this.#wanted.delete(""); this.#reopen(); }, 5_000);
      this.#say({ who: true });
      return never();
    });
  }

  /** Resolves, once the events of these filters come, to a sequence that all of them are beyond. */
  add(source, filters, take) {
    return new Promise((resolve) => {
      this.#sources.set(source, { filters, take, resolve });
      this.#want();
    });
  }

  remove(source) {
    if (this.#sources.delete(source)) this.#want();
  }

  async #want() {
    await this.#isReady;
    this.#say({ tab: this.#tab, want: [...this.#sources.values()].flatMap((source) => source.filters) });
  }

  #say(told) {
    this.#channel.postMessage(told);
    this.#hear(told);
  }

  #hear(told) {
    const { tab, want, who, has, id } = told;
    if (id) this.#id = id;
    if (who) this.#want();
    else if (has) this.#has = has;
    else if (!want) this.#sources.forEach((source) => source.take(told));
    else if (this.#wanted) {
      if (!this.#wanted.has(tab) && tab !== this.#tab) {
        // The lock of a tab that is gone is free.
        navigator.locks.request(`${this.#name} ${tab}`, () => { this.#wanted.delete(tab); this.#reopen(); });
      }
      this.#wanted.set(tab, want);
      this.#reopen();
    }
    for (const [key, source] of this.#sources) {
      if (source.filters.every((filter) => this.#has.includes(filter))) {
        source.resolve(sequence(this.#id));
        source.isThere = true;
      } else if (source.isThere) {
        // It slept while the others went on without it.
        this.#sources.delete(key);
        source.take({ isLost: true });
      }
    }
  }

  #reopen() {
    clearTimeout(this.#timer);
    // Tabs that are restored together come together.
    this.#timer = setTimeout(() => {
      const filters = [...new Set([...this.#wanted.values()].flat())].sort();
      const url = new URL("/events?format=json&new=now", this.#url);
      filters.forEach((filter) => url.searchParams.append("subject", filter));
      if (this.#source?.url === url.href) return this.#say({ has: filters });
      this.#source?.close();
      this.#source = undefined;
      if (filters.length === 0) return;
      const source = (this.#source = new TidegateSource(url, { ...this.#options, lastEventId: this.#id }));
      source.onmessage = ({ data, lastEventId: id }) => this.#say({ event: JSON.parse(data), id });
      source.onerror = ({ status, code, detail, reason }) => this.#say({ error: { status, code, detail, message: reason } });
      for (const type of ["tidegate.position", "tidegate.gap", "tidegate.token-expiring"]) {
        source.addEventListener(type, ({ data, lastEventId: id }) => {
          if (type !== "tidegate.position") this.#say({ own: { type, data }, id });
          // With the first word of the gateway all filters are there.
          this.#say({ has: filters, id });
        });
      }
    }, 20);
  }
}

export const live = (url, options) => new LiveDocument(url, options);

class LiveDocument extends EventTarget {
  values = new Map();
  #ids = new Map();
  #folding = new Map();
  #options;
  #url;
  #filters;

  constructor(url, options = {}) {
    super();
    this.#options = options;
    this.#url = absolute(url);
    this.#filters = filtersOf(this.#url);
    this.source = new TidegateSource(this.#address(), { ...options, share: undefined, storage: undefined });
    this.source.onmessage = ({ data }) => this.#take(json(data));
  }

  open(filter) {
    this.#filters.push(filter);
    this.source.move(this.#address());
  }

  shut(filter) {
    this.#filters = this.#filters.filter((open) => open !== filter);
    this.source.move(this.#address());
  }

  close() {
    this.source.close();
  }

  id(subject) {
    return this.#ids.get(subject);
  }

  async put(subject, value, { type, ttl } = {}) {
    const id = this.#ids.get(subject);
    const answer = await this.#ask(subject, { type, ttl }, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(id ? { "If-Match": `"${id}"` } : { "If-None-Match": "*" }) },
      body: JSON.stringify(value),
    });
    if (answer.status === 412) {
      await this.#read(subject);
    } else if (!answer.ok) {
      throw await refusal(answer);
    } else {
      const told = await answer.json();
      this.#take({ subject, type, id: told.id, data: JSON.stringify(value) });
    }
    return { stored: answer.ok, value: this.values.get(subject), id: this.#ids.get(subject) };
  }

  #address() {
    const url = new URL("/events?format=json&from=snapshot&new=snapshot", this.#url);
    this.#filters.forEach((filter) => url.searchParams.append("subject", filter));
    return url;
  }

  async #ask(subject, parameters, request = {}) {
    const url = new URL(`/events/${encodeURIComponent(subject)}`, this.#url);
    Object.entries(parameters).forEach(([name, value]) => value && url.searchParams.set(name, value));
    const token = await this.#options.token?.();
    const headers = { ...request.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    return fetch(url, { ...request, headers, credentials: this.#options.withCredentials ? "include" : "same-origin" });
  }

  #take(event) {
    if (this.#folding.has(event.subject)) this.#folding.get(event.subject).late.push(event);
    // A patch of what is not known needs what it patches.
    else if (PATCH.test(event.type) && !this.#ids.has(event.subject)) this.#read(event.subject);
    else this.#fold(event);
  }

  #fold({ subject, type, id, data }) {
    const known = this.#ids.get(subject);
    if (known?.split("-")[0] === id.split("-")[0] && sequence(known) >= sequence(id)) return;
    const previous = this.values.get(subject);
    const told = json(data) ?? (data === "null" ? null : data);
    const value = PATCH.test(type) ? merge(previous, told) : told;
    this.#ids.set(subject, id);
    if (value === null) this.values.delete(subject);
    else this.values.set(subject, value);
    this.dispatchEvent(Object.assign(new Event("change"), { subject, value, previous, id }));
  }

  /** Folds everything that is kept of a subject, and what comes meanwhile. */
  #read(subject) {
    const late = [];
    const reading = async () => {
      try {
        const answer = await this.#ask(subject, { format: "ndjson", from: "first", follow: "0" });
        const events = (await answer.text()).split("\n").map(json).filter((event) => event?.subject);
        const last = events.findLastIndex((event) => !PATCH.test(event.type));
        events.slice(Math.max(last, 0)).forEach((event) => this.#fold(event));
      } finally {
        this.#folding.delete(subject);
        late.forEach((event) => this.#take(event));
      }
    };
    if (!this.#folding.has(subject)) this.#folding.set(subject, { late, done: reading() });
    return this.#folding.get(subject).done;
  }
}

/** RFC 7396. */
function merge(value, patch) {
  if (patch?.constructor !== Object) return patch;
  const merged = value?.constructor === Object ? { ...value } : {};
  for (const [name, part] of Object.entries(patch)) {
    if (part === null) delete merged[name];
    else merged[name] = merge(merged[name], part);
  }
  return merged;
}
