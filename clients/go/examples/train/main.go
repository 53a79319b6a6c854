// Command train fine-tunes a model on a few rows, and prints every step.
//
//	go run ./examples/train -model my-model
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"

	"google.golang.org/protobuf/proto"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

type row struct {
	Prompt     string `json:"prompt"`
	Completion string `json:"completion"`
}

func main() {
	log.SetFlags(0)
	target := flag.String("target", "", "address of the server (default $UNSLOTHD_TARGET, else "+unslothd.DefaultTarget+")")
	model := flag.String("model", "", "Hub id, or a folder or .gguf file below a model root of the server")
	path := flag.String("dataset-path", "", "file of rows below a model root of the server (default: a few rows of its own)")
	steps := flag.Int("max-steps", 5, "optimizer steps")
	flag.Parse()
	if *model == "" {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *target, *model, *path, int32(*steps)); err != nil {
		explain(err)
	}
}

func run(ctx context.Context, target, modelName, path string, maxSteps int32) error {
	client, err := unslothd.New(target)
	if err != nil {
		return err
	}
	defer client.Close()
	dataset, err := rows(path)
	if err != nil {
		return err
	}

	model, err := client.LoadModel(ctx, &pb.LoadModelRequest{ModelName: modelName}, func(progress *pb.LoadProgress) {
		fmt.Println("load:", progress.GetPhase())
	})
	if err != nil {
		return err
	}
	prepared, err := client.Prepare(ctx, &pb.PrepareForTrainingRequest{ModelId: model.GetModelId()})
	if err != nil {
		return err
	}
	fmt.Printf("%d of %d parameters are trained\n", prepared.GetModel().GetTrainableParams(), model.GetTotalParams())

	training, err := client.Train(ctx, &pb.TrainRequest{
		ModelId:        model.GetModelId(),
		TrainDataset:   dataset,
		TrainingConfig: &pb.TrainingConfig{MaxSteps: proto.Int32(maxSteps)},
	})
	if err != nil {
		return err
	}
	for event, err := range training.Events() {
		if err != nil {
			return err
		}
		show(event)
	}
	return nil
}

func rows(path string) (*pb.DatasetSource, error) {
	if path != "" {
		return unslothd.ServerPath(path), nil
	}
	return unslothd.Rows(
		row{"What colour is the sky?", "Blue."},
		row{"What colour is grass?", "Green."},
		row{"What colour is snow?", "White."},
	)
}

func show(event *pb.TrainingEvent) {
	switch kind := event.GetKind().(type) {
	case *pb.TrainingEvent_Step:
		step := kind.Step
		fmt.Printf("step %d/%d  loss %.4f  %.0f tokens/s\n",
			step.GetStep(), step.GetTotalSteps(), step.GetLoss(), step.GetTokensPerSecond())
	case *pb.TrainingEvent_Warning:
		fmt.Println("warning:", kind.Warning.GetMessage())
	case *pb.TrainingEvent_Succeeded:
		fmt.Println("the adapter is in", kind.Succeeded.GetOutputDir())
	}
}

func explain(err error) {
	var failure *unslothd.Error
	if errors.As(err, &failure) {
		for _, violation := range failure.FieldViolations {
			log.Printf("%s: %s", violation.Field, violation.Description)
		}
	}
	if errors.Is(err, unslothd.Unavailable) {
		log.Println("Is the server running? Start one with: unslothd serve --model-root DIR")
	}
	log.Fatal(err)
}
