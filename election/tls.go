package election

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// reloading are transport credentials that read their files at each handshake, so that renewed
// certificates are used. Connections that are up stay up.
type reloading struct {
	credentials.TransportCredentials // made of the files as they were at the start: for Info
	files                            TLS
}

func newCredentials(files TLS) (credentials.TransportCredentials, error) {
	cfg, err := files.load()
	if err != nil {
		return nil, err
	}
	return &reloading{credentials.NewTLS(cfg), files}, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (r *reloading) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := r.files.load()
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	if r.files.ServerName != "" {
		authority = r.files.ServerName
	}
	secured, info, err := credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
	var notTLS tls.RecordHeaderError
	switch {
	case errors.As(err, &notTLS):
		err = fmt.Errorf("the endpoint does not speak TLS: its URL must begin with http: %w", err)
	case closedByPeer(err):
		err = fmt.Errorf("the endpoint ended the TLS handshake: if it needs no TLS, "+
			"its URL must begin with http: %w", err)
	}
	if err != nil {
		return nil, nil, err
	}
	return &batching{Conn: secured}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (r *reloading) Clone() credentials.TransportCredentials {
	return &reloading{r.TransportCredentials.Clone(), r.files}
}

func (t TLS) load() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the CA certificates: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read the CA certificates: %s holds none", t.CAFile)
		}
	}
	if t.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read the client certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return cfg, nil
}

// plain are transport credentials without TLS. They report it if the endpoint seems to expect TLS.
type plain struct {
	credentials.TransportCredentials
}

func newPlainCredentials() credentials.TransportCredentials {
	return plain{insecure.NewCredentials()}
}

// ClientHandshake implements credentials.TransportCredentials.
func (p plain) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := p.TransportCredentials.ClientHandshake(ctx, authority, conn)
	return &plainConn{batching: batching{Conn: conn}}, info, err
}

// Clone implements credentials.TransportCredentials.
func (p plain) Clone() credentials.TransportCredentials {
	return plain{p.TransportCredentials.Clone()}
}

// plainConn is a connection without TLS. gRPC reads from it in one goroutine.
type plainConn struct {
	batching
	spoken bool // the endpoint has sent something
}

// recordTypeAlert is the first byte of a TLS alert (RFC 8446, section 5.1).
const recordTypeAlert = 21

// Read implements net.Conn.
func (c *plainConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.spoken || n == 0 && err == nil {
		return n, err
	}
	c.spoken = true
	switch {
	case n > 0 && p[0] == recordTypeAlert:
		return 0, errors.New("the endpoint speaks TLS: its URL must begin with https")
	case n == 0 && closedByPeer(err):
		err = fmt.Errorf("the endpoint closed the connection at once: if it speaks TLS, "+
			"its URL must begin with https: %w", err)
	}
	return n, err
}

// closedByPeer reports whether the other end has closed the connection.
func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
}

// batching is a connection that writes the headers of a request together with the message that
// follows. gRPC writes from one goroutine. Where that is quicker than the one that encodes the
// message, it writes twice, and wakes etcd twice.
type batching struct {
	net.Conn
	held []byte // headers that are not written yet
}

// Write implements net.Conn.
func (b *batching) Write(p []byte) (int, error) {
	if len(b.held) == 0 && onlyHeaders(p) {
		b.held = append(b.held, p...)
		return len(p), nil
	}
	if len(b.held) == 0 {
		return b.Conn.Write(p)
	}
	all := append(b.held, p...)
	b.held = all[:0]
	n, err := b.Conn.Write(all)
	return max(0, n-len(all)+len(p)), err
}

// onlyHeaders reports whether p is one HTTP/2 frame that opens a stream, and on which more has to
// follow (RFC 9113, sections 4.1 and 6.2). None of our requests waits for an answer before that,
// and etcd lets each stream send at once.
func onlyHeaders(p []byte) bool {
	const headerLen, typeHeaders, endStream, endHeaders = 9, 1, 0x1, 0x4
	return len(p) >= headerLen && p[3] == typeHeaders && p[4]&endStream == 0 &&
		p[4]&endHeaders != 0 && len(p) == headerLen+(int(p[0])<<16|int(p[1])<<8|int(p[2]))
}
