/** The contract of unslothd in TypeScript: every message, and the service for `createClient` of @connectrpc/connect. */
export * from "../gen/unslothd/v1/artifact_pb.js";
export * from "../gen/unslothd/v1/dataset_pb.js";
export * from "../gen/unslothd/v1/error_reason_pb.js";
export * from "../gen/unslothd/v1/generation_pb.js";
export * from "../gen/unslothd/v1/model_pb.js";
export * from "../gen/unslothd/v1/server_info_pb.js";
export * from "../gen/unslothd/v1/service_pb.js";
export * from "../gen/unslothd/v1/training_event_pb.js";
export * from "../gen/unslothd/v1/training_pb.js";
export { BadRequestSchema, ErrorInfoSchema } from "../gen/google/rpc/error_details_pb.js";
