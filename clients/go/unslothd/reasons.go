package unslothd

// Reason is the stable name of a cause, ErrorReason of the contract without its prefix. Ask with errors.Is:
//
//	if errors.Is(err, unslothd.ReasonModelBusy) { … }
//
// A newer server may give reasons that are not among the constants; treat those by their Kind.
type Reason string

// Error makes a Reason a target of errors.Is.
func (r Reason) Error() string { return "unslothd: " + string(r) }

// Reasons; docs/errors.md says what each means.
const (
	ReasonInvalidField        Reason = "INVALID_FIELD"
	ReasonDatasetEmpty        Reason = "DATASET_EMPTY"
	ReasonDatasetColumns      Reason = "DATASET_COLUMNS"
	ReasonDatasetRow          Reason = "DATASET_ROW"
	ReasonDatasetDamaged      Reason = "DATASET_DAMAGED"
	ReasonModelNotFound       Reason = "MODEL_NOT_FOUND"
	ReasonModelSourceNotFound Reason = "MODEL_SOURCE_NOT_FOUND"
	ReasonTrainingNotFound    Reason = "TRAINING_NOT_FOUND"
	ReasonDatasetNotFound     Reason = "DATASET_NOT_FOUND"
	ReasonCheckpointNotFound  Reason = "CHECKPOINT_NOT_FOUND"
	ReasonArtifactNotFound    Reason = "ARTIFACT_NOT_FOUND"
	ReasonModelNotPrepared    Reason = "MODEL_NOT_PREPARED"
	ReasonModelNotReady       Reason = "MODEL_NOT_READY"
	ReasonModelBusy           Reason = "MODEL_BUSY"
	ReasonAlreadyPrepared     Reason = "ALREADY_PREPARED"
	ReasonUnsafeWeights       Reason = "UNSAFE_WEIGHTS"
	ReasonRemoteCodeRefused   Reason = "REMOTE_CODE_REFUSED"
	ReasonTrainingState       Reason = "TRAINING_STATE"
	ReasonDatasetInUse        Reason = "DATASET_IN_USE"
	ReasonCheckpointDamaged   Reason = "CHECKPOINT_DAMAGED"
	ReasonExportUnsupported   Reason = "EXPORT_UNSUPPORTED"
	ReasonRequestIdReused     Reason = "REQUEST_ID_REUSED"
	ReasonOutputDirTaken      Reason = "OUTPUT_DIR_TAKEN"
	ReasonModelIdTaken        Reason = "MODEL_ID_TAKEN"
	ReasonNotWritable         Reason = "NOT_WRITABLE"
	ReasonHubTokenInPlainText Reason = "HUB_TOKEN_IN_PLAIN_TEXT"
	ReasonPathNotAllowed      Reason = "PATH_NOT_ALLOWED"
	ReasonHubAccessDenied     Reason = "HUB_ACCESS_DENIED"
	ReasonInsufficientScope   Reason = "INSUFFICIENT_SCOPE"
	ReasonInsufficientMemory  Reason = "INSUFFICIENT_MEMORY"
	ReasonMessageTooLarge     Reason = "MESSAGE_TOO_LARGE"
	ReasonTooManyModels       Reason = "TOO_MANY_MODELS"
	ReasonQueueFull           Reason = "QUEUE_FULL"
	ReasonOutOfMemory         Reason = "OUT_OF_MEMORY"
	ReasonDiskFull            Reason = "DISK_FULL"
	ReasonDatasetTooLarge     Reason = "DATASET_TOO_LARGE"
	ReasonTooManyRequests     Reason = "TOO_MANY_REQUESTS"
	ReasonTooManyStreams      Reason = "TOO_MANY_STREAMS"
	ReasonInlineRowsTooLarge  Reason = "INLINE_ROWS_TOO_LARGE"
	ReasonDeadlineTooLong     Reason = "DEADLINE_TOO_LONG"
	ReasonSequenceOutOfRange  Reason = "SEQUENCE_OUT_OF_RANGE"
	ReasonOffsetOutOfRange    Reason = "OFFSET_OUT_OF_RANGE"
	ReasonHubUnreachable      Reason = "HUB_UNREACHABLE"
	ReasonServerStopping      Reason = "SERVER_STOPPING"
	ReasonWorkerDied          Reason = "WORKER_DIED"
	ReasonTrainingCancelled   Reason = "TRAINING_CANCELLED"
	ReasonWorkerUnresponsive  Reason = "WORKER_UNRESPONSIVE"
	ReasonUploadStalled       Reason = "UPLOAD_STALLED"
	ReasonNotImplemented      Reason = "NOT_IMPLEMENTED"
	ReasonInternal            Reason = "INTERNAL"
	ReasonTokenMissing        Reason = "TOKEN_MISSING"
	ReasonTokenUnknown        Reason = "TOKEN_UNKNOWN"
	ReasonTokenExpired        Reason = "TOKEN_EXPIRED"
)
