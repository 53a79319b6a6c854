// Package unslothdgo_test checks that the stubs are whole: a message and a call survive the wire.
package unslothdgo_test

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	unslothdv1 "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

func TestAMessageSurvivesTheWire(t *testing.T) {
	sent := &unslothdv1.Training{
		TrainingId: "training-1",
		State:      unslothdv1.Training_STATE_FAILED,
		Config:     &unslothdv1.TrainingConfig{LearningRate: proto.Float64(2e-4), WarmupSteps: proto.Int32(0)},
		Error:      &status.Status{Code: 8, Message: "out of memory"},
	}
	bytes, err := proto.Marshal(sent)
	if err != nil {
		t.Fatal(err)
	}
	received := &unslothdv1.Training{}
	if err := proto.Unmarshal(bytes, received); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(sent, received) {
		t.Fatalf("sent %v, received %v", sent, received)
	}
	if received.Config.WarmupSteps == nil || received.Config.MaxSteps != nil {
		t.Fatal("an optional field that is set to 0 must differ from one that is unset")
	}
}

type trainer struct {
	unslothdv1.UnimplementedUnslothServiceServer
}

func (trainer) Train(_ *unslothdv1.TrainRequest, stream grpc.ServerStreamingServer[unslothdv1.TrainResponse]) error {
	for sequence := uint64(1); sequence <= 3; sequence++ {
		event := &unslothdv1.TrainingEvent{Sequence: sequence}
		if err := stream.Send(&unslothdv1.TrainResponse{Event: event}); err != nil {
			return err
		}
	}
	return nil
}

func TestATrainingIsAStreamOfNumberedEvents(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	unslothdv1.RegisterUnslothServiceServer(server, trainer{})
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	connection, err := grpc.NewClient("passthrough:///memory",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()

	stream, err := unslothdv1.NewUnslothServiceClient(connection).Train(ctx, &unslothdv1.TrainRequest{ModelId: "m"})
	if err != nil {
		t.Fatal(err)
	}
	for want := uint64(1); want <= 3; want++ {
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if got := response.GetEvent().GetSequence(); got != want {
			t.Fatalf("event %d came in place of %d", got, want)
		}
	}
}
