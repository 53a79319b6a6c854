package unslothd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"runtime"
	"strings"
)

// Environment variables that say what the options of New do not.
const (
	envTarget     = "UNSLOTHD_TARGET"
	envToken      = "UNSLOTHD_TOKEN"
	envTokenFile  = "UNSLOTHD_TOKEN_FILE"
	envCA         = "UNSLOTHD_CA"
	envClientCert = "UNSLOTHD_CLIENT_CERT"
	envClientKey  = "UNSLOTHD_CLIENT_KEY"
	envTLS        = "UNSLOTHD_TLS"
)

// What a header can carry.
var wellFormedToken = regexp.MustCompile(`^[\x21-\x7e]+$`)

// TLSFromFiles returns a configuration for WithTLS from PEM files: the certificates of the authority that signed the
// server's, and the client's own certificate with its key. Empty means the system's authorities, and no certificate.
func TLSFromFiles(ca, certificate, key string) (*tls.Config, error) {
	config := &tls.Config{}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca: %s holds no certificate in PEM", ca)
		}
	}
	if (certificate == "") != (key == "") {
		return nil, errors.New("a client certificate and its key belong together: give both, or neither")
	}
	if certificate != "" {
		pair, err := tls.LoadX509KeyPair(certificate, key)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// complete takes from the environment what no option said, and checks that no token would be shown to others.
func (s *settings) complete(target string) error {
	if s.tls == nil {
		config, err := tlsFromEnvironment()
		if err != nil {
			return err
		}
		s.tls = config
	}
	token, err := s.foundToken()
	if err != nil {
		return err
	}
	if token != "" {
		s.headers["authorization"] = "Bearer " + token
	}
	if s.headers["authorization"] != "" && s.exposed(target) {
		return errors.New(inPlainText("token", target))
	}
	return nil
}

// exposed tells whether others could read what is sent to a target: it goes to another host without TLS.
func (s *settings) exposed(target string) bool { return s.tls == nil && !isThisHost(target) }

func inPlainText(what, target string) string {
	return fmt.Sprintf("a %s for %s would travel in plain text: add WithTLS, or set %s", what, target, envCA)
}

func tlsFromEnvironment() (*tls.Config, error) {
	ca, certificate, key := os.Getenv(envCA), os.Getenv(envClientCert), os.Getenv(envClientKey)
	wanted, err := switchedOn(os.Getenv(envTLS))
	if err != nil || !(wanted || ca != "" || certificate != "" || key != "") {
		return nil, err
	}
	return TLSFromFiles(ca, certificate, key)
}

func switchedOn(text string) (bool, error) {
	switch strings.ToLower(text) {
	case "1", "true", "on", "yes":
		return true, nil
	case "", "0", "false", "off", "no":
		return false, nil
	}
	return false, fmt.Errorf("%s is %q: write 1 or 0", envTLS, text)
}

// foundToken returns the token of the options, else that of the environment; empty = none. Its errors do not show it.
func (s *settings) foundToken() (string, error) {
	token, file := s.token, s.tokenFile
	if token == "" && file == "" {
		token, file = os.Getenv(envToken), os.Getenv(envTokenFile)
	}
	switch {
	case token == "" && file == "":
		return "", nil
	case token != "" && file != "":
		return "", errors.New("a token and the file of a token are given: leave one of them out")
	case file != "":
		content, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("token file: %w", err)
		}
		warnIfReadableByOthers(file)
		token = string(content)
	}
	token = strings.TrimSpace(token)
	if !wellFormedToken.MatchString(token) {
		return "", errors.New("the token is none: it must be one word of ASCII characters, as `unslothd tokens create` printed it")
	}
	return token, nil
}

func warnIfReadableByOthers(file string) {
	info, err := os.Stat(file)
	if err == nil && runtime.GOOS != "windows" && info.Mode().Perm()&0o044 != 0 {
		slog.Warn("a file with a token can be read by others; run chmod 600 on it", "file", file)
	}
}

// isThisHost tells whether what is sent to a target never leaves this machine; false where that is not sure.
func isThisHost(target string) bool {
	if strings.HasPrefix(target, "unix:") {
		return true
	}
	target = strings.TrimPrefix(strings.TrimPrefix(target, "dns:///"), "passthrough:///")
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = target
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return strings.EqualFold(host, "localhost") || (ip != nil && ip.IsLoopback())
}
