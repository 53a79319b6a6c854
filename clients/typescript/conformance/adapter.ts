/** The adapter of this client for tests/conformance: commands as JSON lines on stdin, outcomes on stdout. */
import { createInterface } from "node:readline";

import { createRegistry, fromJson, toJson, type DescMessage, type JsonValue, type MessageShape } from "@bufbuild/protobuf";

import { file_google_rpc_error_details as errorDetails } from "../gen/google/rpc/error_details_pb.js";
import * as pb from "../gen/unslothd/v1/service_pb.js";
import { DataFormat } from "../gen/unslothd/v1/dataset_pb.js";
import { LoadProgressSchema, ModelSchema } from "../gen/unslothd/v1/model_pb.js";
import { TrainingEventSchema } from "../gen/unslothd/v1/training_event_pb.js";
import { TrainingMetricsSchema, TrainingPlanSchema, TrainingSchema } from "../gen/unslothd/v1/training_pb.js";
import { ArtifactSchema, ExportProgressSchema } from "../gen/unslothd/v1/artifact_pb.js";
import { DatasetSchema } from "../gen/unslothd/v1/dataset_pb.js";
import { GenerateSummarySchema } from "../gen/unslothd/v1/generation_pb.js";
import { Client, tlsFromFiles, UnslothdError, type TrainingRun } from "../src/index.js";

/** A command: which call, and its arguments by the names of the contract. */
interface Command {
  call: string;
  request?: JsonValue;
  model_id?: string;
  training_id?: string;
  after_sequence?: number;
  checkpoint_step?: number;
  save_checkpoint?: boolean;
  force?: boolean;
  labels?: Record<string, string>;
  limit?: number;
  path?: string;
  name?: string;
  folder?: string;
}

const say = (line: object): void => void process.stdout.write(`${JSON.stringify(line)}\n`);

const registry = createRegistry(errorDetails); // of what is packed in the error of a failed event

function plain<Desc extends DescMessage>(schema: Desc, message: MessageShape<Desc> | undefined): JsonValue {
  return message === undefined ? {} : toJson(schema, message, { registry });
}

async function follow(run: TrainingRun): Promise<JsonValue> {
  for await (const event of run) say({ event: plain(TrainingEventSchema, event) });
  const metrics = plain(TrainingMetricsSchema, await run.result());
  return { training_id: run.trainingId, last_sequence: Number(run.lastSequence), metrics };
}

/** For benchmarks/clients.py: reads the whole log of a finished training and keeps nothing. */
async function timedWatch(run: TrainingRun): Promise<JsonValue> {
  const began = performance.now();
  let [first, events] = [0, 0];
  for await (const _ of run) {
    first ||= performance.now() - began;
    events++;
  }
  return { events, first_event_seconds: first / 1000, seconds: (performance.now() - began) / 1000 };
}

async function carryOut(client: Client, command: Command, signal: AbortSignal): Promise<JsonValue> {
  const request = <Desc extends DescMessage>(schema: Desc) => fromJson(schema, command.request ?? {});
  const { model_id: modelId = "", training_id: trainingId = "" } = command;
  const options = { signal };
  switch (command.call) {
    case "server_info":
      return plain(pb.GetServerInfoResponseSchema, await client.serverInfo(options));
    case "load_model": {
      const onProgress = (message: MessageShape<typeof LoadProgressSchema>) => say({ progress: plain(LoadProgressSchema, message) });
      return plain(ModelSchema, await client.loadModel(request(pb.LoadModelRequestSchema), { signal, onProgress }));
    }
    case "get_model":
      return plain(ModelSchema, await client.getModel(modelId, options));
    case "prepare":
      return plain(
        pb.PrepareForTrainingResponseSchema,
        await client.prepare(request(pb.PrepareForTrainingRequestSchema), options),
      );
    case "unload_model":
      return { freed: Number(await client.unloadModel(modelId, { signal, force: command.force ?? false })) };
    case "plan":
      return plain(TrainingPlanSchema, await client.plan(request(pb.PlanTrainingRequestSchema), options));
    case "train":
      return follow(await client.train(request(pb.TrainRequestSchema), options));
    case "watch":
      return follow(client.watch(trainingId, { signal, afterSequence: BigInt(command.after_sequence ?? 0) }));
    case "timed_watch":
      return timedWatch(client.watch(trainingId, options));
    case "resume":
      return follow(await client.resume(trainingId, { signal, checkpointStep: command.checkpoint_step ?? 0 }));
    case "pause":
      return plain(TrainingSchema, await client.pause(trainingId, options));
    case "cancel": {
      const saveCheckpoint = command.save_checkpoint ?? true;
      return plain(TrainingSchema, await client.cancel(trainingId, { signal, saveCheckpoint }));
    }
    case "get_training":
      return plain(TrainingSchema, await client.getTraining(trainingId, options));
    case "list_trainings": {
      const found = await client.listTrainings(
        { labels: command.labels ?? {} },
        { signal, ...(command.limit !== undefined && { limit: command.limit }) },
      );
      return { trainings: found.map((each) => plain(TrainingSchema, each)) };
    }
    case "generate": {
      const stream = client.generate(request(pb.GenerateRequestSchema), options);
      let text = "";
      for await (const piece of stream) {
        say({ text: piece });
        text += piece;
      }
      return { text, summary: plain(GenerateSummarySchema, stream.summary) };
    }
    case "upload_dataset": {
      const { path = "", name = "" } = command;
      return plain(DatasetSchema, await client.uploadDataset(path, { signal, name, format: DataFormat.JSONL }));
    }
    case "export": {
      const onProgress = (message: MessageShape<typeof ExportProgressSchema>) => say({ progress: plain(ExportProgressSchema, message) });
      return plain(ArtifactSchema, await client.export(request(pb.ExportModelRequestSchema), { signal, onProgress }));
    }
    case "download":
      return { paths: await client.download(request(pb.DownloadArtifactRequestSchema), command.folder ?? "", options) };
    default:
      throw new Error(`the adapter does not know the call ${command.call}`);
  }
}

async function main(): Promise<void> {
  let client: Client | undefined;
  let stop = new AbortController();
  let last = Promise.resolve();
  const outcome = async (to: Client, command: Command): Promise<void> => {
    stop = new AbortController();
    try {
      say({ result: await carryOut(to, command, stop.signal) });
    } catch (error) {
      if (stop.signal.aborted) say({ stopped: true });
      else if (error instanceof UnslothdError) {
        const { kind, code, reason, message, metadata, fieldViolations, retryAfterMs } = error;
        const fields = fieldViolations.map(({ field }) => field);
        say({ error: { kind, code, reason, message, metadata, fields, retry_after: retryAfterMs / 1000 } });
      } else throw error;
    }
  };
  for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    if (client === undefined) {
      const { target, timeout = 60, reconnect_timeout = 120, token, ca, client_cert: cert, client_key: key } = command;
      client = new Client(target, {
        timeoutMs: timeout * 1000,
        reconnectTimeoutMs: reconnect_timeout * 1000,
        ...(token && { token }),
        ...(ca && { tls: tlsFromFiles({ ca, ...(cert && { cert, key }) }) }),
      });
    } else if (command.stop) stop.abort();
    else {
      const to = client;
      last = last.then(() => outcome(to, command));
    }
  }
  await last;
  client?.close();
}

await main();
