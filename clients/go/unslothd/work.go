package unslothd

import (
	"context"
	"errors"
	"io"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// LoadModel loads a model into a worker of its own and waits until it is ready. A request without a request_id gets one,
// so that a lost connection attaches to the same load. onProgress, which may be nil, is called with each step. A Hugging
// Face token is not sent to another host without TLS: ReasonHubTokenInPlainText.
func (c *Client) LoadModel(
	ctx context.Context, request *pb.LoadModelRequest, onProgress func(*pb.LoadProgress),
) (*pb.Model, error) {
	if request.GetToken() != "" && c.exposed {
		return nil, &Error{
			Kind:    FailedPrecondition,
			Code:    codes.FailedPrecondition,
			Reason:  ReasonHubTokenInPlainText,
			Message: inPlainText("Hugging Face token", c.target),
		}
	}
	request = proto.Clone(request).(*pb.LoadModelRequest)
	if request.GetRequestId() == "" {
		request.RequestId = uuid.NewString()
	}
	retry := c.streamRetry()
	for {
		stream := opening(ctx, request, c.stub.LoadModel)
		model, lost := resultOf(ctx, c, retry, stream, (*pb.LoadModelResponse).GetModel, func(m *pb.LoadModelResponse) {
			if onProgress != nil {
				onProgress(m.GetProgress())
			}
		})
		if lost == nil {
			return model, nil
		}
		if !connectionLost(lost) && lost.Code != codes.OK {
			return nil, lost
		}
		if err := retry.wait(ctx, lost); err != nil {
			return nil, err
		}
	}
}

// Export writes a model in another form on the server and waits until it is done; Download fetches the files.
// onProgress, which may be nil, is called with each step.
//
// After a lost connection the same request attaches to the export while it runs. One that has ended meanwhile is begun
// again, or refused because its own output_dir is taken.
func (c *Client) Export(
	ctx context.Context, request *pb.ExportModelRequest, onProgress func(*pb.ExportProgress),
) (*pb.Artifact, error) {
	retry := c.streamRetry()
	for wasLost := false; ; wasLost = true {
		stream := opening(ctx, request, c.stub.ExportModel)
		artifact, lost := resultOf(ctx, c, retry, stream, (*pb.ExportModelResponse).GetArtifact, func(m *pb.ExportModelResponse) {
			if onProgress != nil {
				onProgress(m.GetProgress())
			}
		})
		if lost == nil {
			return artifact, nil
		}
		if lost.Kind == AlreadyExists && wasLost {
			lost.Message += " It may be this very export, which ended while the connection was lost."
		}
		if !connectionLost(lost) && lost.Code != codes.OK {
			return nil, lost
		}
		if err := retry.wait(ctx, lost); err != nil {
			return nil, err
		}
	}
}

// call is one attempt at a stream of responses.
type call[Response any] struct {
	grpc.ServerStreamingClient[Response]
	failure error // of the start
	name    string
	close   context.CancelFunc
}

func opening[Request proto.Message, Response any](
	ctx context.Context, request Request,
	start func(context.Context, Request, ...grpc.CallOption) (grpc.ServerStreamingClient[Response], error),
) *call[Response] {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := start(ctx, request)
	name := string(request.ProtoReflect().Descriptor().Name())
	return &call[Response]{stream, err, name[:len(name)-len("Request")], cancel}
}

func (s *call[Response]) receive() (*Response, error) {
	if s.failure != nil {
		return nil, s.failure
	}
	return s.Recv()
}

// resultOf reads a stream of progress up to its result.
func resultOf[Response any, Result comparable](
	ctx context.Context, c *Client, retry *retry, stream *call[Response],
	result func(*Response) Result, onProgress func(*Response),
) (Result, *Error) {
	defer stream.close()
	var none Result
	for {
		message, err := stream.receive()
		if errors.Is(err, io.EOF) {
			return none, endedEarly(stream.name)
		}
		if err != nil {
			return none, c.translated(ctx, err)
		}
		retry.progress()
		if found := result(message); found != none {
			return found, nil
		}
		onProgress(message)
	}
}
