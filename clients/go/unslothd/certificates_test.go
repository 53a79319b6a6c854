package unslothd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// authority signs certificates, which lie in a folder.
type authority struct {
	folder      string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	ca          string
}

func newAuthority(t *testing.T) *authority {
	a := &authority{folder: t.TempDir()}
	a.key = newKey(t)
	a.certificate = &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	encoded, err := x509.CreateCertificate(rand.Reader, a.certificate, a.certificate, a.key.Public(), a.key)
	must(t, err)
	a.ca = a.write(t, "ca.pem", "CERTIFICATE", encoded)
	return a
}

// signs makes a certificate for a server at this address, or for a client; it returns the paths of it and its key.
func (a *authority) signs(t *testing.T, address string, usage x509.ExtKeyUsage) (string, string) {
	key := newKey(t)
	wanted := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(address)}, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	encoded, err := x509.CreateCertificate(rand.Reader, wanted, a.certificate, key.Public(), a.key)
	must(t, err)
	encodedKey, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	name := fmt.Sprintf("%s-%d", address, usage)
	return a.write(t, name+".pem", "CERTIFICATE", encoded), a.write(t, name+".key", "PRIVATE KEY", encodedKey)
}

func (a *authority) write(t *testing.T, name, kind string, content []byte) string {
	path := filepath.Join(a.folder, name)
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content}), 0o600))
	return path
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

// serveTLS starts a server with a certificate for address, and returns where it listens.
func serveTLS(t *testing.T, s *script, a *authority, address string, clients tls.ClientAuthType) string {
	certificate, key := a.signs(t, address, x509.ExtKeyUsageServerAuth)
	pair, err := tls.LoadX509KeyPair(certificate, key)
	must(t, err)
	pool := x509.NewCertPool()
	content, err := os.ReadFile(a.ca)
	must(t, err)
	pool.AppendCertsFromPEM(content)
	config := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: clients, ClientCAs: pool}
	return listen(t, s, grpc.Creds(credentials.NewTLS(config)))
}
