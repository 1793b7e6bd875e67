// Publishes one event: node publish.mjs SUBJECT DATA
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

const url = process.env.TIDEGATE_URL ?? "http://127.0.0.1:8080";

// Returns the event's id. Retries with one idempotency key, so that the event is stored once.
async function publish(subject, data, attempts = 5) {
  const headers = { "Idempotency-Key": randomUUID() };
  for (let attempt = 0; attempt < attempts; attempt++) {
    const response = await fetch(`${url}/events/${subject}`, { method: "POST", headers, body: data }).catch(() => null);
    if (response?.ok) return (await response.json()).id;
    if (response && response.status < 500 && response.status !== 429) throw new Error(await response.text());
    await sleep(200 * 2 ** attempt);
  }
  throw new Error("the event may or may not be stored");
}

console.log(await publish(process.argv[2], process.argv[3]));
