package unslothd

import (
	"context"

	"google.golang.org/grpc"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// eventsAResponse is how many events a response of WatchTraining may have: a long log comes many at a time, and whoever
// keeps up gets each as it happens.
const eventsAResponse = 200

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
		TrainingId: r.trainingID, AfterSequence: r.sequence, MaxEvents: eventsAResponse,
	})
	return opened(stream, err, cancel, true)
}

type holdsEvent interface{ GetEvent() *pb.TrainingEvent }

// holdsEvents is a response of WatchTraining; an older server sends one event at a time.
type holdsEvents interface{ GetEvents() []*pb.TrainingEvent }

func opened[Response any, Message interface {
	*Response
	holdsEvent
}](stream grpc.ServerStreamingClient[Response], err error, cancel context.CancelFunc, watching bool) *eventStream {
	var further []*pb.TrainingEvent
	receive := func() (*pb.TrainingEvent, error) {
		if err != nil {
			return nil, err // a call that cannot even start is lost like one that breaks
		}
		if len(further) > 0 {
			event := further[0]
			further = further[1:]
			return event, nil
		}
		response, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if several, ok := any(response).(holdsEvents); ok && len(several.GetEvents()) > 0 {
			further = several.GetEvents()[1:]
			return several.GetEvents()[0], nil
		}
		return Message(response).GetEvent(), nil
	}
	return &eventStream{receive, cancel, watching}
}
