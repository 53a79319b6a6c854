package unslothd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const errorDomain = "unslothd"

// Kind is the class of an error; the names are those of the exceptions of the Python client. Ask with errors.Is:
//
//	if errors.Is(err, unslothd.NotFound) { … }
type Kind string

// Kinds of errors.
const (
	// Other is an error with a code that has no kind of its own.
	Other Kind = "UnslothdError"
	// InvalidRequest: fields or rows are wrong; Error.FieldViolations names every wrong field.
	InvalidRequest Kind = "InvalidRequest"
	// Unauthenticated: no token, or one that the server does not know.
	Unauthenticated Kind = "Unauthenticated"
	// PermissionDenied: the operator or the Hub does not allow it.
	PermissionDenied Kind = "PermissionDenied"
	// NotFound: what the request names does not exist.
	NotFound Kind = "NotFound"
	// AlreadyExists: the name is taken.
	AlreadyExists Kind = "AlreadyExists"
	// FailedPrecondition: the call is right, but not in this state.
	FailedPrecondition Kind = "FailedPrecondition"
	// ResourceExhausted: memory, disk, a queue, the size of a message.
	ResourceExhausted Kind = "ResourceExhausted"
	// OutOfRange: a position that does not exist.
	OutOfRange Kind = "OutOfRange"
	// Aborted: it began and was ended.
	Aborted Kind = "Aborted"
	// Unavailable: not now; the same call may succeed later.
	Unavailable Kind = "Unavailable"
	// DeadlineExceeded: no answer in time. The call may have taken effect all the same.
	DeadlineExceeded Kind = "DeadlineExceeded"
	// Unimplemented: the contract has this call, the server does not serve it.
	Unimplemented Kind = "Unimplemented"
	// Internal: a bug in the server; the text names the id that its log explains.
	Internal Kind = "Internal"
	// TrainingFailed: a training ended in STATE_FAILED; code, reason and text are those of its cause.
	TrainingFailed Kind = "TrainingFailed"
	// TrainingCancelled: a training was stopped on request. It is Aborted, too.
	TrainingCancelled Kind = "TrainingCancelled"
)

// Error makes a Kind a target of errors.Is.
func (k Kind) Error() string { return "unslothd: " + string(k) }

var kinds = map[codes.Code]Kind{
	codes.InvalidArgument:    InvalidRequest,
	codes.Unauthenticated:    Unauthenticated,
	codes.PermissionDenied:   PermissionDenied,
	codes.NotFound:           NotFound,
	codes.AlreadyExists:      AlreadyExists,
	codes.FailedPrecondition: FailedPrecondition,
	codes.ResourceExhausted:  ResourceExhausted,
	codes.OutOfRange:         OutOfRange,
	codes.Aborted:            Aborted,
	codes.Unavailable:        Unavailable,
	codes.DeadlineExceeded:   DeadlineExceeded,
	codes.Unimplemented:      Unimplemented,
	codes.Internal:           Internal,
}

// FieldViolation is one wrong field of a request.
type FieldViolation struct {
	Field       string // path in the request, e.g. "training_config.learning_rate"
	Description string // what is wrong with it and what would be right
}

// Error is every error that a call of this package ends with, but for those of local files.
//
// Get it with errors.As; tell causes apart with errors.Is and a Kind or a Reason. When a context ended the call, the
// context's error is wrapped.
type Error struct {
	Kind            Kind
	Code            codes.Code
	Reason          Reason            // empty when the error is not the server's own
	Message         string            // for people: what happened and what to do next
	Metadata        map[string]string // figures for programs, e.g. "needed_bytes"
	FieldViolations []FieldViolation  // every wrong field of the request
	RetryAfter      time.Duration     // when the same call may succeed; 0 = nobody knows
	TrainingID      string            // of TrainingFailed and TrainingCancelled
	cause           error
}

// Error returns the message, with the reason before it where there is one.
func (e *Error) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("%s: %s", e.Reason, e.Message)
	}
	return e.Message
}

// Is makes errors.Is know a Kind and a Reason.
func (e *Error) Is(target error) bool {
	switch target := target.(type) {
	case Kind:
		return target == e.Kind || (target == Aborted && e.Kind == TrainingCancelled)
	case Reason:
		return target != "" && target == e.Reason
	}
	return false
}

// Unwrap returns the error of gRPC or of the context that this one was made from.
func (e *Error) Unwrap() error { return e.cause }

// translated returns the error of a call that gRPC ended with err; nil for nil.
func (c *Client) translated(ctx context.Context, err error) *Error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ended(ctx)
	}
	found := status.Convert(err)
	if own := fromStatus(found.Proto()); own.Reason != "" {
		own.cause = err
		return own
	}
	text := fmt.Sprintf("%s (server %s)", found.Message(), c.target)
	if hint := hintFor(found.Code(), found.Message()); hint != "" {
		text += ". " + hint
	}
	return &Error{Kind: kindOf(found.Code()), Code: found.Code(), Message: text, cause: err}
}

// ended returns the error of a call whose context has ended.
func ended(ctx context.Context) *Error {
	code := codes.Canceled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	return &Error{Kind: kindOf(code), Code: code, Message: context.Cause(ctx).Error(), cause: ctx.Err()}
}

func kindOf(code codes.Code) Kind {
	if kind, known := kinds[code]; known {
		return kind
	}
	return Other
}

func fromStatus(s *rpcstatus.Status) *Error {
	code := codes.Code(s.GetCode())
	result := &Error{Kind: kindOf(code), Code: code, Message: s.GetMessage()}
	for _, detail := range status.FromProto(s).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == errorDomain {
				result.Reason, result.Metadata = Reason(detail.GetReason()), detail.GetMetadata()
			}
		case *errdetails.BadRequest:
			for _, each := range detail.GetFieldViolations() {
				result.FieldViolations = append(result.FieldViolations, FieldViolation{each.GetField(), each.GetDescription()})
			}
		case *errdetails.RetryInfo:
			result.RetryAfter = detail.GetRetryDelay().AsDuration()
		}
	}
	return result
}

func trainingFailed(s *rpcstatus.Status, trainingID string) *Error {
	err := fromStatus(s)
	err.Kind, err.TrainingID = TrainingFailed, trainingID
	if err.Message == "" {
		err.Message = fmt.Sprintf("training %s failed", trainingID)
	}
	return err
}

func trainingCancelled(trainingID string, step int32) *Error {
	return &Error{
		Kind:       TrainingCancelled,
		Code:       codes.Aborted,
		Reason:     ReasonTrainingCancelled,
		Message:    fmt.Sprintf("training %s was cancelled after step %d", trainingID, step),
		Metadata:   map[string]string{"step": fmt.Sprint(step)},
		TrainingID: trainingID,
	}
}

// endedEarly is the error of a stream that ended well, but before its last message.
func endedEarly(what string) *Error {
	return &Error{Kind: Unavailable, Code: codes.OK, Message: what + " ended before its last message"}
}

// localError is an error that the client found itself.
func localError(code codes.Code, format string, values ...any) *Error {
	return &Error{Kind: kindOf(code), Code: code, Message: fmt.Sprintf(format, values...)}
}
