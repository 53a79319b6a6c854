/**
 * Fine-tunes a model on a few rows, and prints every step.
 *
 *   npm run example -- --model my-model
 */
import { parseArgs } from "node:util";

import { Client, LoadProgress_Phase, rows, serverPath, UnslothdError, type TrainingEvent } from "../src/index.js";

const ROWS = [
  { prompt: "What colour is the sky?", completion: "Blue." },
  { prompt: "What colour is grass?", completion: "Green." },
  { prompt: "What colour is snow?", completion: "White." },
];

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
      target: { type: "string", default: "" },
      model: { type: "string" },
      "dataset-path": { type: "string" },
      "max-steps": { type: "string", default: "5" },
    },
  });
  if (values.model === undefined) throw new Error("give --model: a Hub id, or a folder below a model root of the server");
  const client = new Client(values.target);
  try {
    const model = await client.loadModel(
      { modelName: values.model },
      { onProgress: ({ phase }) => console.log(`load: ${LoadProgress_Phase[phase]}`) },
    );
    const prepared = await client.prepare({ modelId: model.modelId });
    console.log(`${prepared.model?.trainableParams} of ${model.totalParams} parameters are trained`);
    const path = values["dataset-path"];
    const training = await client.train({
      modelId: model.modelId,
      trainDataset: path === undefined ? rows(ROWS) : serverPath(path),
      trainingConfig: { maxSteps: Number(values["max-steps"]) },
    });
    for await (const event of training) show(event);
  } finally {
    client.close();
  }
}

main().catch((error: unknown) => {
  if (!(error instanceof UnslothdError)) throw error;
  // The reason is the stable name of the cause; the text says what to do next.
  console.error(`${error.reason || error.kind}: ${error.message}`);
  for (const { field, description } of error.fieldViolations) console.error(`${field}: ${description}`);
  process.exitCode = 1;
});
