package unslothd

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// headers are sent with every call.
type headers map[string]string

func (h headers) addTo(ctx context.Context) context.Context {
	for name, value := range h {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	return ctx
}

func (h headers) unary(
	ctx context.Context, method string, request, response any, connection *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	return invoke(h.addTo(ctx), method, request, response, connection, options...)
}

func (h headers) stream(
	ctx context.Context, description *grpc.StreamDesc, connection *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	return open(h.addTo(ctx), description, connection, method, options...)
}
