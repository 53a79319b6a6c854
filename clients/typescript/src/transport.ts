/** Calls: what every method of the client makes them with. */
import { type Client as Stub, Code } from "@connectrpc/connect";

import type { UnslothService } from "../gen/unslothd/v1/service_pb.js";
import { endedEarly, fromThrown, UnslothdError } from "./errors.js";
import { connectionLost, Retry, type Peer } from "./retry.js";

/** What may be passed to each call. */
export interface CallOptions {
  /** Ends the call, and the waiting for a lost connection, with the signal's reason. The work on the server goes on. */
  signal?: AbortSignal;
}

/** Options of one call of the stub. */
export interface RpcOptions {
  signal?: AbortSignal;
  timeoutMs?: number;
}

/** A server, as the parts of the client see it. */
export class Calls {
  readonly peer: Peer = { heard: false };

  constructor(
    readonly stub: Stub<typeof UnslothService>,
    readonly target: string,
    readonly timeoutMs: number,
    readonly reconnectTimeoutMs: number,
  ) {}

  streamRetry(): Retry {
    return new Retry(this.peer, this.reconnectTimeoutMs);
  }

  /**
   * Makes one call and returns its response; calls again while the server is away. Only after UNAVAILABLE: the other
   * ways to lose a connection leave open whether the call was carried out.
   */
  async unary<Response>(
    call: (options: RpcOptions) => Promise<Response>,
    { signal }: CallOptions,
    { timeoutMs = this.timeoutMs, repeatable = true } = {},
  ): Promise<Response> {
    const patience = repeatable ? Math.min(this.timeoutMs, this.reconnectTimeoutMs) : 0;
    const retry = new Retry(this.peer, patience, 0);
    for (;;) {
      try {
        const response = await call({ timeoutMs, ...(signal && { signal }) });
        retry.heard();
        return response;
      } catch (thrown) {
        const error = this.translated(thrown, signal);
        if (error.code !== Code.Unavailable || !connectionLost(error)) throw error;
        await retry.wait(error, signal);
      }
    }
  }

  /** The client's error for what a call threw; throws the signal's reason when that ended the call. */
  translated(thrown: unknown, signal: AbortSignal | undefined): UnslothdError {
    signal?.throwIfAborted();
    return fromThrown(thrown, this.target, this.peer.heard);
  }

  /**
   * Reads a stream of progress up to its result, and starts again with the same request after a lost connection.
   * `take` returns the result, or undefined for progress.
   */
  async resultOf<Message, Result>(
    open: (options: RpcOptions) => AsyncIterable<Message>,
    take: (message: Message) => Result | undefined,
    name: string,
    { signal }: CallOptions,
  ): Promise<Result> {
    const retry = this.streamRetry();
    for (let wasLost = false; ; wasLost = true) {
      const stream = new Stream(this, open, signal);
      try {
        const found = await progressUntil(stream, retry, take, name);
        if (!(found instanceof UnslothdError)) return found.result;
        if (!connectionLost(found)) throw wasLost ? maybeItsOwn(found) : found;
        await retry.wait(found, signal);
      } finally {
        stream.close();
      }
    }
  }
}

async function progressUntil<Message, Result>(
  stream: Stream<Message>,
  retry: Retry,
  take: (message: Message) => Result | undefined,
  name: string,
): Promise<{ result: Result } | UnslothdError> {
  for (;;) {
    const message = await stream.next();
    if (message === undefined) return endedEarly(name);
    if (message instanceof UnslothdError) return message;
    retry.progress();
    const result = take(message);
    if (result !== undefined) return { result };
  }
}

function maybeItsOwn(error: UnslothdError): UnslothdError {
  if (error.kind !== "AlreadyExists") return error;
  const hint = "It may be this very call, which ended while the connection was lost.";
  return new UnslothdError(`${error.message} ${hint}`, error);
}

/** An open call whose responses are a stream. */
export class Stream<Message> {
  readonly #messages: AsyncIterator<Message>;
  readonly #left = new AbortController();

  constructor(
    private readonly calls: Calls,
    open: (options: RpcOptions) => AsyncIterable<Message>,
    private readonly signal: AbortSignal | undefined,
  ) {
    const ends = signal ? AbortSignal.any([signal, this.#left.signal]) : this.#left.signal;
    this.#messages = open({ signal: ends })[Symbol.asyncIterator]();
  }

  /** The next message; undefined at the end, the error of a stream that broke. Throws the reason of the signal. */
  async next(): Promise<Message | UnslothdError | undefined> {
    try {
      const { done, value } = await this.#messages.next();
      return done ? undefined : value;
    } catch (thrown) {
      return this.calls.translated(thrown, this.signal);
    }
  }

  /** Ends the call. */
  close(): void {
    this.#left.abort();
  }
}
