package unslothd

import (
	"context"
	"errors"
	"io"
	"iter"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// TextStream is text as the model makes it: range over Pieces. Close it to stop the generation early.
type TextStream struct {
	client  *Client
	ctx     context.Context
	stream  *call[pb.GenerateResponse]
	summary *pb.GenerateSummary
}

// Generate streams text from a loaded model. It is not repeated after a lost connection: sampled text would differ.
func (c *Client) Generate(ctx context.Context, request *pb.GenerateRequest) *TextStream {
	return &TextStream{client: c, ctx: ctx, stream: opening(ctx, request, c.stub.Generate)}
}

// Pieces yields the text piece by piece.
func (t *TextStream) Pieces() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for {
			message, err := t.stream.receive()
			if err != nil {
				t.Close()
			}
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield("", t.client.translated(t.ctx, err))
				return
			}
			if summary := message.GetSummary(); summary != nil {
				t.summary = summary
			} else if !yield(message.GetText(), nil) {
				return
			}
		}
	}
}

// Text waits for the end and returns the text from here on.
func (t *TextStream) Text() (string, error) {
	var text []byte
	for piece, err := range t.Pieces() {
		if err != nil {
			return string(text), err
		}
		text = append(text, piece...)
	}
	return string(text), nil
}

// Summary returns tokens, speed and why it ended; nil until the text has been read to its end.
func (t *TextStream) Summary() *pb.GenerateSummary { return t.summary }

// Close stops the generation.
func (t *TextStream) Close() { t.stream.close() }
