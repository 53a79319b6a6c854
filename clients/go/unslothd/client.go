package unslothd

import (
	"crypto/tls"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// DefaultTarget is where a server listens that was started without --listen.
const DefaultTarget = "127.0.0.1:50051"

const (
	defaultTimeout          = time.Minute
	defaultReconnectTimeout = 2 * time.Minute
	// Attaching an adapter to a large model, ending a worker and planning take longer than a look-up.
	slowTimeout     = 10 * time.Minute
	maxReceiveBytes = 64 << 20
)

// Client talks to an unslothd server. It is safe for use by several goroutines.
//
// A stream whose connection is lost is taken up again where it stopped. Unary calls are repeated while the server is
// away, once it has answered before.
type Client struct {
	connection       *grpc.ClientConn
	stub             pb.UnslothServiceClient
	target           string
	exposed          bool
	timeout          time.Duration
	reconnectTimeout time.Duration
	peer             peer
}

type settings struct {
	tls              *tls.Config
	headers          headers
	token            string
	tokenFile        string
	timeout          time.Duration
	reconnectTimeout time.Duration
	dialOptions      []grpc.DialOption
}

// Option changes a setting of a Client.
type Option func(*settings)

// WithTLS encrypts the connection. An empty tls.Config trusts the system's authorities; TLSFromFiles makes one for your
// own authority, and to show a client certificate.
func WithTLS(config *tls.Config) Option {
	return func(s *settings) { s.tls = config.Clone() }
}

// WithToken sends "authorization: Bearer TOKEN" with every call. Without WithTLS, New refuses it for a server on
// another host, since anybody on the way could read it.
func WithToken(token string) Option {
	return func(s *settings) { s.token = token }
}

// WithTokenFile takes the token of WithToken from a file.
func WithTokenFile(path string) Option {
	return func(s *settings) { s.tokenFile = path }
}

// WithMetadata sends these headers with every call.
func WithMetadata(metadata map[string]string) Option {
	return func(s *settings) {
		for name, value := range metadata {
			s.headers[strings.ToLower(name)] = value
		}
	}
}

// WithTimeout bounds each call that is not a stream; default: one minute. Prepare, Plan and UnloadModel have ten
// minutes at least. A deadline of the context holds, too.
func WithTimeout(timeout time.Duration) Option {
	return func(s *settings) { s.timeout = timeout }
}

// WithReconnectTimeout sets how long a lost connection is tried again without progress; default: two minutes. A server
// that has never answered is given up after five seconds.
func WithReconnectTimeout(timeout time.Duration) Option {
	return func(s *settings) { s.reconnectTimeout = timeout }
}

// WithDialOptions adds options of gRPC; they win over the client's own.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) { s.dialOptions = append(s.dialOptions, options...) }
}

// New returns a client of the server at target, "HOST:PORT". Empty means the environment variable UNSLOTHD_TARGET, else
// DefaultTarget. Where no option says it, UNSLOTHD_TOKEN or UNSLOTHD_TOKEN_FILE is the token, and UNSLOTHD_CA,
// UNSLOTHD_CLIENT_CERT with UNSLOTHD_CLIENT_KEY, or UNSLOTHD_TLS=1 turn TLS on; docs/connecting.md has them all.
//
// The connection is opened by the first call. Close the client when it is not needed any more.
func New(target string, options ...Option) (*Client, error) {
	if target == "" {
		target = os.Getenv(envTarget)
	}
	if target == "" {
		target = DefaultTarget
	}
	s := settings{timeout: defaultTimeout, reconnectTimeout: defaultReconnectTimeout, headers: headers{}}
	for _, option := range options {
		option(&s)
	}
	if err := s.complete(target); err != nil {
		return nil, err
	}
	connection, err := grpc.NewClient(target, append(s.transport(), s.dialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("target %q: %w", target, err)
	}
	return &Client{
		connection:       connection,
		stub:             pb.NewUnslothServiceClient(connection),
		target:           target,
		exposed:          s.exposed(target),
		timeout:          s.timeout,
		reconnectTimeout: s.reconnectTimeout,
	}, nil
}

func (s *settings) transport() []grpc.DialOption {
	security := insecure.NewCredentials()
	if s.tls != nil {
		security = credentials.NewTLS(s.tls)
	}
	return []grpc.DialOption{
		grpc.WithTransportCredentials(security),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceiveBytes)),
		grpc.WithUnaryInterceptor(s.headers.unary),
		grpc.WithStreamInterceptor(s.headers.stream),
		// Notices a dead peer within 40 s, also while the server is silent.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		// gRPC waits up to 2 minutes between its own attempts to connect; calls fail at once in the meantime.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			MinConnectTimeout: time.Second,
		}),
	}
}

// Stub returns the generated client, for calls that have no method here. Its errors are those of gRPC.
func (c *Client) Stub() pb.UnslothServiceClient { return c.stub }

// Close ends the connection. What runs on the server goes on.
func (c *Client) Close() error { return c.connection.Close() }
