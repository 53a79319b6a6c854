// Command conformance is the adapter of this client for tests/conformance: commands as JSON lines on stdin, outcomes as
// JSON lines on stdout.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

// command is a call and its arguments, by the names of the contract.
type command struct {
	Stop           bool              `json:"stop"`
	Call           string            `json:"call"`
	Request        json.RawMessage   `json:"request"`
	ModelID        string            `json:"model_id"`
	TrainingID     string            `json:"training_id"`
	AfterSequence  uint64            `json:"after_sequence"`
	CheckpointStep int32             `json:"checkpoint_step"`
	SaveCheckpoint *bool             `json:"save_checkpoint"`
	Force          bool              `json:"force"`
	Labels         map[string]string `json:"labels"`
	Limit          int               `json:"limit"`
	Path           string            `json:"path"`
	Name           string            `json:"name"`
	Folder         string            `json:"folder"`
}

type settings struct {
	Target           string  `json:"target"`
	Timeout          float64 `json:"timeout"`
	ReconnectTimeout float64 `json:"reconnect_timeout"`
	Token            string  `json:"token"`
	CA               string  `json:"ca"`
	ClientCert       string  `json:"client_cert"`
	ClientKey        string  `json:"client_key"`
}

func (s settings) options() []unslothd.Option {
	var options []unslothd.Option
	if s.Timeout > 0 {
		options = append(options, unslothd.WithTimeout(seconds(s.Timeout)))
	}
	if s.ReconnectTimeout > 0 {
		options = append(options, unslothd.WithReconnectTimeout(seconds(s.ReconnectTimeout)))
	}
	if s.CA != "" {
		config, err := unslothd.TLSFromFiles(s.CA, s.ClientCert, s.ClientKey)
		if err != nil {
			log.Fatal(err)
		}
		options = append(options, unslothd.WithTLS(config))
	}
	return append(options, unslothd.WithToken(s.Token))
}

type object = map[string]any

func main() {
	lines := bufio.NewReader(os.Stdin)
	var s settings
	next(lines, &s)
	client, err := unslothd.New(s.Target, s.options()...)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	commands := make(chan command)
	var mutex sync.Mutex
	stop := context.CancelFunc(func() {})
	go func() {
		defer close(commands)
		for {
			var c command
			if !next(lines, &c) {
				return
			}
			if c.Stop {
				mutex.Lock()
				stop()
				mutex.Unlock()
			} else {
				commands <- c
			}
		}
	}()
	for c := range commands {
		ctx, cancel := context.WithCancel(context.Background())
		mutex.Lock()
		stop = cancel
		mutex.Unlock()
		result, err := carryOut(ctx, client, c)
		sayOutcome(ctx, result, err)
		cancel()
	}
}

func carryOut(ctx context.Context, client *unslothd.Client, c command) (any, error) {
	switch c.Call {
	case "server_info":
		return plain(client.ServerInfo(ctx))
	case "load_model":
		return plain(client.LoadModel(ctx, parsed(c, &pb.LoadModelRequest{}), func(p *pb.LoadProgress) { sayMessage("progress", p) }))
	case "get_model":
		return plain(client.GetModel(ctx, c.ModelID))
	case "prepare":
		return plain(client.Prepare(ctx, parsed(c, &pb.PrepareForTrainingRequest{})))
	case "unload_model":
		freed, err := client.UnloadModel(ctx, c.ModelID, c.Force)
		return object{"freed": freed}, err
	case "plan":
		return plain(client.Plan(ctx, parsed(c, &pb.PlanTrainingRequest{})))
	case "train":
		return follow(client.Train(ctx, parsed(c, &pb.TrainRequest{})))
	case "watch":
		return follow(client.Watch(ctx, c.TrainingID, c.AfterSequence), nil)
	case "timed_watch":
		return timedWatch(client.Watch(ctx, c.TrainingID, 0))
	case "resume":
		return follow(client.Resume(ctx, c.TrainingID, c.CheckpointStep))
	case "pause":
		return plain(client.Pause(ctx, c.TrainingID))
	case "cancel":
		return plain(client.Cancel(ctx, c.TrainingID, c.SaveCheckpoint == nil || *c.SaveCheckpoint))
	case "get_training":
		return plain(client.GetTraining(ctx, c.TrainingID))
	case "list_trainings":
		return list(client.ListTrainings(ctx, &pb.ListTrainingsRequest{Labels: c.Labels}, c.Limit))
	case "generate":
		return generate(client.Generate(ctx, parsed(c, &pb.GenerateRequest{})))
	case "upload_dataset":
		return upload(ctx, client, c)
	case "export":
		return plain(client.Export(ctx, parsed(c, &pb.ExportModelRequest{}), func(p *pb.ExportProgress) { sayMessage("progress", p) }))
	case "download":
		paths, err := client.Download(ctx, parsed(c, &pb.DownloadArtifactRequest{}), c.Folder, unslothd.DownloadOptions{})
		return object{"paths": paths}, err
	}
	log.Fatalf("the adapter does not know the call %q", c.Call)
	return nil, nil
}

func follow(run *unslothd.TrainingRun, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	for event, err := range run.Events() {
		if err != nil {
			return nil, err
		}
		sayMessage("event", event)
	}
	metrics, err := run.Result()
	if err != nil {
		return nil, err
	}
	return object{"training_id": run.TrainingID(), "last_sequence": run.LastSequence(), "metrics": asJSON(metrics)}, nil
}

// timedWatch is for benchmarks/clients.py: it reads the whole log of a finished training and keeps nothing.
func timedWatch(run *unslothd.TrainingRun) (any, error) {
	began, first, count := time.Now(), time.Duration(0), 0
	for _, err := range run.Events() {
		if err != nil {
			return nil, err
		}
		if count == 0 {
			first = time.Since(began)
		}
		count++
	}
	return object{
		"events": count, "first_event_seconds": first.Seconds(), "seconds": time.Since(began).Seconds(),
	}, nil
}

func generate(stream *unslothd.TextStream) (any, error) {
	text := ""
	for piece, err := range stream.Pieces() {
		if err != nil {
			return nil, err
		}
		say(object{"text": piece})
		text += piece
	}
	return object{"text": text, "summary": asJSON(stream.Summary())}, nil
}

func upload(ctx context.Context, client *unslothd.Client, c command) (any, error) {
	file, err := os.Open(c.Path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	header := &pb.UploadDatasetHeader{Name: c.Name, Format: pb.DataFormat_DATA_FORMAT_JSONL}
	return plain(client.UploadDataset(ctx, file, header, nil))
}

func list(trainings []*pb.Training, err error) (any, error) {
	found := []json.RawMessage{}
	for _, each := range trainings {
		found = append(found, asJSON(each))
	}
	return object{"trainings": found}, err
}

func sayOutcome(ctx context.Context, result any, err error) {
	var failure *unslothd.Error
	switch {
	case err == nil:
		say(object{"result": result})
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		say(object{"stopped": true})
	case errors.As(err, &failure):
		fields := []string{}
		for _, violation := range failure.FieldViolations {
			fields = append(fields, violation.Field)
		}
		say(object{"error": object{
			"kind": failure.Kind, "code": failure.Code, "reason": failure.Reason,
			"message": failure.Message, "metadata": failure.Metadata, "fields": fields,
			"retry_after": failure.RetryAfter.Seconds(),
		}})
	default:
		log.Fatal(err)
	}
}

func parsed[Message proto.Message](c command, message Message) Message {
	if err := protojson.Unmarshal(c.Request, message); err != nil {
		log.Fatal(err)
	}
	return message
}

func plain[Message proto.Message](message Message, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return asJSON(message), nil
}

func asJSON(message proto.Message) json.RawMessage {
	encoded, err := protojson.Marshal(message)
	if err != nil {
		log.Fatal(err)
	}
	return encoded
}

func sayMessage(what string, message proto.Message) { say(object{what: asJSON(message)}) }

func say(line object) {
	encoded, err := json.Marshal(line)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(encoded))
}

// next reads a line; false when there is none left.
func next(lines *bufio.Reader, into any) bool {
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return false
	}
	if err := json.Unmarshal(line, into); err != nil {
		log.Fatal(err)
	}
	return true
}

func seconds(number float64) time.Duration { return time.Duration(number * float64(time.Second)) }
