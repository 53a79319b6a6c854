/** Text as the model makes it. */
import type { GenerateSummary } from "../gen/unslothd/v1/generation_pb.js";
import type { GenerateResponse } from "../gen/unslothd/v1/service_pb.js";
import { UnslothdError } from "./errors.js";
import type { Stream } from "./transport.js";

/** Iterate with `for await` for the pieces. Leaving the loop stops the generation. */
export class TextStream implements AsyncIterable<string> {
  #summary: GenerateSummary | undefined;

  constructor(private readonly stream: Stream<GenerateResponse>) {}

  /** Tokens, speed and why it ended; undefined until the text has been read to its end. */
  get summary(): GenerateSummary | undefined {
    return this.#summary;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<string, void> {
    try {
      for (let message = await this.stream.next(); message !== undefined; message = await this.stream.next()) {
        if (message instanceof UnslothdError) throw message;
        if (message.part.case === "summary") this.#summary = message.part.value;
        else if (message.part.case === "text") yield message.part.value;
      }
    } finally {
      this.close();
    }
  }

  /** Waits for the end and returns the text. */
  async text(): Promise<string> {
    let text = "";
    for await (const piece of this) text += piece;
    return text;
  }

  /** Stops the generation. */
  close(): void {
    this.stream.close();
  }
}
