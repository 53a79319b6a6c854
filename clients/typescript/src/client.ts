/** The client: one method for each call of the contract. */
import { randomUUID } from "node:crypto";

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { createClient, type Client as Stub, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

import type { Artifact, ExportProgress } from "../gen/unslothd/v1/artifact_pb.js";
import type { Dataset } from "../gen/unslothd/v1/dataset_pb.js";
import type { LoadProgress, Model } from "../gen/unslothd/v1/model_pb.js";
import {
  UnslothService, LoadModelRequestSchema, TrainRequestSchema,
  type DownloadArtifactRequestSchema, type ExportModelRequestSchema, type GenerateRequestSchema,
  type GetServerInfoResponse, type ListTrainingsRequestSchema, type PlanTrainingRequestSchema,
  type PrepareForTrainingRequestSchema, type PrepareForTrainingResponse,
} from "../gen/unslothd/v1/service_pb.js";
import type { Training, TrainingPlan } from "../gen/unslothd/v1/training_pb.js";
import { inPlainText, resolve, type ConnectionOptions } from "./connecting.js";
import { upload, type UploadOptions } from "./dataset.js";
import { hubTokenInPlainText } from "./errors.js";
import { download, type DownloadOptions } from "./download.js";
import { TextStream } from "./generate.js";
import { TrainingRun } from "./training.js";
import { Calls, Stream, type CallOptions } from "./transport.js";

export type { CallOptions } from "./transport.js";

// Attaching an adapter to a large model, ending a worker and planning take longer than a look-up.
const SLOW_MS = 600_000;
const LARGEST_PAGE = 1000;

export interface ClientOptions extends ConnectionOptions {
  /** For one call that is not a stream, default 60 000; prepare, plan and unloadModel have ten minutes at least. */
  timeoutMs?: number;
  /** Without progress, after which a lost connection is given up; default 120 000. */
  reconnectTimeoutMs?: number;
}

type Init<Schema extends Parameters<typeof create>[0]> = MessageInitShape<Schema>;
type Progress<T> = CallOptions & { onProgress?: (progress: T) => void };

/**
 * Talks to an unslothd server.
 *
 * A stream whose connection is lost is taken up again where it stopped. Unary calls are repeated while the server is
 * away, once it has answered before. Errors are UnslothdError; an aborted signal throws its own reason.
 */
export class Client {
  readonly target: string;
  readonly #calls: Calls;
  readonly #session: Http2SessionManager;
  readonly #exposed: boolean;

  /**
   * `target` is HOST:PORT; default: the environment variable UNSLOTHD_TARGET, else DEFAULT_TARGET. Throws TypeError
   * for settings that cannot be used. docs/connecting.md has them all.
   */
  constructor(target?: string, options: ClientOptions = {}) {
    const { timeoutMs = 60_000, reconnectTimeoutMs = 120_000 } = options;
    const { target: found, tls, headers, exposed } = resolve(target, options);
    this.target = found;
    this.#exposed = exposed;
    const baseUrl = `${tls ? "https" : "http"}://${found}`;
    // Notices a dead peer within 40 s, also while the server is silent.
    this.#session = new Http2SessionManager(baseUrl, { pingIntervalMs: 30_000, pingTimeoutMs: 10_000 }, tls);
    const transport = createGrpcTransport({
      baseUrl,
      sessionManager: this.#session,
      interceptors: [sending(headers)],
      readMaxBytes: 64 << 20,
    });
    this.#calls = new Calls(createClient(UnslothService, transport), this.target, timeoutMs, reconnectTimeoutMs);
  }

  /** The generated client, for calls that have no method here. Its errors are ConnectError. */
  get stub(): Stub<typeof UnslothService> {
    return this.#calls.stub;
  }

  /** Ends the connection. What runs on the server goes on. */
  close(): void {
    this.#session.abort();
  }

  /** Versions, devices and limits of the server. */
  async serverInfo(options: CallOptions = {}): Promise<GetServerInfoResponse> {
    return this.#calls.unary((rpc) => this.stub.getServerInfo({}, rpc), options);
  }

  /**
   * Loads a model into a worker of its own and waits until it is ready. A Hugging Face token is not sent to another host
   * without TLS: HUB_TOKEN_IN_PLAIN_TEXT.
   */
  async loadModel(request: Init<typeof LoadModelRequestSchema>, options: Progress<LoadProgress> = {}): Promise<Model> {
    if (request.token && this.#exposed) throw hubTokenInPlainText(inPlainText("Hugging Face token", this.target));
    const sent = { ...request, requestId: request.requestId || randomUUID() };
    const take = ({ result }: { result: { case?: string | undefined; value?: unknown } }) => {
      if (result.case === "model") return result.value as Model;
      options.onProgress?.(result.value as LoadProgress);
      return undefined;
    };
    return this.#calls.resultOf((rpc) => this.stub.loadModel(sent, rpc), take, "LoadModel", options);
  }

  /** A model as it is now. */
  async getModel(modelId: string, options: CallOptions = {}): Promise<Model> {
    return there((await this.#calls.unary((rpc) => this.stub.getModel({ modelId }, rpc), options)).model);
  }

  /** All models, in the order of their loading. */
  async listModels(options: CallOptions = {}): Promise<Model[]> {
    return (await this.#calls.unary((rpc) => this.stub.listModels({}, rpc), options)).models;
  }

  /** Attaches trainable parameters and sets the config of the trainings on this model. */
  async prepare(
    request: Init<typeof PrepareForTrainingRequestSchema>, options: CallOptions = {},
  ): Promise<PrepareForTrainingResponse> {
    return this.#calls.unary((rpc) => this.stub.prepareForTraining(request, rpc), options, this.#slow());
  }

  /** Ends the worker of a model and returns the bytes of memory that this gave back. */
  async unloadModel(modelId: string, { force = false, ...options }: CallOptions & { force?: boolean } = {}): Promise<bigint> {
    const call = { ...this.#slow(), repeatable: false };
    return (await this.#calls.unary((rpc) => this.stub.unloadModel({ modelId, force }, rpc), options, call)).freedMemoryBytes;
  }

  /**
   * Stores rows on the server, to train on them any number of times: a file here, by its path, or bytes. Rows that it
   * has already are not sent.
   */
  async uploadDataset(data: string | Uint8Array, options: UploadOptions): Promise<Dataset> {
    return there(await upload(this.#calls, data, options));
  }

  /** A stored dataset. */
  async getDataset(datasetId: string, options: CallOptions = {}): Promise<Dataset> {
    return there((await this.#calls.unary((rpc) => this.stub.getDataset({ datasetId }, rpc), options)).dataset);
  }

  /** Stored datasets, newest first; `limit` of them at most. */
  async listDatasets({ limit, ...options }: CallOptions & { limit?: number } = {}): Promise<Dataset[]> {
    return pages(limit, async (page) => {
      const response = await this.#calls.unary((rpc) => this.stub.listDatasets(page, rpc), options);
      return [response.datasets, response.nextPageToken];
    });
  }

  /** Removes a stored dataset; DATASET_IN_USE while a training that is not over reads it. */
  async deleteDataset(datasetId: string, options: CallOptions = {}): Promise<void> {
    await this.#calls.unary((rpc) => this.stub.deleteDataset({ datasetId }, rpc), options, { repeatable: false });
  }

  /**
   * Starts a training and returns it once it is accepted, to be iterated for its events. After the last event of a
   * training that failed or was cancelled the iteration throws that error.
   */
  async train(request: Init<typeof TrainRequestSchema>, { signal }: CallOptions = {}): Promise<TrainingRun> {
    const sent = create(TrainRequestSchema, { ...request, requestId: request.requestId || randomUUID() });
    return new TrainingRun(this.#calls, { request: sent, trainingId: "", sequence: 0n, throws: true, signal }).accepted();
  }

  /** Works out what `train` would do with the same request, without doing it. */
  async plan(request: Init<typeof PlanTrainingRequestSchema>, options: CallOptions = {}): Promise<TrainingPlan> {
    return there((await this.#calls.unary((rpc) => this.stub.planTraining(request, rpc), options, this.#slow())).plan);
  }

  /**
   * Reads the events of a training, the past ones first. Iteration ends after the last event, whatever that is;
   * `result()` throws if the training did not succeed.
   */
  watch(trainingId: string, { afterSequence = 0n, signal }: CallOptions & { afterSequence?: bigint } = {}): TrainingRun {
    return new TrainingRun(this.#calls, { trainingId, sequence: afterSequence, throws: false, signal });
  }

  /** Asks a training to save at the next step boundary and to free its device; returns it as it is then. */
  async pause(trainingId: string, options: CallOptions = {}): Promise<Training> {
    return there((await this.#calls.unary((rpc) => this.stub.pauseTraining({ trainingId }, rpc), options)).training);
  }

  /** Goes on with a paused, failed or cancelled training from a checkpoint, by default the newest; read it from here on. */
  async resume(
    trainingId: string, { checkpointStep = 0, ...options }: CallOptions & { checkpointStep?: number } = {},
  ): Promise<TrainingRun> {
    const { lastSequence } = await this.getTraining(trainingId, options);
    await this.#calls.unary((rpc) => this.stub.resumeTraining({ trainingId, checkpointStep }, rpc), options);
    return new TrainingRun(this.#calls, { trainingId, sequence: lastSequence, throws: true, signal: options.signal });
  }

  /** A training as it is now. */
  async getTraining(trainingId: string, options: CallOptions = {}): Promise<Training> {
    return there((await this.#calls.unary((rpc) => this.stub.getTraining({ trainingId }, rpc), options)).training);
  }

  /** Trainings that match the filter, newest first; `limit` of them at most. */
  async listTrainings(
    filter: Init<typeof ListTrainingsRequestSchema> = {}, { limit, ...options }: CallOptions & { limit?: number } = {},
  ): Promise<Training[]> {
    return pages(limit, async (page) => {
      const response = await this.#calls.unary((rpc) => this.stub.listTrainings({ ...filter, ...page }, rpc), options);
      return [response.trainings, response.nextPageToken];
    });
  }

  /** Asks a training to stop at the next step boundary and returns it as it is then. */
  async cancel(
    trainingId: string, { saveCheckpoint = true, ...options }: CallOptions & { saveCheckpoint?: boolean } = {},
  ): Promise<Training> {
    const request = { trainingId, saveCheckpoint };
    return there((await this.#calls.unary((rpc) => this.stub.cancelTraining(request, rpc), options)).training);
  }

  /** Streams text from a loaded model. Not repeated after a lost connection: sampled text would differ. */
  generate(request: Init<typeof GenerateRequestSchema>, { signal }: CallOptions = {}): TextStream {
    return new TextStream(new Stream(this.#calls, (rpc) => this.stub.generate(request, rpc), signal));
  }

  /**
   * Writes a model in another form on the server and waits until it is done; `download` fetches the files. After a lost
   * connection it attaches to the export, which goes on meanwhile.
   */
  async export(
    request: Init<typeof ExportModelRequestSchema>, options: Progress<ExportProgress> = {},
  ): Promise<Artifact> {
    const take = ({ result }: { result: { case?: string | undefined; value?: unknown } }) => {
      if (result.case === "artifact") return result.value as Artifact;
      options.onProgress?.(result.value as ExportProgress);
      return undefined;
    };
    return this.#calls.resultOf((rpc) => this.stub.exportModel(request, rpc), take, "ExportModel", options);
  }

  /**
   * Downloads files into a folder here, checks their hashes, and returns their paths. A file is called `<name>.part`
   * until it is whole; a broken download goes on where it stopped, in this call or in the next one. Nothing is written
   * outside of the folder.
   */
  async download(
    request: Init<typeof DownloadArtifactRequestSchema>, folder: string, options: DownloadOptions = {},
  ): Promise<string[]> {
    return download(this.#calls, request, folder, options);
  }

  #slow(): { timeoutMs: number } {
    return { timeoutMs: Math.max(this.#calls.timeoutMs, SLOW_MS) };
  }
}

type Page = { pageSize: number; pageToken: string };

async function pages<Item>(limit: number | undefined, page: (page: Page) => Promise<[Item[], string]>): Promise<Item[]> {
  const found: Item[] = [];
  const pageSize = Math.min(limit || LARGEST_PAGE, LARGEST_PAGE);
  for (let pageToken = ""; ; ) {
    const [items, next] = await page({ pageSize, pageToken });
    found.push(...items);
    if (next === "" || (limit !== undefined && found.length >= limit)) return found.slice(0, limit);
    pageToken = next;
  }
}

function sending(headers: Headers): Interceptor {
  return (next) => (request) => {
    headers.forEach((value, name) => request.header.set(name, value));
    return next(request);
  };
}

/** A message that every server sets. */
function there<Message>(message: Message | undefined): Message {
  if (message === undefined) throw new TypeError("the server's response is empty");
  return message;
}
