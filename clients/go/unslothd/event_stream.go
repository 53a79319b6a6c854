package unslothd

import (
	"context"

	"google.golang.org/grpc"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// outcome is how a training ended: exactly one of the two is set.
type outcome struct {
	metrics *pb.TrainingMetrics
	err     *Error
}

func outcomeOf(event *pb.TrainingEvent) *outcome {
	switch kind := event.GetKind().(type) {
	case *pb.TrainingEvent_Succeeded:
		return &outcome{metrics: kind.Succeeded.GetMetrics()}
	case *pb.TrainingEvent_Failed:
		return &outcome{err: trainingFailed(kind.Failed.GetError(), event.GetTrainingId())}
	case *pb.TrainingEvent_Cancelled:
		return &outcome{err: trainingCancelled(event.GetTrainingId(), kind.Cancelled.GetStep())}
	}
	return nil
}

// eventStream is an open call of Train or WatchTraining.
type eventStream struct {
	receive  func() (*pb.TrainingEvent, error)
	close    context.CancelFunc
	watching bool
}

// open calls Train until the first event is here; the log is read on from the last sequence then.
func (r *TrainingRun) open() *eventStream {
	ctx, cancel := context.WithCancel(r.ctx)
	if r.sequence == 0 && r.request != nil {
		stream, err := r.client.stub.Train(ctx, r.request)
		return opened(stream, err, cancel, false)
	}
	stream, err := r.client.stub.WatchTraining(ctx, &pb.WatchTrainingRequest{
		TrainingId: r.trainingID, AfterSequence: r.sequence,
	})
	return opened(stream, err, cancel, true)
}

type holdsEvent interface{ GetEvent() *pb.TrainingEvent }

func opened[Response any, Message interface {
	*Response
	holdsEvent
}](stream grpc.ServerStreamingClient[Response], err error, cancel context.CancelFunc, watching bool) *eventStream {
	receive := func() (*pb.TrainingEvent, error) {
		if err != nil {
			return nil, err // a call that cannot even start is lost like one that breaks
		}
		response, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		return Message(response).GetEvent(), nil
	}
	return &eventStream{receive, cancel, watching}
}
