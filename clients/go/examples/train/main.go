// Command train fine-tunes a model on rows that the server can read, and prints every step.
//
//	go run ./examples/train -target localhost:50051 -model my-model -dataset-path rows.jsonl
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	unslothdv1 "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

func main() {
	target := flag.String("target", "localhost:50051", "address of the server")
	model := flag.String("model", "", "Hub id, or a folder or .gguf file below a model root of the server")
	dataset := flag.String("dataset-path", "", "file or folder of rows below a model root of the server")
	steps := flag.Int("max-steps", 20, "optimizer steps")
	flag.Parse()
	if *model == "" || *dataset == "" {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *target, *model, *dataset, int32(*steps)); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, target, modelName, datasetPath string, maxSteps int32) error {
	// The server listens without TLS on its own host only; elsewhere, give real credentials here.
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	client := unslothdv1.NewUnslothServiceClient(connection)

	model, err := load(ctx, client, modelName)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	prepared, err := client.PrepareForTraining(ctx, &unslothdv1.PrepareForTrainingRequest{
		ModelId:        model.GetModelId(),
		TrainingConfig: &unslothdv1.TrainingConfig{MaxSteps: proto.Int32(maxSteps)},
	})
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	fmt.Printf("%d of %d parameters are trained\n", prepared.GetModel().GetTrainableParams(), model.GetTotalParams())

	events, err := client.Train(ctx, &unslothdv1.TrainRequest{
		ModelId:      model.GetModelId(),
		TrainDataset: &unslothdv1.DatasetSource{Origin: &unslothdv1.DatasetSource_Path{Path: datasetPath}},
	})
	if err != nil {
		return fmt.Errorf("train: %w", err)
	}
	for {
		response, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("train: %w", err)
		}
		show(response.GetEvent())
	}
}

func load(ctx context.Context, client unslothdv1.UnslothServiceClient, name string) (*unslothdv1.Model, error) {
	stream, err := client.LoadModel(ctx, &unslothdv1.LoadModelRequest{ModelName: name})
	if err != nil {
		return nil, err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("the stream ended without a model")
		}
		if err != nil {
			return nil, err
		}
		if model := response.GetModel(); model != nil {
			return model, nil
		}
		fmt.Println(response.GetProgress().GetPhase())
	}
}

func show(event *unslothdv1.TrainingEvent) {
	switch kind := event.GetKind().(type) {
	case *unslothdv1.TrainingEvent_Step:
		step := kind.Step
		fmt.Printf("step %d/%d  loss %.4f  %.0f tokens/s\n",
			step.GetStep(), step.GetTotalSteps(), step.GetLoss(), step.GetTokensPerSecond())
	case *unslothdv1.TrainingEvent_Warning:
		fmt.Println("warning:", kind.Warning.GetMessage())
	case *unslothdv1.TrainingEvent_Succeeded:
		fmt.Println("the adapter is in", kind.Succeeded.GetOutputDir())
	}
}
