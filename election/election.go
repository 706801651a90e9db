// Package election answers one question for the rest of leasehold: am I the leader, until when, and
// with which fencing token?
//
// A candidate takes a lease from etcd, puts a key bound to it under the election's prefix and waits
// until no key under that prefix was created before its own. From then on it leads, for one term.
// The layout of the keys is that of etcd's own concurrency.Election. So etcdctl elect, and every
// program that uses that package, can take part in the same election.
//
// What a term promises, on a clock that runs at the same rate as etcd's: until Deadlines.End no
// other candidate leads, unless somebody deletes the key or the lease. A renewal sent at s and
// granted for T holds the lease at least until s+T, however late its reply comes, so every deadline
// is counted from the moment of sending. Renewals move the deadlines; once Deadlines.StopAt has
// passed the term is over, and nothing revives it, unless it is suspended (Callbacks.Suspend).
//
// What it does not promise: if somebody else removes the leader's key or lease, the leader may
// learn of it only after the next leader has started. Only the fencing token protects against that.
// etcd itself can remove a lease: if etcd's leader was paused for four fifths of a TTL or longer,
// it may revoke leases when it goes on, although its successor has renewed them
// (https://github.com/etcd-io/etcd/issues/15247).
//
// Where to read on: candidate.go has the goroutines and who owns what, state.go the state machine,
// session.go the life of a lease, adopt.go how one is taken over, standby.go how a candidate comes
// to lead, lease.go renewals and their deadlines, queue.go and watch.go who is ahead, members.go
// and hedge.go how etcd is asked.
package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"leasehold/control"
	"leasehold/internal/quote"
)

// The causes with which the context of Callbacks.Lead can end, beside that of Run's context.
var (
	// ErrContactLost: stop-at passed without a renewal. The lease still holds until Deadlines.End.
	ErrContactLost = errors.New("no lease renewal before stop-at")
	// ErrLeaseLost: etcd no longer knows the lease. The next leader may be starting.
	ErrLeaseLost = errors.New("the lease is gone from etcd")
	// ErrKeyDeleted: the key was deleted, or deleted and made anew. The next leader may be
	// starting.
	ErrKeyDeleted = errors.New("the candidate's key is gone from etcd")
	// ErrKeyOverwritten: somebody wrote to the key, and it is no longer bound to our lease. Nobody
	// else can lead before the key is removed. The session removes it when Lead has returned.
	ErrKeyOverwritten = errors.New(
		"the candidate's key was overwritten in etcd, and with that lost its lease")
	// ErrEnded: the term had ended before this process took it over (Adoption.Ending).
	ErrEnded = errors.New("the term had ended before it was taken over")
)

// What Run returns, with the cause, when the candidate was not elected within Config.Wait.
var (
	// ErrNotElected: another candidate, or a key that is no candidate's, is ahead of us. Or we
	// could not learn in time whether one is.
	ErrNotElected = errors.New("not elected")
	// ErrUnreachable: etcd did not answer, or it refused.
	ErrUnreachable = errors.New("etcd can't be used")
)

// NestedError is what Run returns if the election lies within another one that has live candidates,
// or around it: the candidates of the outer one would wait for those of the inner one. Run checks
// this at its first contact with etcd.
type NestedError struct {
	Election, Other string
	Key             string // of one of Other's candidates
}

func (e *NestedError) Error() string {
	return fmt.Sprintf("the election %s can't be used beside %s, which has live candidates, "+
		"as the key %s shows: one name is a prefix of the other",
		quote.Value(e.Election), quote.Value(e.Other), quote.Value(e.Key))
}

// Backoff is what Callbacks.Lead returns to give up the term and to keep the candidate out of the
// election for a while.
type Backoff struct{ For time.Duration }

func (b *Backoff) Error() string { return fmt.Sprintf("resigned for %v", b.For) }

// Callbacks learn of the lease, and do the leader's work.
type Callbacks interface {
	// Leased is called with the id of a lease before we ask etcd for it, so that somebody else can
	// revoke it if this process exits, and again if etcd grants another TTL. It is called with
	// zeros once the lease is revoked or known to be gone, unless it was called with another lease
	// by then.
	Leased(id int64, ttl time.Duration)
	// Entered is called with our key and its create revision when the key is put. It must not
	// block.
	Entered(key string, created int64)
	// Releasing is called before the first request that deletes our key or revokes our lease, once
	// for each lease. Such a request may arrive long after this process has exited. So whoever
	// takes the lease over (Config.Adopt) has to know that there may be one. If Releasing returns
	// an error, the request is not sent, and Run returns that error.
	Releasing(lease int64) error
	// Extended is called with the new deadlines after each renewal while a term runs and stop-at
	// has not passed, or the term is suspended. It must not block. A call may come just before
	// Lead's own; the latest deadlines are those that count.
	Extended(Deadlines)
	// Suspend is called when stop-at passes, also if no term runs. If it returns true, the leader's
	// work is frozen, or killed by Deadlines.KillBy, without any help of ours. Then the term does
	// not end yet. It is called again when a renewal counts, however late that is. If it returns
	// true again, the term goes on, and Extended is called. Else the term ends. It also ends as any
	// other: with the lease, with the key, as planned, or if Lead returns. Suspend must not block.
	Suspend() bool
	// Lead is called when a term begins. It does the leader's work, and returns when nothing of
	// that runs any more. Its context ends when the term does: with the cause with which Run's
	// context ended (a planned stop), ErrContactLost, ErrLeaseLost, ErrKeyDeleted or
	// ErrKeyOverwritten, or ErrEnded. The lease is renewed until Lead returns and revoked after
	// that, never before.
	//
	// The result nil, or the term's own end, means: campaign again. A *Backoff means: campaign
	// again after that time. Any other error ends Run, which returns it.
	Lead(ctx context.Context, t Term) error
	// Ended is called when Lead has returned this error, and before the lease is revoked. cause is
	// why the term ended, as in Lead's context; nil: Lead ended it. It is also set if Lead has
	// returned just before its context ended. Ended must not block.
	Ended(cause, err error)
}

// Term is one unbroken leadership.
type Term struct {
	// Key is the candidate's key in etcd.
	Key string
	// Token is the fencing token: the create revision of Key. Each term has a higher one than every
	// term before it.
	Token int64
	// LeaseID is the lease that the key is bound to.
	LeaseID int64
	// Deadlines are those at the beginning of the term.
	Deadlines Deadlines
	Timing    Timing
	// Adopted: the term goes on, and the job of it runs. Lead takes that job over and starts none.
	Adopted bool
	// Lost is closed when the lease or the key is gone, even if Lead's context has already ended
	// for another cause. Then Lead must kill at once what still runs, because the next leader may
	// be starting. An overwritten key is not gone.
	Lost <-chan struct{}
}

// State is what a candidate is doing.
type State string

// The states of a candidate.
const (
	Connecting State = "connecting" // not in the election: Snapshot.Reason says why
	Standby    State = "standby"    // its key is in the queue
	Leading    State = "leading"    // a term runs
	Suspended  State = "suspended"  // stop-at has passed, and the term may go on
	Stopping   State = "stopping"   // the term is over, or Run's context is; Lead has not returned
)

// Entry is a candidate's entry in the queue.
type Entry struct {
	Identity string // the key's value, cut at 256 bytes
	Key      string
	Token    int64 // the key's create revision
}

// Blocker is a key ahead of the candidate's own that no candidate of this election has made. The
// wait for it may never end.
type Blocker struct {
	Key string // printable
	Why string
	// Remedy is a shell command that ends the wait. It is empty if the key's lease is alive:
	// whoever keeps the lease alive needs the key.
	Remedy string
}

// Snapshot is what a candidate knows at one moment. It comes from memory.
type Snapshot struct {
	State  State
	Reason string    // why not in the election, while connecting
	Since  time.Time // when State was entered
	// Leader is the leader as etcd last reported it, or nil if none is known.
	Leader *Entry
	// LeaseID, TTL (as granted) and Deadlines are zero without a lease.
	LeaseID   int64
	TTL       time.Duration
	Deadlines Deadlines
	// Leading is true while a term runs that is neither lost nor given up, also while it is
	// suspended. The reader has to compare Deadlines.StopAt with the present time.
	Leading bool
	Blocker *Blocker // nil: there is none
	Unfit   string   // why the candidate must not become leader; "": it may
	// StaysUntil is before when an unfit leader does not hand over; zero: it does not lead.
	StaysUntil time.Time
	Hold       *control.Hold // nil: there is none, or it can't be read
	// ControlProblem is why we can't read what people write beside the election, such as a hold.
	ControlProblem string
	// LastHeartbeat is the last heartbeat of the loop that was silent longest, in time since boot.
	// Each loop has a heartbeat at least every HeartbeatInterval. 0: no loop runs.
	LastHeartbeat time.Duration
}

// HeartbeatInterval is the longest time between two heartbeats of each of a candidate's loops,
// whatever etcd does.
const HeartbeatInterval = 5 * time.Second

// Adoption is the lease of a process that has exited, and what is known of it. The candidate that
// gets it takes the place of the one in that process: it renews that lease, and keeps that key.
type Adoption struct {
	LeaseID int64
	TTL     time.Duration // as granted
	// Created is the create revision of the key; 0: it is not known to be put.
	Created int64
	// Releasing: Callbacks.Releasing was called. A request to revoke the lease may be under way,
	// and nothing can show that there is none. So the lease is revoked, and another one follows.
	Releasing bool
	// Leading: a term runs, and so does its job. It goes on.
	Leading bool
	// Deadlines are those of the term; zero unless Leading.
	Deadlines Deadlines
	// Ending, with Leading: the term has ended. Lead waits until the job has exited.
	Ending bool
}

// TLS is how to reach endpoints with https. All fields are optional. The files are read at each
// handshake.
type TLS struct {
	CAFile, CertFile, KeyFile, ServerName string
}

// Config configures a candidate.
type Config struct {
	// Endpoints are the URLs of etcd's members. If the host is a name, each of its addresses counts
	// as a member.
	Endpoints []string
	// Election is the key prefix, without the slash that follows it.
	Election string
	// Identity is the value of the candidate's key.
	Identity string
	// TTL is asked of etcd in whole seconds; etcd may grant more.
	TTL time.Duration
	// LossGrace, Margin and PostStop are negative for the default that NewTiming documents.
	LossGrace, Margin time.Duration
	// PostStop is how long what has to follow the job's exit takes, before another may lead.
	PostStop time.Duration
	// Wait bounds the time from the start of Run until the candidate is elected. Negative means for
	// ever. 0 means to join, look, and leave if there is a leader.
	Wait time.Duration
	// Adopt is what the candidate begins with; nil: nothing. (Wait counts from the start of this
	// Run, whatever it adopts.)
	Adopt *Adoption
	// Recovered is the lease of a candidate before this one, on this machine, whose job has exited.
	// Run revokes it before it takes part in the election. 0: there is none.
	Recovered int64
	// Near is how many keys may be ahead of the candidate's if it watches the whole queue. If there
	// are more, it stands in a crowd, and watches two keys. 0: the constant Near.
	Near int
	// DialTimeout is for connecting to one endpoint.
	DialTimeout time.Duration
	// Failback is how long one with a higher priority must have been ready until the leader hands
	// over to it. Negative: it never does.
	Failback time.Duration
	// FitnessRound is how long the others may take until they see that they are unfit, too, for
	// the same reason as this candidate. A leader waits for so long until it hands over.
	FitnessRound time.Duration
	// Dial connects to an address. nil: by TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// lookup finds the addresses of a host. nil: the system's resolver.
	lookup func(ctx context.Context, host string) ([]string, error)
	TLS    TLS
	// Username and Password are for etcd's own authentication. Password is called for each
	// authentication; nil means none.
	Username string
	Password func() (string, error)
	// AuthToken is a token that etcd gave this user earlier, and Authenticated is called with each
	// new one. It must not block. Both may be empty.
	AuthToken     string
	Authenticated func(token string)
	// Now reads CLOCK_BOOTTIME.
	Now        func() time.Duration
	Logger     *slog.Logger
	Registerer prometheus.Registerer // may be nil
	Callbacks  Callbacks
	// Beside runs beside the candidate, with a client that shares its connections. Its context ends
	// when the candidate has left etcd. Then it must return soon, and Run does. It may be nil.
	Beside func(ctx context.Context, etcd *Client)
	// Changed is called after each change of Snapshot and must not block. It may be nil.
	Changed func()
}
