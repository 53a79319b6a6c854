/** When to try again after a lost connection, and when to give up. */
import { setTimeout as sleep } from "node:timers/promises";

import { Code } from "@connectrpc/connect";

import type { UnslothdError } from "./errors.js";

const FIRST_DELAY_MS = 100;
const LONGEST_DELAY_MS = 5_000;
// A server that has never answered is more likely a wrong target than a restart.
const FIRST_CONTACT_MS = 5_000;

/** What a client knows about its server; shared by all its calls. */
export interface Peer {
  heard: boolean;
}

/** Exponential backoff with jitter, bounded by the time without progress. */
export class Retry {
  #attempt = 0;
  #since: number | undefined;

  constructor(
    private readonly peer: Peer,
    /** Without progress, after which the error is thrown. */
    private readonly timeoutMs: number,
    /** The same for a server that has never answered. */
    private readonly firstContactMs = FIRST_CONTACT_MS,
  ) {}

  heard(): void {
    this.peer.heard = true;
  }

  /** Notes that the server answered with something new: the next loss starts over. */
  progress(): void {
    this.heard();
    this.#attempt = 0;
    this.#since = undefined;
  }

  /** Resolves when it is time for the next attempt; throws `lost` when there was no progress for too long. */
  async wait(lost: UnslothdError, signal: AbortSignal | undefined): Promise<void> {
    const patience = this.peer.heard ? this.timeoutMs : Math.min(this.timeoutMs, this.firstContactMs);
    const now = performance.now();
    this.#since ??= now;
    const left = this.#since + patience - now;
    if (left <= 0) throw lost;
    const delay = Math.min(FIRST_DELAY_MS * 2 ** this.#attempt, LONGEST_DELAY_MS) * (0.5 + Math.random() / 2);
    this.#attempt = Math.min(this.#attempt + 1, 16);
    await sleep(Math.min(delay, left), undefined, signal ? { signal } : {}).catch(() => signal?.throwIfAborted());
  }
}

/**
 * True when the way to the server broke, not the work: the same call may go on later.
 *
 * An error with a reason is the server's own answer. A broken connection has none and shows as UNAVAILABLE (socket
 * closed, refused), CANCELLED or INTERNAL (RST_STREAM), UNKNOWN (stream removed), or as a stream that ended early.
 */
export function connectionLost(error: UnslothdError): boolean {
  if (error.reason !== "") return error.reason === "SERVER_STOPPING";
  const lost = [undefined, Code.Unavailable, Code.Canceled, Code.Internal, Code.Unknown, Code.Aborted];
  return lost.includes(error.code);
}
