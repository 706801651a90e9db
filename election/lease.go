package election

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// endpoint is what the renewal of a lease needs of a member of etcd. Both calls may block until
// their context ends.
type endpoint interface {
	renew(ctx context.Context, id int64) (renewal, error)
	read(ctx context.Context, key string) (reading, error)
}

// leaseEvents are the events in the life of a lease. The goroutine of lease.run calls these
// methods. They must not block.
type leaseEvents interface {
	// renewed is called after each renewal that counts.
	renewed(Deadlines)
	// contactLost is called once when stop-at passes, before any later renewal is counted.
	contactLost()
	// lost is called when the lease (ErrLeaseLost) or the key (ErrKeyDeleted, ErrKeyOverwritten) is
	// gone.
	lost(cause error)
	// suspect is called when a renewal at that endpoint failed or, with abandoned set, was not
	// answered. late is set if a renewal that was sent after it, or with it, counts already.
	suspect(endpoint int, abandoned, late bool, err error)
}

// lease keeps one lease alive. One goroutine, that of run, decides everything. Each attempt to
// renew has a goroutine of its own, which reports to run. run never waits for it.
type lease struct {
	cfg leaseConfig

	mu sync.Mutex
	// created is the create revision of our key from confirmFrom on, else 0.
	created int64
	// raftTerm is that of the renewal that counted last. 0: it needs no confirmation,
	// because a majority of etcd granted the lease, or because a read has confirmed it.
	raftTerm atomic.Uint64
	// demands asks for a renewal that is sent after the demand.
	demands chan demand
	// leads is set once a term has begun: see sleep.
	leads atomic.Bool

	// What follows belongs to run.
	timing      Timing // with the TTL that was granted last
	endpoints   []endpoint
	sent        time.Duration // when the renewal that counts was sent
	deadlines   Deadlines
	contactLost bool // stop-at has passed, and the event was reported
	attempts    []attempt
	answers     chan answer
	next        time.Duration // when to start the next attempt
	prefer      int           // the endpoint to start with after a failure, else -1
	demand      []demand
}

type leaseConfig struct {
	id      int64
	key     string
	timing  Timing
	granted granted
	// deadlines are those at the beginning, and next is when to send the first renewal.
	deadlines Deadlines
	next      time.Duration
	// created is the create revision of our key if each renewal is to be confirmed, else 0.
	created int64
	// endpoints returns etcd's endpoints. There may be more of them later.
	endpoints func() []endpoint
	// current is the endpoint to ask first.
	current *atomic.Int32
	now     func() time.Duration
	// early returns by how much to renew before the interval is over: many candidates that joined
	// at the same moment must not renew at the same moment.
	early     func() time.Duration
	events    leaseEvents
	metrics   *metrics
	heartbeat *heartbeat
}

// attempt is the renewal outstanding at one endpoint.
type attempt struct {
	// serial distinguishes the answer to this attempt from those to earlier ones. 0: none is
	// outstanding.
	serial int
	sent   time.Duration
	// since is when the first attempt was sent of those that have hung at this endpoint in a row.
	since   time.Duration
	abandon time.Duration // when to give it up
	cancel  context.CancelFunc
	renewal renewal // once that is answered, and the confirming read is outstanding
	created int64   // what that read must show
}

// answer is what an attempt reports: a renewal, or the reading that is to confirm one.
type answer struct {
	endpoint, serial int
	confirming       bool
	renewal          renewal
	reading          reading
	err              error
}

type demand struct {
	since   time.Duration
	done    chan struct{}   // closed once such a renewal counts
	givenUp <-chan struct{} // closed when nobody waits for it any more
}

func (d demand) isGivenUp() bool {
	select {
	case <-d.givenUp:
		return true
	default:
		return false
	}
}

// newLease makes a lease of what etcd has granted, to us or to the process before.
func newLease(cfg leaseConfig) *lease {
	l := &lease{
		cfg: cfg, timing: cfg.timing, demands: make(chan demand), answers: make(chan answer),
		sent: cfg.granted.sent, deadlines: cfg.deadlines, next: cfg.next, prefer: -1,
		created: cfg.created,
	}
	l.raftTerm.Store(cfg.granted.raftTerm)
	return l
}

// renewNow demands a renewal now, whatever the schedule. The channel is closed once it counts,
// unless the context has ended before.
func (l *lease) renewNow(ctx context.Context) <-chan struct{} {
	done := make(chan struct{})
	select {
	case l.demands <- demand{done: done, givenUp: ctx.Done()}:
	case <-ctx.Done():
	}
	return done
}

// confirmFrom says that we lead, verify whether we do, or are the next in line, with this create
// revision of our key. From its return on, a renewal counts only after a read that shows the key.
func (l *lease) confirmFrom(created int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.created = created
}

// isConfirmed reports whether the renewal that counted last needs no further confirmation. From the
// return of confirmFrom on, this stays so: the deadlines move only by renewals that are confirmed.
func (l *lease) isConfirmed() bool { return l.raftTerm.Load() == 0 }

// countAlone counts a renewal that no read has to confirm. For any other it returns the create
// revision that the read must show.
func (l *lease) countAlone(now time.Duration, a answer) (created int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.created == 0 {
		l.count(now, a.endpoint, l.attempts[a.endpoint].sent, a.renewal)
	}
	return l.created
}

// run renews until ctx ends or the lease is lost.
func (l *lease) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // of all attempts
	timer := time.NewTimer(0)
	defer timer.Stop()
	serial := 0
	for {
		now := l.cfg.now()
		l.cfg.heartbeat.mark(now)
		l.checkStopAt(now)
		l.endpoints = l.cfg.endpoints()
		more := len(l.endpoints) - len(l.attempts)
		l.attempts = append(l.attempts, make([]attempt, more)...)
		l.demand = slices.DeleteFunc(l.demand, demand.isGivenUp)
		l.abandonHung(now)
		if now >= l.next {
			i := l.idle()
			if i < 0 {
				i = l.replace(now)
			}
			if i >= 0 {
				serial++
				l.start(ctx, i, serial, now)
			}
			l.next = now + l.timing.hedgeDelay()
		}
		timer.Reset(l.sleep(now))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case d := <-l.demands:
			d.since = l.cfg.now()
			l.demand = append(l.demand, d)
			l.next = d.since
		case a := <-l.answers:
			if a.serial != l.attempts[a.endpoint].serial {
				continue // it was abandoned
			}
			if over := l.answered(ctx, a); over {
				return
			}
		}
	}
}

// checkStopAt ends the term, if there is one, once stop-at has passed. It is called before each
// answer is looked at, so that no answer can revive the term.
func (l *lease) checkStopAt(now time.Duration) {
	if !l.contactLost && now >= l.deadlines.StopAt {
		l.contactLost = true
		l.cfg.events.contactLost()
	}
}

// abandonHung gives up the attempts that have been unanswered for too long.
func (l *lease) abandonHung(now time.Duration) {
	for i := range l.attempts {
		if a := &l.attempts[i]; a.serial != 0 && now >= a.abandon {
			l.cfg.metrics.renewals.WithLabelValues(renewalAbandoned).Inc()
			l.failed(now, i)
			l.suspect(i, true, context.DeadlineExceeded)
		}
	}
}

// sleep returns for how long there is nothing to do. In a term that is never long: the clock of the
// timer stops while the machine is suspended, and the clock of the deadlines does not. A standby
// has no job that a renewal could save then, and sleeps until the next one.
func (l *lease) sleep(now time.Duration) time.Duration {
	until := min(now+idleTick, l.next)
	if l.leads.Load() {
		until = min(until, now+l.timing.hedgeDelay())
	}
	if !l.contactLost {
		until = min(until, l.deadlines.StopAt)
	}
	for _, a := range l.attempts {
		if a.serial != 0 {
			until = min(until, a.abandon)
		}
	}
	return max(0, until-now)
}

// idle returns the endpoint for the next attempt: none is asked twice at a time. It returns -1 when
// all are busy.
func (l *lease) idle() int {
	start := l.prefer
	if start < 0 {
		start = int(l.cfg.current.Load())
	}
	l.prefer = -1
	for i := range l.endpoints {
		if i = (start + i) % len(l.endpoints); l.attempts[i].serial == 0 {
			return i
		}
	}
	return -1
}

// replace gives up the oldest attempt if all endpoints have one that hangs. It returns the endpoint
// of that attempt, or -1. While etcd has no leader, a member passes renewals on to its old leader
// and never answers them. A renewal that is sent after etcd's election is answered at once. It must
// not wait until those before it are abandoned.
func (l *lease) replace(now time.Duration) int {
	if len(l.attempts) == 1 {
		return -1
	}
	oldest := -1
	for i := range l.attempts {
		// If the renewal was answered and the confirming read is outstanding, nothing hangs.
		if l.attempts[i].created == 0 &&
			(oldest < 0 || l.attempts[i].abandon < l.attempts[oldest].abandon) {
			oldest = i
		}
	}
	if oldest < 0 {
		return -1
	}
	a := &l.attempts[oldest]
	if now < a.abandon-l.timing.RenewInterval()+3*l.timing.hedgeDelay() {
		return -1
	}
	l.cfg.metrics.renewals.WithLabelValues(renewalAbandoned).Inc()
	since := a.since
	l.finish(oldest)
	if now-since >= l.timing.RenewInterval() {
		l.suspect(oldest, true, context.DeadlineExceeded)
		since = 0
	}
	a.since = since
	return oldest
}

func (l *lease) start(ctx context.Context, i, serial int, now time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	since := l.attempts[i].since
	if since == 0 {
		since = now
	}
	l.attempts[i] = attempt{
		serial: serial, sent: now, since: since, abandon: now + l.timing.RenewInterval(),
		cancel: cancel,
	}
	at := l.endpoints[i]
	go func() {
		growStack()
		r, err := at.renew(ctx, l.cfg.id)
		l.report(ctx, answer{endpoint: i, serial: serial, renewal: r, err: err})
	}()
}

// confirm reads our key from the endpoint that has answered a renewal. etcd's leader acknowledges
// renewals without asking anybody. A leader of etcd that was paused or cut off, and deposed
// meanwhile, does so too until it learns of that (compare etcd #15247). But the leader that a
// majority of etcd follows answers the read. If the read has another raft term than the renewal,
// the renewal is worth nothing.
func (l *lease) confirm(ctx context.Context, i int, now time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	a := &l.attempts[i]
	a.cancel()
	// If etcd's disks are slow, a majority takes long for a read, but not for a renewal. The answer
	// to the renewal shows that the member is there, and the send time of the renewal counts. So
	// the read may take longer.
	a.cancel, a.abandon = cancel, now+2*l.timing.RenewInterval()
	serial, at := a.serial, l.endpoints[i]
	go func() {
		growStack()
		r, err := at.read(ctx, l.cfg.key)
		l.report(ctx, answer{endpoint: i, serial: serial, confirming: true, reading: r, err: err})
	}()
}

// report passes the answer to run, unless run does not want it any more.
func (l *lease) report(ctx context.Context, a answer) {
	select {
	case l.answers <- a:
	case <-ctx.Done():
	}
}

// answered takes an answer into account. It returns true when the lease is gone.
func (l *lease) answered(ctx context.Context, a answer) bool {
	now := l.cfg.now()
	l.checkStopAt(now)
	this := &l.attempts[a.endpoint]
	switch {
	case errors.Is(a.err, rpctypes.ErrLeaseNotFound):
		l.cfg.events.lost(ErrLeaseLost)
		return true
	case a.err != nil:
		l.cfg.metrics.renewals.WithLabelValues(renewalFailed).Inc()
		l.failed(now, a.endpoint)
		l.suspect(a.endpoint, false, a.err)
	case a.confirming && a.reading.created != this.created:
		l.cfg.events.lost(ErrKeyDeleted)
		return true
	case a.confirming && a.reading.lease != l.cfg.id:
		l.cfg.events.lost(ErrKeyOverwritten)
		return true
	case a.confirming && a.reading.raftTerm != this.renewal.raftTerm:
		l.finish(a.endpoint)
		l.cfg.metrics.renewals.WithLabelValues(renewalUnconfirmed).Inc()
		l.next, l.prefer = now, a.endpoint
		if this.renewal.raftTerm == unconfirmed { // none of its answers may have a raft term
			l.next += l.timing.repeatAfter()
		}
	case a.confirming:
		this.renewal.raftTerm = 0 // confirmed
		l.count(now, a.endpoint, this.sent, this.renewal)
	default:
		if created := l.countAlone(now, a); created != 0 {
			this.renewal, this.created = a.renewal, created
			l.confirm(ctx, a.endpoint, now)
		}
	}
	return false
}

// count takes the good renewal into account. Its send time counts: a delayed reply to an earlier
// attempt changes nothing.
func (l *lease) count(now time.Duration, i int, sent time.Duration, r renewal) {
	l.finish(i)
	l.cfg.metrics.renewals.WithLabelValues(renewalOK).Inc()
	l.cfg.metrics.duration.Observe((now - sent).Seconds())
	if sent <= l.sent {
		return
	}
	l.sent = sent
	l.raftTerm.Store(r.raftTerm)
	l.timing.TTL = r.ttl
	l.deadlines = l.timing.From(sent)
	l.contactLost = now >= l.deadlines.StopAt
	l.cfg.current.Store(int32(i))
	l.next = sent + l.timing.RenewInterval() - l.cfg.early()
	l.cfg.events.renewed(l.deadlines)
	waiting := l.demand[:0]
	for _, d := range l.demand {
		if sent < d.since {
			waiting = append(waiting, d)
			l.next = now
			continue
		}
		close(d.done)
	}
	l.demand = waiting
}

// finish frees the endpoint for the next attempt.
func (l *lease) finish(i int) {
	l.attempts[i].cancel()
	l.attempts[i].serial, l.attempts[i].since = 0, 0
}

// failed gives up the attempt and schedules the next one, at another endpoint if there is one. If a
// later attempt has succeeded already, the next one can wait until it is due.
func (l *lease) failed(now time.Duration, i int) {
	l.finish(i)
	if l.isLate(i) {
		return
	}
	l.next = min(l.next, now+l.timing.repeatAfter())
	l.prefer = (i + 1) % len(l.endpoints)
}

// isLate reports whether a renewal counts already that was sent no earlier than the endpoint's last
// attempt.
func (l *lease) isLate(i int) bool { return l.attempts[i].sent <= l.sent }

func (l *lease) suspect(i int, abandoned bool, err error) {
	l.cfg.events.suspect(i, abandoned, l.isLate(i), err)
}
