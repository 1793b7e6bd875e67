/** Why a connection ended, or was refused. */
export interface TidegateErrorEvent extends Event {
  /** The HTTP status, if there was an answer. A stream that is refused for now counts as 503. */
  readonly status?: number;
  /** The code of the gateway's problem document, such as `forbidden`. */
  readonly code?: string;
  readonly detail?: string;
  readonly reason?: string;
  /** Whether the source connects again by itself. If not, it is closed. */
  readonly willRetry: boolean;
}

export interface SourceOptions {
  /**
   * Returns a token for `Authorization: Bearer`. Called before the first connection, and again when the gateway says that the token
   * has expired or is not valid. Without it, cookies are sent as they are for every request.
   */
  token?: () => string | Promise<string>;
  /** Whether cookies are sent to another origin. */
  withCredentials?: boolean;
  /** Where the stream begins: an id of an earlier stream. Wins over `from` and over what is stored. */
  lastEventId?: string;
  /** Where the position is kept, so that a reload resumes: `localStorage` or `sessionStorage`. Storage that fails is ignored. */
  storage?: Storage;
  /** The name of the position in `storage`. Default: the URL. */
  key?: string;
  /**
   * One connection for all tabs of the origin whose sources have the same name here. Needs Web Locks and BroadcastChannel; without them
   * each tab has its own. All tabs must have the same rights. `move()` is not for shared sources.
   */
  share?: string | true;
  /** How long nothing, not even a heartbeat, may come before the connection is made again, in milliseconds. Default: 60,000. */
  silence?: number;
}

/**
 * An EventSource that also connects again after a refusal, a token's end, and sleep.
 *
 * Events: `open`, `message`, the types of published events, `tidegate.gap` and the gateway's other own types as `MessageEvent`; `error`
 * as `TidegateErrorEvent`.
 */
export class TidegateSource extends EventTarget {
  static readonly CONNECTING: 0;
  static readonly OPEN: 1;
  static readonly CLOSED: 2;
  constructor(url: string | URL, options?: SourceOptions);
  readonly url: string;
  readonly readyState: 0 | 1 | 2;
  /** The position: pass it as `lastEventId` to go on there. */
  readonly lastEventId: string;
  onopen: ((event: Event) => void) | null;
  onmessage: ((event: MessageEvent<string>) => void) | null;
  onerror: ((event: TidegateErrorEvent) => void) | null;
  /** Goes on at the same place with another URL, such as one with more filters (and `new=snapshot`). */
  move(url: string | URL): void;
  close(): void;
}

export interface ChangeEvent extends Event {
  readonly subject: string;
  /** The value as it is now; `null` if it was removed. */
  readonly value: unknown;
  readonly previous: unknown;
  readonly id: string;
}

export interface PutResult {
  /** Whether the value was stored. If not, somebody else has stored one since, which is in `value`. */
  stored: boolean;
  value: unknown;
  id: string | undefined;
}

/**
 * A map of subjects to values that several people read and change at once. Values are JSON. An event whose type is `merge-patch`, or ends
 * with `.merge-patch`, is a patch of the value before it (RFC 7396); `null` removes a value.
 *
 * Events: `change` as `ChangeEvent`. The connection and its events are those of `source`.
 */
export interface LiveDocument extends EventTarget {
  readonly values: Map<string, unknown>;
  readonly source: TidegateSource;
  /** The id of the event that a subject's value is from. */
  id(subject: string): string | undefined;
  /** Opens one more document on the same connection: its state comes, then its changes. */
  open(filter: string): void;
  /** Closes a document. Its values stay in the map. */
  shut(filter: string): void;
  /** Stores a value, if what this page has of the subject is the newest (`If-Match`). Throws what the gateway refuses otherwise. */
  put(subject: string, value: unknown, options?: { type?: string; ttl?: string }): Promise<PutResult>;
  close(): void;
}

/** Opens the state of some subjects, such as `/events/board.7.%3E`, and keeps it up to date. */
export function live(url: string | URL, options?: Omit<SourceOptions, "share" | "storage" | "key">): LiveDocument;
