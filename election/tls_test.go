package election

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"
	"slices"
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

// recorder is a connection that keeps what each Write got.
type recorder struct {
	net.Conn
	writes [][]byte
}

func (r *recorder) Write(p []byte) (int, error) {
	r.writes = append(r.writes, slices.Clone(p))
	return len(p), nil
}

// A request wakes etcd once: its headers go out with its message. All else goes out at once, and
// nothing is reordered or lost.
func TestBatching(t *testing.T) {
	// A frame's length, type and flags, and the number of its stream (RFC 9113, section 4.1).
	frame := func(kind, flags byte, payload string) []byte {
		return append([]byte{0, 0, byte(len(payload)), kind, flags, 0, 0, 0, 1}, payload...)
	}
	headers, whole := frame(1, 0x4, "headers"), frame(1, 0x5, "headers")
	message, reset, ping := frame(0, 0x1, "message"), frame(3, 0, "why!"), frame(6, 0, "12345678")
	preface := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	both := slices.Concat(headers, message)
	type writes = [][]byte
	for name, c := range map[string]struct{ in, want writes }{
		"apart":               {writes{headers, message}, writes{both}},
		"together":            {writes{both}, writes{both}},
		"without a message":   {writes{whole, ping}, writes{whole, ping}},
		"canceled":            {writes{headers, reset}, writes{slices.Concat(headers, reset)}},
		"one after the other": {writes{headers, message, headers, message}, writes{both, both}},
		"others":              {writes{preface, ping, message}, writes{preface, ping, message}},
		"two requests": {
			writes{headers, headers, message}, writes{slices.Concat(headers, headers), message},
		},
		"part of a frame": {
			writes{headers[:12], headers[12:]}, writes{headers[:12], headers[12:]},
		},
		"several frames": {
			writes{slices.Concat(ping, headers)}, writes{slices.Concat(ping, headers)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{}
			conn := batching{Conn: r}
			for _, p := range c.in {
				if n, err := conn.Write(p); n != len(p) || err != nil {
					t.Errorf("Write of %d bytes: %d, %v", len(p), n, err)
				}
			}
			if !reflect.DeepEqual(r.writes, c.want) {
				t.Errorf("written: %q, want %q", r.writes, c.want)
			}
		})
	}
}
