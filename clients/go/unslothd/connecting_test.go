package unslothd_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

const plantedToken = "unslothd_planted-token"

// infoFrom asks the server at target, with a client that is closed afterwards.
func infoFrom(t *testing.T, target string, options ...unslothd.Option) error {
	client, err := unslothd.New(target, options...)
	must(t, err)
	defer client.Close()
	_, err = client.ServerInfo(bounded(t))
	return err
}

func files(t *testing.T, ca, certificate, key string) unslothd.Option {
	config, err := unslothd.TLSFromFiles(ca, certificate, key)
	must(t, err)
	return unslothd.WithTLS(config)
}

func TestAServerOfTheRightAuthorityIsTrustedWithTheToken(t *testing.T) {
	a, s := newAuthority(t), &script{}
	target := serveTLS(t, s, a, "127.0.0.1", tls.NoClientCert)
	must(t, infoFrom(t, target, files(t, a.ca, "", ""), unslothd.WithToken(plantedToken)))
	if got := s.headers.Get("authorization"); len(got) != 1 || got[0] != "Bearer "+plantedToken {
		t.Fatal(got)
	}
}

func TestTheEnvironmentSaysWhatNoOptionSays(t *testing.T) {
	a, s := newAuthority(t), &script{}
	file := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(file, []byte("of-the-file\n"), 0o600))
	t.Setenv("UNSLOTHD_TARGET", serveTLS(t, s, a, "127.0.0.1", tls.NoClientCert))
	t.Setenv("UNSLOTHD_CA", a.ca)
	t.Setenv("UNSLOTHD_TOKEN_FILE", file)
	for _, want := range []string{"of-the-file", "of-the-option"} {
		var options []unslothd.Option
		if want == "of-the-option" {
			options = append(options, unslothd.WithToken(want))
		}
		must(t, infoFrom(t, "", options...))
		if got := s.headers.Get("authorization"); len(got) != 1 || got[0] != "Bearer "+want {
			t.Fatal(got)
		}
	}
}

func TestAClientCertificateIsShown(t *testing.T) {
	a, s := newAuthority(t), &script{}
	target := serveTLS(t, s, a, "127.0.0.1", tls.RequireAndVerifyClientCert)
	certificate, key := a.signs(t, "127.0.0.1", x509.ExtKeyUsageClientAuth)
	must(t, infoFrom(t, target, files(t, a.ca, certificate, key)))
	if err := infoFrom(t, target, files(t, a.ca, "", "")); !errors.Is(err, unslothd.Unavailable) {
		t.Fatal(err)
	}
}

func TestWhatIsWrongWithTLSIsTold(t *testing.T) {
	a, stranger, s := newAuthority(t), newAuthority(t), &script{}
	target := serveTLS(t, s, a, "127.0.0.1", tls.NoClientCert)
	elsewhere := serveTLS(t, s, a, "10.1.2.3", tls.NoClientCert)
	plain := listen(t, s)
	token := unslothd.WithToken(plantedToken)
	tellsWhatToCheck(t, infoFrom(t, target, files(t, stranger.ca, "", ""), token), "not of an authority that this client trusts")
	tellsWhatToCheck(t, infoFrom(t, elsewhere, files(t, a.ca, "", ""), token), "certificate is for another name")
	tellsWhatToCheck(t, infoFrom(t, target), "it may want TLS")
	tellsWhatToCheck(t, infoFrom(t, plain, files(t, a.ca, "", ""), token), "speaks no TLS")
	if s.headers != nil {
		t.Fatal("a server that is not trusted got a call")
	}
}

func tellsWhatToCheck(t *testing.T, err error, text string) {
	t.Helper()
	if !errors.Is(err, unslothd.Unavailable) || !strings.Contains(err.Error(), text) {
		t.Fatalf("%v; expected: %s", err, text)
	}
}

func TestNoTokenGoesToAnotherHostInPlainText(t *testing.T) {
	header := unslothd.WithMetadata(map[string]string{"Authorization": "Bearer " + plantedToken})
	for _, option := range []unslothd.Option{unslothd.WithToken(plantedToken), header} {
		for _, target := range []string{"gpu-host:1", "10.0.0.1:1", "127.0.0.1.evil.example:1", "0.0.0.0:1", "[2001:db8::1]:1"} {
			_, err := unslothd.New(target, option)
			if err == nil || !strings.Contains(err.Error(), "plain text") || strings.Contains(err.Error(), plantedToken) {
				t.Errorf("%s: %v", target, err)
			}
		}
		for _, target := range []string{"localhost:1", "LOCALHOST:1", "127.9.9.9:1", "[::1]:1", "dns:///localhost:1", "unix:/s"} {
			client, err := unslothd.New(target, option)
			must(t, err)
			_ = client.Close()
		}
	}
}

func TestNoHubTokenGoesToAnotherHostInPlainText(t *testing.T) {
	s := &script{}
	here := listen(t, s)
	elsewhere := strings.Replace(here, "127.0.0.1", "0.0.0.0", 1) // leads to the server, but not surely
	load := func(target, token string) error {
		client, err := unslothd.New(target)
		must(t, err)
		defer client.Close()
		_, err = client.LoadModel(bounded(t), &pb.LoadModelRequest{ModelName: "org/gated", Token: token}, nil)
		return err
	}
	err := load(elsewhere, plantedToken)
	if !errors.Is(err, unslothd.ReasonHubTokenInPlainText) || !errors.Is(err, unslothd.FailedPrecondition) {
		t.Error(err)
	}
	if !strings.Contains(err.Error(), "add WithTLS") || strings.Contains(err.Error(), plantedToken) {
		t.Error(err)
	}
	must(t, load(elsewhere, ""))
	must(t, load(here, plantedToken))
	if len(s.loaded) != 2 || s.loaded[1] != plantedToken {
		t.Error(s.loaded)
	}
}

func TestSettingsThatCannotBeUsedAreToldWithoutTheToken(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "absent")
	for text, options := range map[string][]unslothd.Option{
		"one word of ASCII":     {unslothd.WithToken("two " + plantedToken)},
		"leave one of them out": {unslothd.WithToken(plantedToken), unslothd.WithTokenFile(absent)},
		"token file":            {unslothd.WithTokenFile(absent)},
	} {
		_, err := unslothd.New("localhost:1", options...)
		if err == nil || !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), plantedToken) {
			t.Errorf("%v; expected: %s", err, text)
		}
	}
	if _, err := unslothd.TLSFromFiles("", absent, ""); err == nil || !strings.Contains(err.Error(), "belong together") {
		t.Error(err)
	}
	if _, err := unslothd.TLSFromFiles(absent, "", ""); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	t.Setenv("UNSLOTHD_TLS", "maybe")
	if _, err := unslothd.New("localhost:1"); err == nil || !strings.Contains(err.Error(), "UNSLOTHD_TLS") {
		t.Error(err)
	}
}

func TestATokenIsShownNowhereAndAFileThatOthersReadIsWarnedOf(t *testing.T) {
	var logged bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&logged, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	file := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(file, []byte(plantedToken), 0o600))
	client, err := unslothd.New("localhost:1", unslothd.WithTokenFile(file))
	must(t, err)
	_ = client.Close()
	if logged.Len() > 0 {
		t.Fatal(logged.String())
	}
	must(t, os.Chmod(file, 0o644))
	client, err = unslothd.New("localhost:1", unslothd.WithTokenFile(file))
	must(t, err)
	defer client.Close()
	if !strings.Contains(logged.String(), "can be read by others") {
		t.Fatal(logged.String())
	}
	if shown := fmt.Sprintf("%v %+v %#v", client, client, client) + logged.String(); strings.Contains(shown, plantedToken) {
		t.Fatal(shown)
	}
}
