/** The stubs are whole: a message and a call survive the wire. */
import assert from "node:assert/strict";
import { test } from "node:test";

import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { createClient, createRouterTransport } from "@connectrpc/connect";

import { TrainingSchema, Training_State, UnslothService } from "../src/index.js";

test("a message survives the wire", () => {
  const sent = create(TrainingSchema, {
    trainingId: "training-1",
    state: Training_State.FAILED,
    config: { learningRate: 2e-4, warmupSteps: 0 },
    error: { code: 8, message: "out of memory" },
  });
  const received = fromBinary(TrainingSchema, toBinary(TrainingSchema, sent));
  assert.deepEqual(received, sent);
  // Optional: set to 0 is not the same as unset.
  assert.equal(received.config?.warmupSteps, 0);
  assert.equal(received.config?.maxSteps, undefined);
});

test("a training is a stream of numbered events", { timeout: 10_000 }, async () => {
  const transport = createRouterTransport(({ service }) => {
    service(UnslothService, {
      async *train() {
        for (const sequence of [1n, 2n, 3n]) yield { event: { sequence } };
      },
    });
  });
  const sequences: (bigint | undefined)[] = [];
  for await (const { event } of createClient(UnslothService, transport).train({ modelId: "m" })) {
    sequences.push(event?.sequence);
  }
  assert.deepEqual(sequences, [1n, 2n, 3n]);
});
