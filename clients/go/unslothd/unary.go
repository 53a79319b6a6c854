package unslothd

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// unary makes one call within the timeout and returns its response; it calls again while the server is away, if the
// retry allows. Only after UNAVAILABLE: the other ways to lose a connection leave open whether the call was carried out.
func unary[Request, Response any](
	ctx context.Context, c *Client, timeout time.Duration, retry *retry,
	call func(context.Context, Request, ...grpc.CallOption) (Response, error), request Request,
) (Response, error) {
	for {
		response, err := attempt(ctx, c, timeout, call, request)
		if err == nil {
			retry.heard()
			return response, nil
		}
		if !connectionLost(err) || err.Code != codes.Unavailable {
			return response, err
		}
		if err := retry.wait(ctx, err); err != nil {
			return response, err
		}
	}
}

func attempt[Request, Response any](
	ctx context.Context, c *Client, timeout time.Duration,
	call func(context.Context, Request, ...grpc.CallOption) (Response, error), request Request,
) (Response, *Error) {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	response, err := call(bounded, request)
	return response, c.translated(ctx, err)
}

func (c *Client) slow() time.Duration { return max(c.timeout, slowTimeout) }

// ServerInfo returns versions, devices and limits of the server.
func (c *Client) ServerInfo(ctx context.Context) (*pb.GetServerInfoResponse, error) {
	return unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.GetServerInfo, &pb.GetServerInfoRequest{})
}

// GetModel returns a model as it is now.
func (c *Client) GetModel(ctx context.Context, modelID string) (*pb.Model, error) {
	request := &pb.GetModelRequest{ModelId: modelID}
	response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.GetModel, request)
	return response.GetModel(), err
}

// ListModels returns all models, in the order of their loading.
func (c *Client) ListModels(ctx context.Context) ([]*pb.Model, error) {
	response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.ListModels, &pb.ListModelsRequest{})
	return response.GetModels(), err
}

// Prepare attaches trainable parameters and sets the config of the trainings on this model. The response has config and
// adapter with every field set.
func (c *Client) Prepare(
	ctx context.Context, request *pb.PrepareForTrainingRequest,
) (*pb.PrepareForTrainingResponse, error) {
	return unary(ctx, c, c.slow(), c.unaryRetry(), c.stub.PrepareForTraining, request)
}

// UnloadModel ends the worker of a model and returns the bytes of memory that this gave back. With force its trainings
// are cancelled, with a checkpoint, instead of refusing.
func (c *Client) UnloadModel(ctx context.Context, modelID string, force bool) (int64, error) {
	request := &pb.UnloadModelRequest{ModelId: modelID, Force: force}
	response, err := unary(ctx, c, c.slow(), c.noRetry(), c.stub.UnloadModel, request)
	return response.GetFreedMemoryBytes(), err
}

// GetDataset returns a stored dataset.
func (c *Client) GetDataset(ctx context.Context, datasetID string) (*pb.Dataset, error) {
	request := &pb.GetDatasetRequest{DatasetId: datasetID}
	response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.GetDataset, request)
	return response.GetDataset(), err
}

// ListDatasets returns the newest datasets, limit of them at most; 0 = all.
func (c *Client) ListDatasets(ctx context.Context, limit int) ([]*pb.Dataset, error) {
	return pages(limit, func(size int32, token string) ([]*pb.Dataset, string, error) {
		request := &pb.ListDatasetsRequest{PageSize: size, PageToken: token}
		response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.ListDatasets, request)
		return response.GetDatasets(), response.GetNextPageToken(), err
	})
}

// DeleteDataset removes a stored dataset; ReasonDatasetInUse while a training that is not over reads it.
func (c *Client) DeleteDataset(ctx context.Context, datasetID string) error {
	request := &pb.DeleteDatasetRequest{DatasetId: datasetID}
	_, err := unary(ctx, c, c.timeout, c.noRetry(), c.stub.DeleteDataset, request)
	return err
}

// Plan works out what Train would do with the same request, without doing it.
func (c *Client) Plan(ctx context.Context, request *pb.PlanTrainingRequest) (*pb.TrainingPlan, error) {
	response, err := unary(ctx, c, c.slow(), c.unaryRetry(), c.stub.PlanTraining, request)
	return response.GetPlan(), err
}

// GetTraining returns a training as it is now.
func (c *Client) GetTraining(ctx context.Context, trainingID string) (*pb.Training, error) {
	request := &pb.GetTrainingRequest{TrainingId: trainingID}
	response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.GetTraining, request)
	return response.GetTraining(), err
}

// ListTrainings returns the newest trainings that match the filter, limit of them at most; 0 = all. The page fields of
// the filter are not used; nil matches everything.
func (c *Client) ListTrainings(ctx context.Context, filter *pb.ListTrainingsRequest, limit int) ([]*pb.Training, error) {
	return pages(limit, func(size int32, token string) ([]*pb.Training, string, error) {
		request := &pb.ListTrainingsRequest{
			ModelId: filter.GetModelId(), States: filter.GetStates(), Labels: filter.GetLabels(),
			PageSize: size, PageToken: token,
		}
		response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.ListTrainings, request)
		return response.GetTrainings(), response.GetNextPageToken(), err
	})
}

// Pause asks a training to save at the next step boundary and to free its device; returns it as it is then.
func (c *Client) Pause(ctx context.Context, trainingID string) (*pb.Training, error) {
	request := &pb.PauseTrainingRequest{TrainingId: trainingID}
	response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.PauseTraining, request)
	return response.GetTraining(), err
}

// Cancel asks a training to stop at the next step boundary and returns it as it is then. With saveCheckpoint it saves a
// checkpoint and the adapter so far.
func (c *Client) Cancel(ctx context.Context, trainingID string, saveCheckpoint bool) (*pb.Training, error) {
	request := &pb.CancelTrainingRequest{TrainingId: trainingID, SaveCheckpoint: saveCheckpoint}
	response, err := unary(ctx, c, c.timeout, c.unaryRetry(), c.stub.CancelTraining, request)
	return response.GetTraining(), err
}

// largestPage is that of the contract.
const largestPage = 1000

// pages reads page after page until there are limit items, or all.
func pages[Item any](limit int, page func(size int32, token string) ([]Item, string, error)) ([]Item, error) {
	size := int32(largestPage)
	if limit > 0 {
		size = int32(min(limit, largestPage))
	}
	var found []Item
	for token := ""; ; {
		items, next, err := page(size, token)
		if err != nil {
			return nil, err
		}
		found = append(found, items...)
		if limit > 0 && len(found) >= limit {
			return found[:limit], nil
		}
		if next == "" {
			return found, nil
		}
		token = next
	}
}
