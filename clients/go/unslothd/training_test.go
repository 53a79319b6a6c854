package unslothd_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

// read returns the sequences that a run hands out, and its last error.
func read(run *unslothd.TrainingRun) (sequences []uint64, last error) {
	for event, err := range run.Events() {
		if err != nil {
			return sequences, err
		}
		sequences = append(sequences, event.GetSequence())
	}
	return sequences, nil
}

func expect(t *testing.T, what string, got, want []uint64) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

func TestEachEventComesOnceAcrossLostConnections(t *testing.T) {
	s := &script{turns: []turn{
		{nil, lost},
		{steps(1, 2), lost},
		{steps(2, 3), status.Error(codes.Internal, "RST_STREAM")},
		{append(steps(0, 4), succeeded(5)), nil},
	}}
	run, err := serve(t, s).Train(bounded(t), &pb.TrainRequest{ModelId: "m"})
	must(t, err)
	sequences, err := read(run)
	must(t, err)
	expect(t, "events", sequences, []uint64{1, 2, 3, 4, 5})
	expect(t, "read on after", s.after, []uint64{0, 0, 2, 3})
	if len(s.ids) != 2 || s.ids[0] == "" || s.ids[0] != s.ids[1] {
		t.Fatalf("the training must be asked for again with the same request_id, not %v", s.ids)
	}
	metrics, err := run.Result()
	must(t, err)
	if metrics.GetTrainLoss() != 0.5 || run.LastSequence() != 5 || run.TrainingID() != trainingID {
		t.Fatal(metrics, run.LastSequence(), run.TrainingID())
	}
}

func TestAGapInTheLogIsReadAgain(t *testing.T) {
	s := &script{turns: []turn{{steps(1, 3), nil}, {append(steps(2), succeeded(3)), nil}}}
	sequences, err := read(serve(t, s).Watch(bounded(t), trainingID, 0))
	must(t, err)
	expect(t, "events", sequences, []uint64{1, 2, 3})
}

func TestALogGoesOnAfterAFailureThatWasResumed(t *testing.T) {
	s := &script{turns: []turn{{[]*pb.TrainingEvent{steps(1)[0], failed(2), steps(3)[0], succeeded(4)}, nil}}}
	run := serve(t, s).Watch(bounded(t), trainingID, 0)
	sequences, err := read(run)
	must(t, err)
	expect(t, "events", sequences, []uint64{1, 2, 3, 4})
	if _, err := run.Result(); err != nil {
		t.Fatal("the last terminal event decides, not", err)
	}
}

func TestATrainingThatFailedEndsWithItsError(t *testing.T) {
	s := &script{turns: []turn{{append(steps(1), failed(2)), refusal(codes.ResourceExhausted, "OUT_OF_MEMORY", nil)}}}
	run, err := serve(t, s).Train(bounded(t), &pb.TrainRequest{})
	must(t, err)
	sequences, err := read(run)
	expect(t, "events", sequences, []uint64{1, 2})
	if !errors.Is(err, unslothd.TrainingFailed) || !errors.Is(err, unslothd.ReasonOutOfMemory) {
		t.Fatal(err)
	}
	var failure *unslothd.Error
	if !errors.As(err, &failure) || failure.TrainingID != trainingID {
		t.Fatalf("%#v", failure)
	}
}

func TestAWatchOfAFailedTrainingEndsQuietlyAndItsResultIsTheError(t *testing.T) {
	s := &script{turns: []turn{{append(steps(1), failed(2)), nil}}}
	run := serve(t, s).Watch(bounded(t), trainingID, 0)
	if _, err := read(run); err != nil {
		t.Fatal(err)
	}
	if _, err := run.Result(); !errors.Is(err, unslothd.TrainingFailed) {
		t.Fatal(err)
	}
}

func TestAWatchAfterTheLastEventLooksUpTheResult(t *testing.T) {
	state := pb.Training_STATE_CANCELLED
	s := &script{turns: []turn{{nil, nil}}, training: &pb.Training{State: state, LastSequence: 9, Step: 4}}
	_, err := serve(t, s).Watch(bounded(t), trainingID, 9).Result()
	if !errors.Is(err, unslothd.TrainingCancelled) || !errors.Is(err, unslothd.Aborted) {
		t.Fatal(err)
	}
}

func TestALoopThatWasLeftGoesOnWhereItStopped(t *testing.T) {
	s := &script{turns: []turn{{append(steps(1, 2, 3), succeeded(4)), nil}, {append(steps(3), succeeded(4)), nil}}}
	run, err := serve(t, s).Train(bounded(t), &pb.TrainRequest{})
	must(t, err)
	for event := range run.Events() {
		if event.GetSequence() == 2 {
			break
		}
	}
	run.Close()
	sequences, err := read(run)
	must(t, err)
	expect(t, "the rest", sequences, []uint64{3, 4})
}

func TestACancelledContextEndsTheReadingWithItsError(t *testing.T) {
	ctx, cancel := context.WithCancel(bounded(t))
	defer cancel()
	run := serve(t, &script{turns: []turn{{steps(1), lost}}}).Watch(ctx, trainingID, 0)
	var last error
	for _, err := range run.Events() {
		last = err
		cancel()
	}
	if !errors.Is(last, context.Canceled) {
		t.Fatal(last)
	}
}

func TestAServerThatStaysAwayIsGivenUp(t *testing.T) {
	s := &script{turns: slices.Repeat([]turn{{nil, lost}}, 50)}
	s.turns[0] = turn{steps(1), lost}
	run := serve(t, s, unslothd.WithReconnectTimeout(200*time.Millisecond)).Watch(bounded(t), trainingID, 0)
	if _, err := read(run); !errors.Is(err, unslothd.Unavailable) {
		t.Fatal(err)
	}
}
