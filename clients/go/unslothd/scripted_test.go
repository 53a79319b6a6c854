package unslothd_test

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

const trainingID = "training-20261124-120000-abcdef"

// script is a server whose n-th call of Train or WatchTraining is answered by the n-th turn.
type script struct {
	pb.UnimplementedUnslothServiceServer
	mutex    sync.Mutex
	turns    []turn
	after    []uint64 // what each call asked for; 0 is Train or the beginning
	ids      []string // request_id of each Train
	headers  metadata.MD
	loaded   []string // Hub token of each LoadModel
	training *pb.Training
	stored   *pb.UploadDatasetHeader
	file     []byte
	offsets  []int64
	breakAt  int
}

type turn struct {
	events []*pb.TrainingEvent
	end    error
}

func (s *script) play(ctx context.Context, after uint64, send func(*pb.TrainingEvent) error) error {
	s.mutex.Lock()
	s.after = append(s.after, after)
	s.headers, _ = metadata.FromIncomingContext(ctx)
	if len(s.turns) == 0 {
		s.mutex.Unlock()
		<-ctx.Done() // a silent server
		return ctx.Err()
	}
	now := s.turns[0]
	s.turns = s.turns[1:]
	s.mutex.Unlock()
	for _, event := range now.events {
		if err := send(event); err != nil {
			return err
		}
	}
	return now.end
}

func (s *script) Train(request *pb.TrainRequest, stream grpc.ServerStreamingServer[pb.TrainResponse]) error {
	s.ids = append(s.ids, request.GetRequestId())
	return s.play(stream.Context(), 0, func(event *pb.TrainingEvent) error {
		return stream.Send(&pb.TrainResponse{Event: event})
	})
}

func (s *script) WatchTraining(
	request *pb.WatchTrainingRequest, stream grpc.ServerStreamingServer[pb.WatchTrainingResponse],
) error {
	return s.play(stream.Context(), request.GetAfterSequence(), func(event *pb.TrainingEvent) error {
		return stream.Send(&pb.WatchTrainingResponse{Event: event})
	})
}

func (s *script) GetServerInfo(ctx context.Context, _ *pb.GetServerInfoRequest) (*pb.GetServerInfoResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.headers, _ = metadata.FromIncomingContext(ctx)
	return &pb.GetServerInfoResponse{ServerVersion: "1"}, nil
}

func (s *script) LoadModel(request *pb.LoadModelRequest, stream grpc.ServerStreamingServer[pb.LoadModelResponse]) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.loaded = append(s.loaded, request.GetToken())
	return stream.Send(&pb.LoadModelResponse{Result: &pb.LoadModelResponse_Model{Model: &pb.Model{ModelId: "m"}}})
}

func (s *script) GetTraining(context.Context, *pb.GetTrainingRequest) (*pb.GetTrainingResponse, error) {
	if s.training == nil {
		return nil, refusal(codes.NotFound, "TRAINING_NOT_FOUND", nil)
	}
	return &pb.GetTrainingResponse{Training: s.training}, nil
}

func (s *script) GetModel(ctx context.Context, _ *pb.GetModelRequest) (*pb.GetModelResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// serve starts the script on a free port and returns a client of it.
func serve(t *testing.T, s *script, options ...unslothd.Option) *unslothd.Client {
	t.Helper()
	client, err := unslothd.New(listen(t, s), options...)
	must(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// listen starts a server and returns where.
func listen(t *testing.T, s *script, options ...grpc.ServerOption) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := grpc.NewServer(options...)
	pb.RegisterUnslothServiceServer(server, s)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func steps(sequences ...uint64) []*pb.TrainingEvent {
	var events []*pb.TrainingEvent
	for _, sequence := range sequences {
		step := &pb.TrainingEvent_Step{Step: &pb.StepProgress{Step: int32(sequence)}}
		events = append(events, &pb.TrainingEvent{Sequence: sequence, TrainingId: trainingID, Kind: step})
	}
	return events
}

func succeeded(sequence uint64) *pb.TrainingEvent {
	metrics := &pb.TrainingMetrics{TrainLoss: 0.5}
	kind := &pb.TrainingEvent_Succeeded{Succeeded: &pb.TrainingSucceeded{Metrics: metrics}}
	return &pb.TrainingEvent{Sequence: sequence, TrainingId: trainingID, Kind: kind}
}

func failed(sequence uint64) *pb.TrainingEvent {
	cause := status.Convert(refusal(codes.ResourceExhausted, "OUT_OF_MEMORY", nil)).Proto()
	kind := &pb.TrainingEvent_Failed{Failed: &pb.TrainingFailed{Error: cause}}
	return &pb.TrainingEvent{Sequence: sequence, TrainingId: trainingID, Kind: kind}
}

var lost = status.Error(codes.Unavailable, "Socket closed")

// refusal is an error as a server of unslothd makes it.
func refusal(code codes.Code, reason string, fields map[string]string) error {
	bad := &errdetails.BadRequest{}
	for field, description := range fields {
		violation := &errdetails.BadRequest_FieldViolation{Field: field, Description: description}
		bad.FieldViolations = append(bad.FieldViolations, violation)
	}
	made, err := status.New(code, "no").WithDetails(
		&errdetails.ErrorInfo{Reason: reason, Domain: "unslothd", Metadata: map[string]string{"needed_bytes": "7"}},
		bad, &errdetails.RetryInfo{RetryDelay: durationpb.New(3 * time.Second)},
	)
	if err != nil {
		panic(err)
	}
	return made.Err()
}

func (s *script) GetDataset(context.Context, *pb.GetDatasetRequest) (*pb.GetDatasetResponse, error) {
	return nil, refusal(codes.NotFound, "DATASET_NOT_FOUND", nil)
}
