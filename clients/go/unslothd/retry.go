package unslothd

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
)

const (
	firstDelay   = 100 * time.Millisecond
	longestDelay = 5 * time.Second
	// A server that has never answered is more likely a wrong target than a restart.
	firstContactTimeout = 5 * time.Second
)

// peer is what a client knows about its server; shared by all its calls.
type peer struct{ heard atomic.Bool }

// retry is exponential backoff with jitter, bounded by the time without progress.
type retry struct {
	peer         *peer
	timeout      time.Duration // without progress, after which the error is returned
	firstContact time.Duration // the same for a server that has never answered
	attempt      int
	since        time.Time // of the first loss after the last progress; zero = none
}

func (c *Client) streamRetry() *retry {
	return &retry{peer: &c.peer, timeout: c.reconnectTimeout, firstContact: firstContactTimeout}
}

func (c *Client) unaryRetry() *retry {
	return &retry{peer: &c.peer, timeout: min(c.timeout, c.reconnectTimeout)}
}

func (c *Client) noRetry() *retry { return &retry{peer: &c.peer} }

func (r *retry) heard() { r.peer.heard.Store(true) }

// progress notes that the server answered with something new: the next loss starts over.
func (r *retry) progress() {
	r.heard()
	r.attempt, r.since = 0, time.Time{}
}

// wait returns nil when it is time for the next attempt, lost when there was no progress for too long, and the context's
// error when that ended.
func (r *retry) wait(ctx context.Context, lost *Error) error {
	patience := r.timeout
	if !r.peer.heard.Load() {
		patience = min(r.timeout, r.firstContact)
	}
	if r.since.IsZero() {
		r.since = time.Now()
	}
	left := time.Until(r.since.Add(patience))
	if left <= 0 {
		return lost
	}
	delay := min(firstDelay<<r.attempt, longestDelay)
	r.attempt = min(r.attempt+1, 16)
	delay = time.Duration(float64(delay) * (0.5 + rand.Float64()/2))
	timer := time.NewTimer(min(delay, left))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}

// connectionLost tells whether the way to the server broke, not the work: the same call may go on later.
//
// An error with a reason is the server's own answer. A broken connection has none and shows as UNAVAILABLE (socket
// closed, refused), CANCELLED or INTERNAL (RST_STREAM), or UNKNOWN (stream removed).
func connectionLost(err *Error) bool {
	if err.Reason != "" {
		return err.Reason == ReasonServerStopping
	}
	switch err.Code {
	case codes.Unavailable, codes.Canceled, codes.Internal, codes.Unknown:
		return true
	}
	return false
}
