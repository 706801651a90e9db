// Package kubernetes makes the leader the one endpoint of a Service.
//
// The Service has no selector, so Kubernetes itself gives it no endpoints. The leader writes the
// address of its pod into an EndpointSlice of the Service's name, and its fencing token into an
// annotation of that, and its election into another. When the term has ended, it takes the address
// out, unless the next leader has replaced it by then. If it was killed before, the next process
// with that address takes it out. The EndpointSlice stays, with the token.
//
// No write replaces one with a higher token. Whoever writes has read the object before, refuses a
// token that is higher than its own, and names the version that it has read: the API server carries
// the write out only if that is still the present one. So a request that was delayed by any time
// fails if somebody has written since. That rests on the object: whoever deletes it deletes the
// token.
//
// It is not promised that connections reach the leader alone. The API server may not answer, the
// nodes take a moment to learn of a change, and a connection that is open stays so. The fencing
// token is for that. Nothing here decides who leads, and nobody waits for it.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"
)

const (
	// attemptTime bounds one attempt, which is a few requests.
	attemptTime = 5 * time.Second
	// firstRetry is the pause after an attempt that failed. It doubles up to lastRetry.
	firstRetry = 200 * time.Millisecond
	lastRetry  = 10 * time.Second
	// recheck is how often the leader looks whether its address is still there, and whether the
	// Service has other ports.
	recheck = 30 * time.Second
	// leaveDelay is from the end of a term until its address is taken out. In a planned hand-over
	// the next leader has replaced it by then. That is better than to take it out at once, because
	// kube-proxy carries out changes once a second only.
	//
	// So late a process that begins takes out what one before it has left. An elector that goes on
	// with a term is the leader by then.
	leaveDelay = time.Second
	// exitDelay takes the place of leaveDelay if the daemon exits: it has released its lease.
	exitDelay = 250 * time.Millisecond
	// exitTime bounds how long a daemon that exits tries to take its address out then, and exitTry
	// one attempt: by another connection, another API server may answer.
	exitTime = 2 * time.Second
	exitTry  = 500 * time.Millisecond
	// mostConflicts bounds how often an attempt begins anew because others write, too.
	mostConflicts = 5

	never = time.Duration(1<<63 - 1)
)

// Config configures an Endpoint.
type Config struct {
	// Server is the host:port of the API server. It is asked by HTTPS.
	Server string
	// Account is the directory of the pod's service account: AccountDir.
	Account string
	// Election is written beside the token. Those of another one are never replaced.
	Election string
	// Service is the name of the Service, in the pod's namespace.
	Service string
	// Address is the one that the Service is to route to.
	Address netip.Addr
	// Adopted is the token of the term that this process goes on with; 0: it begins anew.
	Adopted int64
	// Term returns what is true now. It must not block.
	Term func() Term
	// Now reads the clock of Term.StopAt.
	Now    func() time.Duration
	Logger *slog.Logger
}

// Term is what has to be known of a term.
type Term struct {
	Token  int64         // the fencing token; 0: this pod is not to be the endpoint
	StopAt time.Duration // when the term ends, unless the lease is renewed
}

// Endpoint keeps the EndpointSlice of a Service as its term requires.
type Endpoint struct {
	cfg     Config
	log     *slog.Logger
	api     *api
	changed chan struct{} // room for one

	// The rest is of Run's goroutine.
	goal  goal
	dueAt time.Duration // when to try, or to look, again
	retry time.Duration // the last pause
	// unanswered: the API server may still carry out a write of ours, at any time, if the object
	// has the version then that we had read. So the next write makes another one in any case.
	unanswered bool
	looked     bool  // what an earlier process has left in the EndpointSlice is known
	left       int64 // by look: the token with which the address is there; 0: it is not
	routed     bool  // as it was last logged

	problem string // the kind of error that was logged; "": there is none
	since   time.Duration
}

// A goal is what the EndpointSlice is to say. The zero goal is none: this process has written
// nothing that it would have to take out.
type goal struct {
	token int64
	in    bool // else the address is to be taken out that was written with this token
}

// New makes an Endpoint. It asks nobody.
func New(cfg Config) *Endpoint {
	adopted := cfg.Adopted != 0
	return &Endpoint{
		cfg: cfg, log: cfg.Logger.With("service", cfg.Service),
		api: newAPI(cfg.Server, cfg.Account), changed: make(chan struct{}, 1),
		goal: goal{token: cfg.Adopted}, routed: adopted,
		unanswered: adopted, // for all that we know
	}
}

// Changed has Run ask for the term again. It never blocks.
func (e *Endpoint) Changed() {
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

// Run writes until ctx ends. Then it takes the address out, if it is still there after exitDelay,
// and the API server answers within exitTime.
func (e *Endpoint) Run(ctx context.Context) {
	defer e.api.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	e.dueAt = e.cfg.Now() + leaveDelay
	for ctx.Err() == nil {
		timer.Reset(e.serve(ctx))
		select {
		case <-ctx.Done():
		case <-e.changed:
		case <-timer.C:
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), exitDelay+exitTime)
	defer cancel()
	e.leave(ctx, timer)
}

// leave takes the address out before the daemon exits. It leads no more, whatever is said of that.
func (e *Endpoint) leave(ctx context.Context, timer *time.Timer) {
	e.cfg.Term = func() Term { return Term{} }
	e.aim(Term{})
	e.dueAt, e.retry = min(e.dueAt, e.cfg.Now()+exitDelay), 0
	for !e.done() {
		timer.Reset(e.dueAt - e.cfg.Now())
		select {
		case <-timer.C:
			e.attempt(ctx, exitTry)
		case <-ctx.Done():
			if e.goal.token != 0 {
				e.log.Warn("exiting: the Service may still route to this pod",
					"token", e.goal.token)
			}
			return
		}
	}
}

// serve does what is due. It returns in what time there is something to do again.
func (e *Endpoint) serve(ctx context.Context) time.Duration {
	term := e.cfg.Term()
	e.aim(term)
	if e.done() {
		return never
	}
	if e.cfg.Now() >= e.dueAt && !e.attempt(ctx, attemptTime) {
		return 0
	}
	if e.done() {
		return never
	}
	wait := e.dueAt - e.cfg.Now()
	if e.goal.in {
		wait = min(wait, term.StopAt-e.cfg.Now())
	}
	return max(wait, 0)
}

// done reports whether there is nothing to do before the next term.
func (e *Endpoint) done() bool { return e.goal.token == 0 && e.looked }

// aim sets the goal. If it is another one than before, it is due at once, or after leaveDelay.
func (e *Endpoint) aim(term Term) {
	next := goal{e.goal.token, false}
	if term.Token != 0 {
		next = goal{term.Token, true}
	}
	if next != e.goal {
		e.goal, e.dueAt, e.retry = next, 0, 0
		if !next.in {
			e.dueAt = e.cfg.Now() + leaveDelay
		}
	}
}

// attempt tries to reach the goal. It returns false if the goal has changed meanwhile: then it has
// given up, also if the API server hangs.
func (e *Endpoint) attempt(parent context.Context, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(parent, within)
	defer cancel()
	written := make(chan error, 1)
	g := e.goal
	go func() { written <- e.write(ctx, g) }()
	stopAt := time.NewTimer(0)
	defer stopAt.Stop()
	valid := true
	for {
		select {
		case err := <-written:
			ended := errors.Is(parent.Err(), context.Canceled) // Run goes on with another attempt
			if valid = valid && !ended && e.holds(g); valid || err == nil {
				e.attempted(err)
			}
			return valid
		case <-e.changed:
		case <-stopAt.C:
			if g.in {
				stopAt.Reset(max(e.cfg.Term().StopAt-e.cfg.Now(), 0) + time.Millisecond)
			}
		}
		if valid = valid && e.holds(g); !valid {
			cancel() // write returns soon
			stopAt.Stop()
		}
	}
}

// holds reports whether the goal is still that of the present term.
func (e *Endpoint) holds(g goal) bool {
	token := e.cfg.Term().Token
	return g.in && token == g.token || !g.in && token == 0
}

// attempted notes how an attempt has ended.
func (e *Endpoint) attempted(err error) {
	now := e.cfg.Now()
	if err == nil {
		e.reached(now)
		return
	}
	e.retry = min(max(2*e.retry, firstRetry), lastRetry)
	e.dueAt = now + e.retry*4/5 + rand.N(e.retry*2/5)
	kind := kindOf(err)
	if kind == e.problem {
		return
	}
	if e.problem == "" {
		e.since = now
	}
	e.problem = kind
	attrs := []any{"token", e.goal.token, "err", err}
	if e.goal.token == 0 {
		attrs = attrs[2:]
	}
	if refused := (*statusError)(nil); errors.As(err, &refused) && refused.code == forbidden {
		attrs = append(attrs, "right", refused.right)
	}
	text := "the Service can't be made to route to this pod, trying again"
	switch {
	case e.goal.token == 0:
		text = "can't look whether the Service still routes to this pod, trying again"
	case !e.goal.in:
		text = "this pod can't be taken out of the Service, trying again"
	}
	e.log.Warn(text, attrs...)
}

// reached notes that the EndpointSlice is as it should be.
func (e *Endpoint) reached(now time.Duration) {
	e.retry, e.dueAt = 0, now+recheck
	if e.problem != "" {
		e.log.Info("the endpoint of the Service can be written again",
			"elapsed", (now - e.since).Round(time.Millisecond).String())
		e.problem = ""
	}
	if e.routed != e.goal.in {
		e.routed = e.goal.in
		text := "the Service routes to this pod"
		if !e.routed {
			text = "the Service does not route to this pod any more"
		}
		e.log.Info(text, "token", e.goal.token)
	}
	e.looked = true
	if !e.goal.in {
		e.goal = goal{token: e.left}
	}
	if e.left != 0 { // it is to be taken out now
		e.left, e.routed, e.dueAt = 0, true, now
	}
}

// write makes the EndpointSlice say what the goal is. It begins anew if others write meanwhile.
func (e *Endpoint) write(ctx context.Context, g goal) (err error) {
	for range mostConflicts {
		switch {
		case g.in:
			err = e.putIn(ctx, g.token)
		case g.token != 0:
			err = e.takeOut(ctx, g.token)
		default:
			err = e.look(ctx)
		}
		if refused := (*statusError)(nil); !errors.As(err, &refused) || refused.code != conflict {
			return err
		}
	}
	return err
}

func (e *Endpoint) claim(token int64) claim {
	return claim{e.cfg.Election, token, e.cfg.Address}
}

// putIn makes this pod the endpoint, unless a higher token is there, or that of another election.
func (e *Endpoint) putIn(ctx context.Context, token int64) error {
	s, err := e.api.service(ctx, e.cfg.Service)
	if err != nil {
		return err
	}
	now, found, err := e.api.slice(ctx, e.cfg.Service)
	if err != nil {
		return err
	}
	wanted, err := now.with(s, e.claim(token))
	if err != nil || found && wanted.same(now) && !e.unanswered {
		return err
	}
	if !e.holds(goal{token, true}) {
		return errors.New("the term has ended")
	}
	return e.send(ctx, wanted, found)
}

// look looks whether this pod's address is in the EndpointSlice although this process has not
// written it.
func (e *Endpoint) look(ctx context.Context) error {
	now, _, err := e.api.slice(ctx, e.cfg.Service)
	if err != nil || !now.routesTo(e.cfg.Address) || !now.of(e.cfg.Election) {
		return err
	}
	e.left, err = now.token()
	return err
}

// takeOut removes this pod's address, unless another leader has written its own. If a write of ours
// went unanswered, it removes what that would replace, too.
func (e *Endpoint) takeOut(ctx context.Context, token int64) error {
	now, found, err := e.api.slice(ctx, e.cfg.Service)
	if err != nil {
		return err
	}
	written, err := now.token()
	if err != nil || written > token || !now.of(e.cfg.Election) {
		return err
	}
	ours := written == token && len(now.Endpoints) > 0 || now.routesTo(e.cfg.Address)
	if !ours && !e.unanswered {
		return nil
	}
	if !ours && written != token { // ours may be on its way
		s, err := e.api.service(ctx, e.cfg.Service)
		if err != nil {
			return err
		}
		if now, err = now.with(s, e.claim(token)); err != nil {
			return err
		}
	}
	now.Endpoints = []endpoint{}
	return e.send(ctx, now, found)
}

// send writes the slice. It notes whether the API server may carry that out later.
func (e *Endpoint) send(ctx context.Context, s slice, found bool) (err error) {
	if e.unanswered {
		s = s.counted()
	}
	if found {
		err = e.api.update(ctx, s)
	} else {
		err = e.api.create(ctx, s)
	}
	refused := (*statusError)(nil)
	if err == nil {
		e.unanswered = false
	} else if errors.Is(err, errNoAnswer) || errors.As(err, &refused) && !refused.denied() {
		e.unanswered = true
	}
	return err
}

// kindOf is what errors have in common that need be logged once only.
func kindOf(err error) string {
	refused := (*statusError)(nil)
	switch {
	case errors.As(err, &refused):
		return fmt.Sprintf("%d %s", refused.code, refused.right)
	case errors.Is(err, errNoAnswer):
		return errNoAnswer.Error()
	}
	return err.Error()
}
