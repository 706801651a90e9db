package election

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// auth holds the token that etcd gave for a user name and password. etcd's client, with both in its
// Config, would authenticate before every stream, and each time etcd needs 80 ms for bcrypt. We do
// it once, and again only when etcd says that the token is invalid.
//
// A candidate makes one authentication at a time, however many requests need it. It outlives these
// requests, because etcd checks a password to the end even if nobody waits for the result. If
// hundreds of candidates gave up and began again, as after a restart of etcd, etcd would do nothing
// else.
type auth struct {
	username string
	password func() (string, error)
	members  *members
	obtained func(token string) // called with each new token; may be nil
	// spread is the longest wait before a token is replaced: many tokens may expire at once.
	spread time.Duration
	// hang is for how long a member may check a password before another one is asked as well.
	hang time.Duration

	life context.Context // ends with the members
	end  context.CancelFunc

	mu       sync.Mutex
	token    string
	known    bool            // etcd has given a token, or said that it needs none
	inFlight *authentication // nil: none
	// failure is why the last one failed. Until retryAt, requests get this error at once.
	failure error
	retryAt time.Time
}

// authentication is one that is in flight.
type authentication struct {
	done chan struct{} // closed when it has ended
	err  error         // set before that
}

const (
	// authTimeout bounds an authentication while etcd answers our pings (one every 10 s) within 20
	// s. etcd may have thousands of passwords to check, and finishes all of them at about the same
	// time.
	authTimeout = 5 * time.Minute
	pingEvery   = 10 * time.Second
	pingTimeout = 20 * time.Second
	// mostHold bounds the pause after an authentication that failed, before it is varied at random.
	mostHold = 5 * time.Second
	// refusalHolds is the pause after a wrong password, which costs etcd as much as a right one.
	refusalHolds = time.Second
)

func newAuth(cfg Config, ms *members) *auth {
	a := &auth{
		username: cfg.Username,
		password: cfg.Password,
		members:  ms,
		spread:   min(cfg.TTL/20, time.Second),
		hang:     max(cfg.TTL/5, time.Second),
		obtained: cfg.Authenticated,
		token:    cfg.AuthToken,
		known:    cfg.AuthToken != "",
	}
	a.life, a.end = context.WithCancel(context.Background())
	return a
}

// GetRequestMetadata implements credentials.PerRPCCredentials. An etcd before 3.4.28 looks for a
// token in an authentication too: the old one, which it no longer knows, must not be there.
func (a *auth) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	request, _ := credentials.RequestInfoFromContext(ctx)
	if request.Method == pb.Auth_Authenticate_FullMethodName {
		return nil, nil
	}
	token, _ := a.current()
	if token == "" {
		return nil, nil
	}
	return map[string]string{rpctypes.TokenFieldNameGRPC: token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials. etcd allows passwords without
// TLS, and so does its client.
func (a *auth) RequireTransportSecurity() bool { return false }

func (a *auth) current() (token string, known bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.token, a.known
}

// busy reports whether requests may be waiting for a token. If they get no answer, that is not the
// member's doing.
func (a *auth) busy() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.inFlight != nil
}

// close cancels what is in flight.
func (a *auth) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.end()
}

// unauthenticated reports whether a new token may help.
func unauthenticated(err error) bool {
	err = rpctypes.Error(err)
	return errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrUserEmpty) ||
		errors.Is(err, rpctypes.ErrAuthOldRevision)
}

// intercept gives all unary requests a token. Streams get theirs from GetRequestMetadata. If a
// stream fails because of its token, its owner opens it again, after a unary request or by
// authenticated.
func (m *member) intercept(
	ctx context.Context, method string, req, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	if method == pb.Auth_Authenticate_FullMethodName {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	call := func() error { return invoke(ctx, method, req, reply, conn, opts...) }
	return m.authenticated(ctx, call)
}

// authenticated makes the call with a token, and once more with a new one if etcd refuses the
// first.
func (m *member) authenticated(ctx context.Context, call func() error) error {
	if m.auth == nil {
		return call()
	}
	token, known := m.auth.current()
	if !known {
		if err := m.auth.replace(ctx, token, m); err != nil {
			return authError{err}
		}
		token, _ = m.auth.current()
	}
	err := call()
	if !unauthenticated(err) {
		return err
	}
	if err := m.auth.replace(ctx, token, m); err != nil {
		return authError{err}
	}
	return call()
}

// replace waits for a new token in place of the refused one. It asks first the member that the
// token is for.
func (a *auth) replace(ctx context.Context, refused string, first *member) error {
	a.mu.Lock()
	switch {
	case a.known && a.token != refused:
		a.mu.Unlock()
		return nil
	case a.life.Err() != nil:
		a.mu.Unlock()
		return errClosed
	case a.inFlight == nil && time.Now().Before(a.retryAt):
		defer a.mu.Unlock()
		return a.failure
	case a.inFlight == nil:
		this := &authentication{done: make(chan struct{})}
		a.inFlight = this
		pause := time.Duration(0)
		if a.known {
			pause = rand.N(a.spread + 1)
		}
		a.members.closing.Go(func() { a.run(this, pause, first) })
	}
	this := a.inFlight
	a.mu.Unlock()
	select {
	case <-this.done:
		return this.err
	case <-ctx.Done():
		return fmt.Errorf("authenticate as %q: %w", a.username, ctx.Err())
	}
}

// run carries out the authentication after the pause.
func (a *auth) run(this *authentication, pause time.Duration, first *member) {
	select {
	case <-time.After(pause):
	case <-a.life.Done():
	}
	began := time.Now()
	token, err := a.ask(first)
	if err == nil && token != "" && a.obtained != nil {
		a.obtained(token)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inFlight, this.err = nil, err
	close(this.done)
	if err == nil {
		a.token, a.known = token, true
		return
	}
	// If it took etcd long, we do not repeat it soon, and not all candidates repeat it at once.
	hold := min(max(time.Since(began), 50*time.Millisecond), mostHold)
	if errors.Is(err, rpctypes.ErrAuthFailed) {
		hold = refusalHolds
	}
	a.failure, a.retryAt = err, time.Now().Add(hold/2+rand.N(hold))
}

// ask asks one member after the other until one says whether the password is right. If one has not
// answered in time, ask asks another one as well: a member that hangs must not end a term. It does
// not do so earlier, and it never asks more than two at a time, because each checks the password to
// the end. While one hangs, those that have failed are asked again: etcd may have had no leader.
func (a *auth) ask(first *member) (token string, err error) {
	password, err := a.password()
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	type answer struct {
		from  *member
		token string
		err   error
	}
	list := a.members.all()
	start := slices.Index(list, first)
	queue := slices.Concat(list[start:], list[:start])
	answers := make(chan answer, len(list))
	var asked sync.WaitGroup
	defer asked.Wait()
	// With this, a member that knows no leader of etcd says so at once.
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(a.life), authTimeout)
	defer cancel()
	unasked, waiting, next := len(list), 0, true
	for unasked > 0 || waiting > 0 {
		if next && len(queue) > 0 {
			m := queue[0]
			queue = queue[1:]
			unasked = max(0, unasked-1)
			waiting++
			asked.Go(func() {
				token, err := m.authenticate(ctx, a.username, password)
				answers <- answer{m, token, err}
			})
		}
		select {
		case <-time.After(a.hang):
			next = waiting < 2
			continue
		case got := <-answers:
			token, err = got.token, got.err
			queue = append(queue, got.from)
		}
		waiting--
		switch {
		case errors.Is(err, rpctypes.ErrAuthNotEnabled):
			return "", nil
		case err == nil, errors.Is(err, rpctypes.ErrAuthFailed), ctx.Err() != nil:
			return token, err
		}
		next = unasked > 0
	}
	return "", err
}

// authenticate gets a token from this member, over a connection of its own. The connection for
// requests would be replaced when a request waits for too long. And a new connection to a member
// that hangs does not come up.
func (m *member) authenticate(ctx context.Context, username, password string) (string, error) {
	client, err := m.dial(grpc.WithKeepaliveParams(
		keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout}))
	if err != nil {
		return "", &memberError{m.name(), err}
	}
	defer m.auth.members.closeClient(client)
	resp, err := pb.NewAuthClient(client.ActiveConnection()).Authenticate(ctx,
		&pb.AuthenticateRequest{Name: username, Password: password})
	if err != nil {
		err = fmt.Errorf("authenticate as %q: %w", username, rpctypes.Error(err))
		return "", &memberError{m.name(), err}
	}
	return resp.Token, nil
}
