package unslothd

import (
	"strings"

	"google.golang.org/grpc/codes"
)

// hints say what to do about errors that are not the server's own: gRPC says what broke, not what to check.
var hints = map[codes.Code]string{
	codes.Unavailable:       "Check that `unslothd serve` runs there and that the target is right.",
	codes.DeadlineExceeded:  "Give the client a larger WithTimeout, or look at the server's log.",
	codes.ResourceExhausted: "If the message is too large: upload the rows with Client.UploadDataset.",
}

// hintsByText are for what crypto/tls says, from the most telling to the least.
var hintsByText = []struct{ telling, step string }{
	{
		"unknown authority",
		"The server's certificate is not of an authority that this client trusts: give it that authority's certificate " +
			"(WithTLS with TLSFromFiles, or " + envCA + ").",
	},
	{"has expired", "The server's certificate has expired: its operator has to renew it."},
	{
		"failed to verify certificate",
		"The server's certificate is for another name: use a target that it names, or have one made for this name.",
	},
	{"certificate required", "The server wants a certificate of the client: WithTLS with TLSFromFiles."},
	{
		"first record does not look like a TLS handshake",
		"That server speaks no TLS: check the port, or connect without WithTLS.",
	},
	{
		"server preface",
		"The server closed the connection at once: it may want TLS (WithTLS), or a certificate of the client.",
	},
}

func hintFor(code codes.Code, text string) string {
	if code == codes.Unavailable {
		for _, hint := range hintsByText {
			if strings.Contains(text, hint.telling) {
				return hint.step
			}
		}
	}
	return hints[code]
}
