/** A training as it happens: its events, each exactly once, across lost connections. */
import { Training_State, type Training, type TrainingMetrics } from "../gen/unslothd/v1/training_pb.js";
import type { TrainingEvent } from "../gen/unslothd/v1/training_event_pb.js";
import type { TrainRequest } from "../gen/unslothd/v1/service_pb.js";
import { endedEarly, trainingCancelled, trainingFailed, UnslothdError } from "./errors.js";
import { connectionLost, type Retry } from "./retry.js";
import { Stream, type Calls } from "./transport.js";

/** A long log comes so many events at a time; whoever keeps up gets each as it happens. */
const EVENTS_A_RESPONSE = 200;

/** How a training ended. */
type Outcome = { metrics: TrainingMetrics | undefined } | { error: UnslothdError };

interface Opened {
  stream: Stream<{ event?: TrainingEvent | undefined; events?: TrainingEvent[] }>;
  watching: boolean;
}

/** Where to begin, and what to do at the end. */
export interface Start {
  /** Sent until the first event; undefined for a training that is known. */
  request?: TrainRequest;
  trainingId: string;
  sequence: bigint;
  /** Its error ends the iteration. */
  throws: boolean;
  signal: AbortSignal | undefined;
}

/**
 * Iterate with `for await` for the events. Leaving the loop, `close` or an aborted signal leaves the training running,
 * unless its request said DisconnectPolicy.CANCEL; `Client.watch` goes on reading it.
 */
export class TrainingRun implements AsyncIterable<TrainingEvent> {
  readonly #calls: Calls;
  readonly #retry: Retry;
  readonly #start: Start;
  #trainingId: string;
  #delivered: bigint;
  #sequence: bigint;
  #outcome: Outcome | undefined;
  #first: TrainingEvent | undefined;
  #open: Opened | undefined;
  #further: TrainingEvent[] = [];
  #throws: boolean;
  #finished = false;

  constructor(calls: Calls, start: Start) {
    this.#calls = calls;
    this.#retry = calls.streamRetry();
    this.#start = start;
    this.#trainingId = start.trainingId;
    this.#sequence = this.#delivered = start.sequence;
    this.#throws = start.throws;
  }

  /** Id of the training. */
  get trainingId(): string {
    return this.#trainingId;
  }

  /** Of the last event that was handed out; watch after it to go on from here. */
  get lastSequence(): bigint {
    return this.#delivered;
  }

  /** Waits until the server has accepted the training. */
  async accepted(): Promise<this> {
    this.#first = await this.#next();
    return this;
  }

  /** Yields what comes next, until the log of the training ends. A second loop goes on where the first stopped. */
  async *[Symbol.asyncIterator](): AsyncGenerator<TrainingEvent, void> {
    for (;;) {
      const event = this.#first ?? (await this.#next());
      this.#first = undefined;
      if (event === undefined) return;
      this.#delivered = event.sequence;
      yield event;
    }
  }

  /**
   * Waits for the end, drops the events on the way, and returns the final figures. Throws TrainingFailed or
   * TrainingCancelled. While the training is paused it waits on.
   */
  async result(): Promise<TrainingMetrics | undefined> {
    this.#throws = false;
    for await (const _ of this);
    if (this.#outcome && "error" in this.#outcome) throw this.#outcome.error;
    return this.#outcome?.metrics;
  }

  /** Asks the training to stop at the next step boundary; the events go on up to the cancelled one. */
  async cancel({ saveCheckpoint = true } = {}): Promise<Training | undefined> {
    const request = { trainingId: this.#trainingId, saveCheckpoint };
    return (await this.#calls.unary((options) => this.#calls.stub.cancelTraining(request, options), {})).training;
  }

  /**
   * Asks the training to save at the next step boundary and to free its device. The events go on when it is resumed; to
   * leave until then, close the run and call `Client.resume` later.
   */
  async pause(): Promise<Training | undefined> {
    const request = { trainingId: this.#trainingId };
    return (await this.#calls.unary((options) => this.#calls.stub.pauseTraining(request, options), {})).training;
  }

  /** Stops reading. What runs on the server goes on. */
  close(): void {
    this.#open?.stream.close();
    this.#open = undefined;
  }

  /** The next event; undefined after the last one. The end of the stream decides: a training may be resumed. */
  async #next(): Promise<TrainingEvent | undefined> {
    while (!this.#finished) {
      const read = await this.#read();
      if (read !== undefined && !(read instanceof UnslothdError)) return read;
      if (read === undefined) this.#finished = true;
      else await this.#takeUp(read);
    }
    this.close();
    if (this.#throws && this.#outcome && "error" in this.#outcome) {
      this.#throws = false; // the first time only, as iterators do
      throw this.#outcome.error;
    }
    return undefined;
  }

  /** The next event of the stream, why the stream is to be taken up again, or undefined when the log ends here. */
  async #read(): Promise<TrainingEvent | UnslothdError | undefined> {
    const { stream } = (this.#open ??= this.#opened());
    for (;;) {
      const event = this.#further.shift() ?? (await this.#received(stream));
      if (event === undefined) return this.#outcome ? undefined : endedEarly("the event stream");
      if (event instanceof UnslothdError) return this.#broken(event);
      if (event.sequence > this.#sequence + 1n) return this.#gap(event.sequence);
      if (event.sequence !== 0n && event.sequence <= this.#sequence) continue; // seen before the connection was lost
      this.#retry.progress();
      if (event.sequence === 0n) continue; // a heartbeat
      this.#trainingId = event.trainingId;
      this.#sequence = event.sequence;
      this.#outcome = outcomeOf(event);
      return event;
    }
  }

  /** The next event that comes; those of the same response are kept for later. An older server sends one at a time. */
  async #received(stream: Opened["stream"]): Promise<TrainingEvent | UnslothdError | undefined> {
    for (;;) {
      const message = await stream.next();
      if (message === undefined || message instanceof UnslothdError) return message;
      const [first, ...further] = message.events ?? [];
      this.#further = further;
      const event = first ?? message.event;
      if (event !== undefined) return event;
    }
  }

  #broken(error: UnslothdError): UnslothdError | undefined {
    if (connectionLost(error)) {
      const succeeded = this.#outcome !== undefined && !("error" in this.#outcome);
      return succeeded ? undefined : error; // a training that succeeded is never resumed
    }
    if (this.#outcome) return undefined; // Train ends with the training's own error, which its last event has told
    this.close();
    throw error;
  }

  /** Prepares the next attempt after a loss; or finds that the log ended, or that it is too late. */
  async #takeUp(lost: UnslothdError): Promise<void> {
    const watched = this.#open?.watching;
    this.close();
    if (watched && lost.code === undefined) {
      const final = await this.#final();
      if (final !== undefined) {
        this.#outcome = final;
        this.#finished = true;
        return;
      }
    }
    try {
      await this.#retry.wait(lost, this.#start.signal);
    } catch (error) {
      if (error !== lost || this.#outcome === undefined) throw error;
      this.#finished = true;
    }
  }

  /** How a training ended whose last event was seen before; undefined while there is more to read. */
  async #final(): Promise<Outcome | undefined> {
    const { signal } = this.#start;
    const request = { trainingId: this.#trainingId };
    const call = this.#calls.unary((options) => this.#calls.stub.getTraining(request, options), signal ? { signal } : {});
    const { training } = await call;
    if (training === undefined || training.lastSequence > this.#sequence) return undefined;
    switch (training.state) {
      case Training_State.SUCCEEDED:
        return { metrics: training.metrics };
      case Training_State.FAILED:
        return { error: trainingFailed(training.error, this.#trainingId) };
      case Training_State.CANCELLED:
        return { error: trainingCancelled(this.#trainingId, training.step) };
      default:
        return undefined;
    }
  }

  #gap(sequence: bigint): UnslothdError {
    const text = `the log of training ${this.#trainingId} jumped from sequence ${this.#sequence} to ${sequence}`;
    return new UnslothdError(text, { kind: "Internal", code: 15 });
  }

  #opened(): Opened {
    this.#further = []; // they come again
    const { request, signal } = this.#start;
    const { stub } = this.#calls;
    if (request !== undefined && this.#sequence === 0n) {
      return { stream: new Stream(this.#calls, (options) => stub.train(request, options), signal), watching: false };
    }
    const asked = { trainingId: this.#trainingId, afterSequence: this.#sequence, maxEvents: EVENTS_A_RESPONSE };
    return { stream: new Stream(this.#calls, (options) => stub.watchTraining(asked, options), signal), watching: true };
  }
}

function outcomeOf({ kind, trainingId }: TrainingEvent): Outcome | undefined {
  switch (kind.case) {
    case "succeeded":
      return { metrics: kind.value.metrics };
    case "failed":
      return { error: trainingFailed(kind.value.error, trainingId) };
    case "cancelled":
      return { error: trainingCancelled(trainingId, kind.value.step) };
    default:
      return undefined;
  }
}
