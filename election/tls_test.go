package election

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"leasehold/e2e/harness"
)

func TestCandidate_TLS(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{TLS: certs})
	proxy := harness.NewTestProxy(t, cluster.Endpoints()[0])
	withTLS := func(cfg *Config, _ *testCallbacks) {
		cfg.TLS = TLS{
			CAFile:   certs.CAFile,
			CertFile: certs.ClientCertFile,
			KeyFile:  certs.ClientKeyFile,
		}
	}
	a := newTestCandidate(t, []string{"https://" + proxy.Addr()}, "a", withTLS)
	term := a.waitForTerm()
	if err := certs.IssueClient(4711); err != nil {
		t.Fatal(err)
	}
	proxy.Drop()
	a.waitForExtensions(2)
	a.expectLeading(term)

	stranger := newTestCandidate(t, cluster.Endpoints(), "stranger", nil)
	stranger.waitFor(
		"refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "certificate") },
	)
	if _, err := New(func() Config {
		cfg := testConfig(t, cluster.Endpoints(), "")
		cfg.TLS.CAFile = "/nowhere"
		return cfg
	}()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("New with a CA file that is not there: %v", err)
	}
}

// Each handshake shows the certificate that is in the file then.
func TestCredentials_FilesAreReadAgain(t *testing.T) {
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server, err := tls.LoadX509KeyPair(certs.ServerCertFile, certs.ServerKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(certs.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	creds, err := newCredentials(
		TLS{
			CAFile:     certs.CAFile,
			CertFile:   certs.ClientCertFile,
			KeyFile:    certs.ClientKeyFile,
			ServerName: "localhost",
		},
	)
	if err != nil {
		t.Fatal(err)
	}
	for _, serial := range []int64{1001, 1002} {
		if err := certs.IssueClient(serial); err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		seen := make(chan string, 1)
		go func() {
			conn := tls.Server(there, &tls.Config{
				Certificates: []tls.Certificate{
					server,
				},
				ClientAuth: tls.RequireAndVerifyClientCert,
				ClientCAs:  roots,
				NextProtos: []string{"h2"},
			})
			if err := conn.Handshake(); err != nil {
				seen <- err.Error()
				return
			}
			seen <- conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
		}()
		conn, _, err := creds.ClientHandshake(t.Context(), "somewhere.else:2379", here)
		if err != nil {
			t.Fatal(err)
		}
		if got := <-seen; got != fmt.Sprint(serial) {
			t.Errorf("the server saw serial %s, want %d", got, serial)
		}
		there.Close() // first, or the other end waits for its last word to be read
		conn.Close()
	}
}
