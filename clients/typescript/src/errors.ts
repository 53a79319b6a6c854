/** What can go wrong in a call: one class whose `kind` has the names of the Python client's exceptions. */
import { Code, ConnectError } from "@connectrpc/connect";
import { fromBinary } from "@bufbuild/protobuf";

import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../gen/google/rpc/error_details_pb.js";
import type { Status } from "../gen/google/rpc/status_pb.js";
import type { ErrorReason } from "../gen/unslothd/v1/error_reason_pb.js";
import { explained } from "./hints.js";

const DOMAIN = "unslothd";

/** Class of an error. `TrainingCancelled` is an `Aborted`, too: ask with `error.is`. */
export type Kind =
  | "UnslothdError" // a code that has no kind of its own
  | "InvalidRequest" // fields or rows are wrong; fieldViolations names every wrong field
  | "Unauthenticated" // no token, or one that the server does not know
  | "PermissionDenied" // the operator or the Hub does not allow it
  | "NotFound" // what the request names does not exist
  | "AlreadyExists" // the name is taken
  | "FailedPrecondition" // the call is right, but not in this state
  | "ResourceExhausted" // memory, disk, a queue, the size of a message
  | "OutOfRange" // a position that does not exist
  | "Aborted" // it began and was ended
  | "Unavailable" // not now; the same call may succeed later
  | "DeadlineExceeded" // no answer in time; the call may have taken effect all the same
  | "Unimplemented" // the contract has this call, the server does not serve it
  | "Internal" // a bug in the server; the text names the id that its log explains
  | "TrainingFailed" // a training ended in STATE_FAILED; code, reason and text are those of its cause
  | "TrainingCancelled"; // a training was stopped on request

/** Names of ErrorReason without the prefix; a newer server may give others. */
export type Reason = Exclude<keyof typeof ErrorReason, "UNSPECIFIED">;

/** One wrong field of a request. */
export interface FieldViolation {
  /** Path in the request, e.g. "training_config.learning_rate". */
  field: string;
  /** What is wrong with it and what would be right. */
  description: string;
}

const KINDS: Partial<Record<Code, Kind>> = {
  [Code.InvalidArgument]: "InvalidRequest",
  [Code.Unauthenticated]: "Unauthenticated",
  [Code.PermissionDenied]: "PermissionDenied",
  [Code.NotFound]: "NotFound",
  [Code.AlreadyExists]: "AlreadyExists",
  [Code.FailedPrecondition]: "FailedPrecondition",
  [Code.ResourceExhausted]: "ResourceExhausted",
  [Code.OutOfRange]: "OutOfRange",
  [Code.Aborted]: "Aborted",
  [Code.Unavailable]: "Unavailable",
  [Code.DeadlineExceeded]: "DeadlineExceeded",
  [Code.Unimplemented]: "Unimplemented",
  [Code.Internal]: "Internal",
};

/** What an error carries besides its text. */
export interface ErrorFields {
  kind: Kind;
  /** Code of gRPC; undefined for a stream that ended well, but too early. */
  code?: Code | undefined;
  reason?: string;
  metadata?: Record<string, string>;
  fieldViolations?: FieldViolation[];
  retryAfterMs?: number;
  trainingId?: string;
  cause?: unknown;
}

/** Every error that a call ends with, but for those of local files and of an AbortSignal. */
export class UnslothdError extends Error {
  override readonly name = "UnslothdError";
  readonly kind: Kind;
  readonly code: Code | undefined;
  /** Stable name of the cause ("MODEL_NOT_FOUND"); empty when the error is not the server's own. */
  readonly reason: Reason | "" | (string & {});
  /** Figures for programs, e.g. needed_bytes. */
  readonly metadata: Record<string, string>;
  /** Every wrong field of the request. */
  readonly fieldViolations: FieldViolation[];
  /** When the same call may succeed; 0 = nobody knows. */
  readonly retryAfterMs: number;
  /** Of TrainingFailed and TrainingCancelled. */
  readonly trainingId: string;

  constructor(message: string, fields: ErrorFields) {
    super(message, { cause: fields.cause });
    this.kind = fields.kind;
    this.code = fields.code;
    this.reason = fields.reason ?? "";
    this.metadata = fields.metadata ?? {};
    this.fieldViolations = fields.fieldViolations ?? [];
    this.retryAfterMs = fields.retryAfterMs ?? 0;
    this.trainingId = fields.trainingId ?? "";
  }

  /** True for its own kind, and for Aborted when a training was cancelled. */
  is(kind: Kind): boolean {
    return this.kind === kind || (kind === "Aborted" && this.kind === "TrainingCancelled");
  }
}

export function kindOf(code: Code): Kind {
  return KINDS[code] ?? "UnslothdError";
}

/**
 * The error for what a call threw. For errors that are not the server's own: `target` is in their text, `heard` says
 * whether the server has ever answered.
 */
export function fromThrown(thrown: unknown, target: string, heard: boolean): UnslothdError {
  if (thrown instanceof UnslothdError) return thrown;
  const error = ConnectError.from(thrown);
  const info = error.findDetails(ErrorInfoSchema).find((each) => each.domain === DOMAIN && each.reason !== "");
  if (info === undefined) {
    const { code, hint } = explained(error.code, error.cause, heard);
    const text = `${error.rawMessage.trim() || Code[code]} (server ${target})${hint ? `. ${hint}` : ""}`;
    return new UnslothdError(text, { kind: kindOf(code), code, cause: thrown });
  }
  return new UnslothdError(error.rawMessage, {
    kind: kindOf(error.code),
    code: error.code,
    reason: info.reason,
    metadata: info.metadata,
    fieldViolations: error.findDetails(BadRequestSchema).flatMap(violations),
    retryAfterMs: milliseconds(error.findDetails(RetryInfoSchema)[0]?.retryDelay),
    cause: thrown,
  });
}

/** The error of a Hugging Face token that is not sent, with the reason that a server refuses it by. */
export function hubTokenInPlainText(message: string): UnslothdError {
  return new UnslothdError(message, {
    kind: "FailedPrecondition", code: Code.FailedPrecondition, reason: "HUB_TOKEN_IN_PLAIN_TEXT",
  });
}

/** The error of a training that ended in STATE_FAILED with this status. */
export function trainingFailed(status: Status | undefined, trainingId: string): UnslothdError {
  const fields: ErrorFields = { kind: "TrainingFailed", code: status?.code ?? Code.Unknown, trainingId };
  for (const { typeUrl, value } of status?.details ?? []) {
    if (typeUrl.endsWith("/google.rpc.ErrorInfo")) {
      const info = fromBinary(ErrorInfoSchema, value);
      if (info.domain === DOMAIN) Object.assign(fields, { reason: info.reason, metadata: info.metadata });
    } else if (typeUrl.endsWith("/google.rpc.BadRequest")) {
      fields.fieldViolations = violations(fromBinary(BadRequestSchema, value));
    } else if (typeUrl.endsWith("/google.rpc.RetryInfo")) {
      fields.retryAfterMs = milliseconds(fromBinary(RetryInfoSchema, value).retryDelay);
    }
  }
  return new UnslothdError(status?.message || `training ${trainingId} failed`, fields);
}

/** The error of a training that was stopped on request after this optimizer step. */
export function trainingCancelled(trainingId: string, step: number): UnslothdError {
  return new UnslothdError(`training ${trainingId} was cancelled after step ${step}`, {
    kind: "TrainingCancelled",
    code: Code.Aborted,
    reason: "TRAINING_CANCELLED",
    metadata: { step: String(step) },
    trainingId,
  });
}

/** The error of a stream that ended well, but before its last message. */
export function endedEarly(what: string): UnslothdError {
  return new UnslothdError(`${what} ended before its last message`, { kind: "Unavailable" });
}

/** The error that the client found itself. */
export function localError(code: Code, message: string): UnslothdError {
  return new UnslothdError(message, { kind: kindOf(code), code });
}

function violations(bad: { fieldViolations: FieldViolation[] }): FieldViolation[] {
  return bad.fieldViolations.map(({ field, description }) => ({ field, description }));
}

function milliseconds(delay: { seconds: bigint; nanos: number } | undefined): number {
  return delay === undefined ? 0 : Number(delay.seconds) * 1000 + delay.nanos / 1e6;
}
