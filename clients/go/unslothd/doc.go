// Package unslothd is a client of unslothd, fine-tuning as a service.
//
//	client, err := unslothd.New("127.0.0.1:50051")
//	model, err := client.LoadModel(ctx, &pb.LoadModelRequest{ModelName: "unsloth/Llama-3.2-1B-Instruct"}, nil)
//	_, err = client.Prepare(ctx, &pb.PrepareForTrainingRequest{ModelId: model.GetModelId()})
//	run, err := client.Train(ctx, &pb.TrainRequest{ModelId: model.GetModelId(), TrainDataset: unslothd.ServerPath("rows.jsonl")})
//	for event, err := range run.Events() {
//		…
//	}
//
// Requests and answers are the messages of the contract (package unslothdv1 below gen). What the methods add:
//
//   - Streams survive lost connections and restarts of the server. The events of a training come once each, in order:
//     after a loss the log is read on from the last sequence. Loads, exports and uploads attach again, downloads go on
//     at the byte where they stopped.
//   - Errors are an [Error] with the server's reason, text, figures and wrong fields. errors.Is knows every [Kind] and
//     every [Reason].
//   - A context ends the reading, never the work: a training goes on without its reader, unless its request said
//     DISCONNECT_POLICY_CANCEL.
//
// The same names and rules hold for the clients in Python and TypeScript: docs/clients.md shows them side by side.
package unslothd
