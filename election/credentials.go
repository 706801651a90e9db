package election

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// auth holds the token that etcd gave for a user name and password. With both in its Config etcd's client would authenticate
// before every stream, at 80 ms of bcrypt each; here it is done once, and again only when etcd says that the token is no good.
type auth struct {
	username string
	password func() (string, error)

	mu    sync.Mutex
	token string
	known bool // etcd has given a token, or said that it wants none
	// refusal is that of our user name or password, and is taken for an answer until refused + refusalHolds: to check a
	// password costs etcd 80 ms.
	refusal error
	refused time.Time
}

const refusalHolds = time.Second

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (a *auth) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, _ := a.current()
	if token == "" {
		return nil, nil
	}
	return map[string]string{rpctypes.TokenFieldNameGRPC: token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials. etcd allows passwords without TLS, and so does its client.
func (a *auth) RequireTransportSecurity() bool { return false }

func (a *auth) current() (token string, known bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.token, a.known
}

func (a *auth) set(token string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token, a.known, a.refusal = token, true, nil
}

func (a *auth) refuse(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refusal, a.refused = err, time.Now()
}

// refusing returns the refusal that was a moment ago.
func (a *auth) refusing() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.refused) < refusalHolds {
		return a.refusal
	}
	return nil
}

// unauthenticated tells whether a new token may help.
func unauthenticated(err error) bool {
	err = rpctypes.Error(err)
	return errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrUserEmpty) || errors.Is(err, rpctypes.ErrAuthOldRevision)
}

// intercept gives all unary requests a token. Streams get theirs from GetRequestMetadata; those that fail for it are opened
// again by whoever opened them, after a unary request or through authenticated.
func (m *member) intercept(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if method == pb.Auth_Authenticate_FullMethodName {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	return m.authenticated(ctx, conn, func() error { return invoke(ctx, method, req, reply, conn, opts...) })
}

// authenticated carries out the call with a token, and once more with a new one if etcd refuses the one we have.
func (m *member) authenticated(ctx context.Context, conn *grpc.ClientConn, call func() error) error {
	if m.auth == nil {
		return call()
	}
	token, known := m.auth.current()
	if !known {
		if err := m.authenticate(ctx, conn, token); err != nil {
			return err
		}
		token, _ = m.auth.current()
	}
	err := call()
	if !unauthenticated(err) {
		return err
	}
	if err := m.authenticate(ctx, conn, token); err != nil {
		return err
	}
	return call()
}

// authenticate gets a token in place of the refused one, unless somebody has meanwhile. There is one lock for each member and
// not one for all: a member that does not answer must not hold up the others.
func (m *member) authenticate(ctx context.Context, conn *grpc.ClientConn, refused string) error {
	select {
	case m.authenticating <- struct{}{}:
		defer func() { <-m.authenticating }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if token, known := m.auth.current(); known && token != refused {
		return nil
	}
	if err := m.auth.refusing(); err != nil {
		return err
	}
	password, err := m.auth.password()
	if err != nil {
		return fmt.Errorf("read the password: %w", err)
	}
	resp, err := pb.NewAuthClient(conn).Authenticate(ctx, &pb.AuthenticateRequest{Name: m.auth.username, Password: password})
	switch err = rpctypes.Error(err); {
	case errors.Is(err, rpctypes.ErrAuthNotEnabled):
		m.auth.set("")
		return nil
	case err != nil:
		err = fmt.Errorf("authenticate as %q: %w", m.auth.username, err)
		if errors.Is(err, rpctypes.ErrAuthFailed) {
			m.auth.refuse(err)
		}
		return err
	}
	m.auth.set(resp.Token)
	return nil
}

// reloading are transport credentials that read their files at each handshake, so that renewed certificates are used without
// anybody watching them. Connections that are up stay up.
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
func (r *reloading) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := r.files.load()
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	if r.files.ServerName != "" {
		authority = r.files.ServerName
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
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
