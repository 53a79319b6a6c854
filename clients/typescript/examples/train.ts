/**
 * Fine-tunes a model on rows that the server can read, and prints every step.
 *
 *   npm run build && node dist/examples/train.js --model my-model --dataset-path rows.jsonl
 */
import { parseArgs } from "node:util";

import { Code, ConnectError, createClient, type Client } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { ErrorInfoSchema, LoadProgress_Phase, UnslothService, type Model, type TrainingEvent } from "../src/index.js";

async function load(client: Client<typeof UnslothService>, modelName: string): Promise<Model> {
  for await (const { result } of client.loadModel({ modelName })) {
    if (result.case === "model") return result.value;
    if (result.case === "progress") console.log(LoadProgress_Phase[result.value.phase]);
  }
  throw new Error("the stream ended without a model");
}

function show({ kind }: TrainingEvent): void {
  switch (kind.case) {
    case "step": {
      const { step, totalSteps, loss, tokensPerSecond } = kind.value;
      console.log(`step ${step}/${totalSteps}  loss ${loss.toFixed(4)}  ${tokensPerSecond.toFixed(0)} tokens/s`);
      break;
    }
    case "warning":
      console.log(`warning: ${kind.value.message}`);
      break;
    case "succeeded":
      console.log(`the adapter is in ${kind.value.outputDir}`);
      break;
  }
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      target: { type: "string", default: "http://localhost:50051" },
      model: { type: "string" },
      "dataset-path": { type: "string" },
      "max-steps": { type: "string", default: "20" },
    },
  });
  const path = values["dataset-path"];
  if (values.model === undefined || path === undefined) {
    throw new Error("give --model and --dataset-path");
  }
  const client = createClient(UnslothService, createGrpcTransport({ baseUrl: values.target }));
  const model = await load(client, values.model);
  const prepared = await client.prepareForTraining({
    modelId: model.modelId,
    trainingConfig: { maxSteps: Number(values["max-steps"]) },
  });
  console.log(`${prepared.model?.trainableParams} of ${model.totalParams} parameters are trained`);
  const request = { modelId: model.modelId, trainDataset: { origin: { case: "path", value: path } } } as const;
  for await (const { event } of client.train(request)) {
    if (event) show(event);
  }
}

main().catch((thrown: unknown) => {
  const error = ConnectError.from(thrown);
  // The reason is the stable name of the cause; the text says what to do next.
  const reason = error.findDetails(ErrorInfoSchema)[0]?.reason ?? Code[error.code];
  console.error(thrown instanceof ConnectError ? `${reason}: ${error.rawMessage}` : error.rawMessage);
  process.exitCode = 1;
});
