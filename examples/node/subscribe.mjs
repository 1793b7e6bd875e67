// Prints the data of each event of a filter: node subscribe.mjs FILTER
import { setTimeout as sleep } from "node:timers/promises";

const url = process.env.TIDEGATE_URL ?? "http://127.0.0.1:8080";

// Yields { type, data } for ever. A connection that ends is opened again after the last event.
async function* subscribe(target) {
  let lastId;
  let retry = 2000;
  for (;;) {
    try {
      const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
      const response = await fetch(url + target, { headers });
      if (response.status !== 200) throw Object.assign(new Error(await response.text()), { final: true });
      let [rest, type, data] = ["", "message", []];
      for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
        const lines = (rest + text).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
          if (field === "event") type = value;
          else if (field === "data") data.push(value);
          else if (field === "id") lastId = value;
          else if (field === "retry") retry = Number(value);
          else if (line === "") {
            if (data.length > 0) yield { type, data: data.join("\n") };
            [type, data] = ["message", []];
          }
        }
      }
    } catch (error) {
      if (error.final) throw error;
    }
    await sleep(retry);
  }
}

for await (const { type, data } of subscribe(`/events/${encodeURIComponent(process.argv[2])}?from=first`)) {
  if (type === "tidegate.gap") console.error("missed events:", data);
  else if (!type.startsWith("tidegate.") || type === "tidegate.binary") console.log(data);
}
