/**
 * A client of unslothd, fine-tuning as a service.
 *
 * `Client` is where to begin; requests and answers are the messages of the contract, exported here, too. The names and
 * rules are those of the clients in Python and Go: docs/clients.md shows them side by side.
 */
export { Client, type CallOptions, type ClientOptions } from "./client.js";
export { DEFAULT_TARGET, tlsFromFiles, type TlsOptions } from "./connecting.js";
export { hubDataset, rows, serverPath, uploadedDataset, type UploadOptions, type UploadProgress } from "./dataset.js";
export type { DownloadOptions, DownloadProgress } from "./download.js";
export { UnslothdError, type FieldViolation, type Kind } from "./errors.js";
export type { TextStream } from "./generate.js";
export type { TrainingRun } from "./training.js";
export * from "./contract.js";
