/** Where rows come from, and the way of an upload: hash, ask whether the server has it, send it. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";

import { create, type MessageInitShape } from "@bufbuild/protobuf";

import { DataFormat, DatasetSourceSchema, type Dataset, type DatasetSource } from "../gen/unslothd/v1/dataset_pb.js";
import { UploadDatasetRequestSchema, type UploadDatasetRequest } from "../gen/unslothd/v1/service_pb.js";
import { UnslothdError } from "./errors.js";
import { connectionLost } from "./retry.js";
import type { Calls, CallOptions } from "./transport.js";

/** The largest chunk of the contract. */
const CHUNK_BYTES = 1 << 20;

/** The source of a small set of rows, which travels inside the request; the server takes 4 MiB at most. */
export function rows(data: Iterable<object>): DatasetSource {
  const lines = [...data].map((row) => `${JSON.stringify(row)}\n`).join("");
  return source({ case: "inline", value: { format: DataFormat.JSONL, data: new TextEncoder().encode(lines) } });
}

/** The source of rows in a file or folder on the server; absolute, or relative to one of its model roots. */
export function serverPath(path: string): DatasetSource {
  return source({ case: "path", value: path });
}

/** The source of rows in a dataset of the Hugging Face Hub, e.g. "HuggingFaceH4/ultrachat_200k". */
export function hubDataset(name: string, options: { config?: string; split?: string; revision?: string } = {}): DatasetSource {
  return source({ case: "hub", value: { name, ...options } });
}

/** The source of rows that the server keeps; see `Client.uploadDataset`. */
export function uploadedDataset(dataset: Dataset | string): DatasetSource {
  return source({ case: "datasetId", value: typeof dataset === "string" ? dataset : dataset.datasetId });
}

type Origin = NonNullable<MessageInitShape<typeof DatasetSourceSchema>["origin"]>;

function source(origin: Origin): DatasetSource {
  return create(DatasetSourceSchema, { origin });
}

/** How far an upload is. */
export interface UploadProgress {
  /** Bytes that were handed to the connection. */
  done: number;
  total: number;
}

export interface UploadOptions extends CallOptions {
  /** Encoding of the bytes. */
  format: DataFormat;
  /** For people; need not be unique. */
  name?: string;
  onProgress?: (progress: UploadProgress) => void;
}

/** Stores the bytes of a file here, or bytes, on the server; what the server has already is not sent. */
export async function upload(calls: Calls, data: string | Uint8Array, options: UploadOptions): Promise<Dataset | undefined> {
  const { sha256, total } = await measured(data);
  const known = await find(calls, `sha256:${sha256}`, options);
  if (known?.format === options.format) return known;
  const retry = calls.streamRetry();
  for (;;) {
    const attempt = new Attempt(data, sha256, total, options);
    try {
      const { signal } = options;
      const response = await calls.stub.uploadDataset(attempt.requests(), signal ? { signal } : {});
      retry.heard();
      return response.dataset;
    } catch (thrown) {
      if (attempt.failure !== undefined) throw attempt.failure;
      const lost = calls.translated(thrown, options.signal);
      if (!connectionLost(lost)) throw lost;
      await retry.wait(lost, options.signal);
    }
  }
}

/** The messages of one attempt; `failure` is what reading the data, or the user's callback, threw. */
class Attempt {
  failure: unknown;

  constructor(
    private readonly data: string | Uint8Array,
    private readonly sha256: string,
    private readonly total: number,
    private readonly options: UploadOptions,
  ) {}

  async *requests(): AsyncGenerator<UploadDatasetRequest, void> {
    const { name = "", format, onProgress } = this.options;
    yield create(UploadDatasetRequestSchema, { part: { case: "header", value: { name, format, sha256: this.sha256 } } });
    const reading = chunks(this.data);
    try {
      for (let done = 0; ; ) {
        const { value: chunk } = await this.#own(() => reading.next());
        if (chunk === undefined) return;
        yield create(UploadDatasetRequestSchema, { part: { case: "chunk", value: chunk } });
        done += chunk.length;
        await this.#own(() => onProgress?.({ done, total: this.total }));
      }
    } finally {
      await reading.return();
    }
  }

  /** Does what is not the connection's part. A call that ends early throws at the `yield`, which is no failure here. */
  async #own<Result>(act: () => Result | Promise<Result>): Promise<Result> {
    try {
      return await act();
    } catch (failure) {
      this.failure = failure;
      throw failure;
    }
  }
}

async function* chunks(data: string | Uint8Array): AsyncGenerator<Uint8Array<ArrayBuffer>, void> {
  if (typeof data === "string") {
    for await (const chunk of createReadStream(data, { highWaterMark: CHUNK_BYTES })) yield chunk as Uint8Array<ArrayBuffer>;
    return;
  }
  for (let at = 0; at < data.length; at += CHUNK_BYTES) yield new Uint8Array(data.subarray(at, at + CHUNK_BYTES));
}

async function measured(data: string | Uint8Array): Promise<{ sha256: string; total: number }> {
  const hash = createHash("sha256");
  for await (const chunk of chunks(data)) hash.update(chunk);
  return { sha256: hash.digest("hex"), total: typeof data === "string" ? (await stat(data)).size : data.length };
}

async function find(calls: Calls, datasetId: string, options: CallOptions): Promise<Dataset | undefined> {
  try {
    return (await calls.unary((rpc) => calls.stub.getDataset({ datasetId }, rpc), options)).dataset;
  } catch (error) {
    if (error instanceof UnslothdError && error.kind === "NotFound") return undefined;
    throw error;
  }
}
