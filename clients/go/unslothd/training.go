package unslothd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// TrainingRun is a training as it happens: range over Events for what it tells, each event exactly once, across lost
// connections. Not for several goroutines at a time, but for Cancel and Pause.
//
// Leaving the loop, closing the run or ending its context leaves the training running, unless its request said
// DISCONNECT_POLICY_CANCEL; Client.Watch goes on reading it.
type TrainingRun struct {
	client  *Client
	ctx     context.Context
	retry   *retry
	request *pb.TrainRequest // sent until the first event; nil for a training that is known

	trainingID string
	delivered  uint64 // sequence of the last event that was handed out
	sequence   uint64 // of the last event that was read
	outcome    *outcome
	first      *pb.TrainingEvent // read by Train, not handed out yet

	stream   *eventStream
	returns  bool // its error is the last thing that Events yields
	finished bool
	failure  error
}

// Train starts a training and returns once it is accepted. A request without a request_id gets one, so that it is never
// started twice. After the last event of a training that failed or was cancelled, Events yields that error.
func (c *Client) Train(ctx context.Context, request *pb.TrainRequest) (*TrainingRun, error) {
	request = proto.Clone(request).(*pb.TrainRequest)
	if request.GetRequestId() == "" {
		request.RequestId = uuid.NewString()
	}
	run := &TrainingRun{client: c, ctx: ctx, retry: c.streamRetry(), request: request, returns: true}
	first, err := run.next()
	if err != nil {
		return nil, err
	}
	run.first = first
	return run, nil
}

// Watch reads the events of a training from the one after afterSequence on; 0 = from the beginning. Events ends after
// the last event, whatever that is; Result returns an error if the training did not succeed. Nothing is sent before
// the first event is asked for.
func (c *Client) Watch(ctx context.Context, trainingID string, afterSequence uint64) *TrainingRun {
	return &TrainingRun{
		client: c, ctx: ctx, retry: c.streamRetry(),
		trainingID: trainingID, sequence: afterSequence, delivered: afterSequence,
	}
}

// Resume goes on with a paused, failed or cancelled training from the checkpoint of that step, 0 = the newest, and
// returns it, to be read from here on. LastSequence is that of the last event before.
func (c *Client) Resume(ctx context.Context, trainingID string, checkpointStep int32) (*TrainingRun, error) {
	before, err := c.GetTraining(ctx, trainingID)
	if err != nil {
		return nil, err
	}
	request := &pb.ResumeTrainingRequest{TrainingId: trainingID, CheckpointStep: checkpointStep}
	if _, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.ResumeTraining, request); err != nil {
		return nil, err
	}
	run := c.Watch(ctx, trainingID, before.GetLastSequence())
	run.returns = true
	return run, nil
}

// TrainingID returns the id of the training.
func (r *TrainingRun) TrainingID() string { return r.trainingID }

// LastSequence returns that of the last event that was handed out; Watch after it to go on from here.
func (r *TrainingRun) LastSequence() uint64 { return r.delivered }

// Events yields what comes next, until the log of the training ends. A second loop goes on where the first stopped.
func (r *TrainingRun) Events() iter.Seq2[*pb.TrainingEvent, error] {
	return func(yield func(*pb.TrainingEvent, error) bool) {
		for {
			event, err := r.nextToHandOut()
			if errors.Is(err, io.EOF) {
				return
			}
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

// Result waits for the end, drops the events on the way, and returns the final figures. The error of a training that
// did not succeed is TrainingFailed or TrainingCancelled. While the training is paused it waits on.
func (r *TrainingRun) Result() (*pb.TrainingMetrics, error) {
	r.returns = false
	for _, err := range r.Events() {
		if err != nil {
			return nil, err
		}
	}
	if r.outcome.err != nil {
		return nil, r.outcome.err
	}
	return r.outcome.metrics, nil
}

// Cancel asks the training to stop at the next step boundary; the events go on up to the cancelled one.
func (r *TrainingRun) Cancel(ctx context.Context, saveCheckpoint bool) (*pb.Training, error) {
	return r.client.Cancel(ctx, r.trainingID, saveCheckpoint)
}

// Pause asks the training to save at the next step boundary and to free its device. The events go on when it is
// resumed; to leave until then, close the run and call Client.Resume later.
func (r *TrainingRun) Pause(ctx context.Context) (*pb.Training, error) {
	return r.client.Pause(ctx, r.trainingID)
}

// Close stops reading. What runs on the server goes on. Events then goes on where it stopped.
func (r *TrainingRun) Close() {
	if r.stream != nil {
		r.stream.close()
		r.stream = nil
	}
}

func (r *TrainingRun) nextToHandOut() (*pb.TrainingEvent, error) {
	event, err := r.first, error(nil)
	r.first = nil
	if event == nil {
		event, err = r.next()
	}
	if event != nil {
		r.delivered = event.GetSequence()
	}
	return event, err
}

// next returns the next event; io.EOF or the error of the training after the last one.
//
// The end of the stream decides, not a terminal event: ResumeTraining may have brought the training back.
func (r *TrainingRun) next() (*pb.TrainingEvent, error) {
	for !r.finished {
		event, lost, err := r.read()
		if event != nil {
			return event, nil
		}
		if err == nil && lost != nil {
			err = r.takeUp(lost)
		} else if err == nil {
			r.finished = true
		}
		if err != nil {
			r.finished, r.failure = true, err
		}
	}
	r.Close()
	if r.failure != nil {
		return nil, r.failure
	}
	if r.returns && r.outcome.err != nil {
		r.returns = false // the first time only, as iterators do
		return nil, r.outcome.err
	}
	return nil, io.EOF
}

// read returns the next event of the stream; without one, why the stream is to be taken up again (lost), or what ends
// the reading (err); nothing at all when the log ends here.
func (r *TrainingRun) read() (event *pb.TrainingEvent, lost *Error, err error) {
	if r.stream == nil {
		r.stream = r.open()
	}
	for {
		event, failure := r.stream.receive()
		switch {
		case errors.Is(failure, io.EOF) && r.outcome != nil:
			return nil, nil, nil
		case errors.Is(failure, io.EOF):
			return nil, endedEarly("the event stream"), nil
		case failure != nil:
			lost, err = r.broken(failure)
			return nil, lost, err
		case event.GetSequence() > r.sequence+1:
			return nil, r.gap(event.GetSequence()), nil
		case event.GetSequence() == 0: // a heartbeat
			r.retry.progress()
		case event.GetSequence() > r.sequence: // others were seen before the connection was lost
			r.retry.progress()
			r.trainingID, r.sequence, r.outcome = event.GetTrainingId(), event.GetSequence(), outcomeOf(event)
			return event, nil, nil
		}
	}
}

func (r *TrainingRun) broken(failure error) (lost *Error, err error) {
	translated := r.client.translated(r.ctx, failure)
	switch {
	case r.ctx.Err() != nil:
		return nil, translated
	case connectionLost(translated) && r.outcome != nil && r.outcome.err == nil:
		return nil, nil // a training that succeeded is never resumed
	case connectionLost(translated):
		return translated, nil
	case r.outcome == nil:
		return nil, translated
	}
	return nil, nil // Train ends with the training's own error, which its last event has told
}

// takeUp prepares the next attempt after a loss; or finds that the log ended, or that it is too late.
func (r *TrainingRun) takeUp(lost *Error) error {
	watched := r.stream != nil && r.stream.watching
	r.Close()
	if watched && lost.Code == codes.OK {
		final, err := r.final()
		if err != nil {
			return err
		}
		if final != nil {
			r.outcome, r.finished = final, true
			return nil
		}
	}
	err := r.retry.wait(r.ctx, lost)
	if err != nil && r.ctx.Err() == nil && r.outcome != nil {
		r.finished = true
		return nil
	}
	return err
}

// final looks up how a training ended whose last event was seen before; nil while there is more to read.
func (r *TrainingRun) final() (*outcome, error) {
	training, err := r.client.GetTraining(r.ctx, r.trainingID)
	if err != nil || training.GetLastSequence() > r.sequence {
		return nil, err
	}
	switch training.GetState() {
	case pb.Training_STATE_SUCCEEDED:
		return &outcome{metrics: training.GetMetrics()}, nil
	case pb.Training_STATE_FAILED:
		return &outcome{err: trainingFailed(training.GetError(), r.trainingID)}, nil
	case pb.Training_STATE_CANCELLED:
		return &outcome{err: trainingCancelled(r.trainingID, training.GetStep())}, nil
	}
	return nil, nil
}

func (r *TrainingRun) gap(sequence uint64) *Error {
	return &Error{
		Kind: Internal, Code: codes.DataLoss,
		Message: fmt.Sprintf("the log of training %s jumped from sequence %d to %d", r.trainingID, r.sequence, sequence),
	}
}
