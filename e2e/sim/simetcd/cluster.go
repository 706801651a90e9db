// Package simetcd simulates a cluster of etcd in memory, for a testing/synctest bubble. It serves
// the gRPC services that package election and etcd's package concurrency use: KV, Lease, Watch, and
// Maintenance's version.
//
// # What is real
//
// Keys, revisions, leases and watches behave as in etcd 3.7; TestSameAsEtcd compares them on seeded
// scripts. gRPC is real too, on both sides, over connections in memory.
//
// # What is simulated
//
// Raft is replaced by a log that all members share, and by a script: whoever runs the simulation
// says who becomes etcd's leader (Elect), and which members are paused, stopped, cut off or slow.
// Nobody is elected without the script. From that follows what each member believes. A member that
// runs and is connected to a majority with a leader hears of it within Config.Hear. Any other loses
// its leader after one to two election timeouts. Until then a deposed leader acknowledges renewals
// and serves serializable reads, but carries out nothing that needs a majority.
//
// Not simulated: authentication, transactions within transactions, progress notifications that
// nobody asked for, lease checkpoints, and what a woken leader may revoke (etcd #15247).
//
// # The network
//
// Config.Network decides about each message of a client: it is called when a request arrives, and
// when an answer to a watch is sent. Clients are told apart by their dialer (Cluster.Dialer). A
// stream is one TCP connection: after a message of a stream is dropped, no later one passes.
//
// # Determinism
//
// All times are those of the bubble. Each message travels for a time that is a hash of the seed and
// of the message, so that no two arrive at the same moment and no order depends on the scheduler.
// The client must do its part: gRPC's backoff has jitter, unless Config.Jitter of its connect
// parameters is 0, and math/rand/v2 without a source can't be seeded.
package simetcd

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
)

// As etcd has them by default, with a heartbeat of 100 ms.
const (
	electionTimeout = time.Second
	requestTimeout  = 5*time.Second + 2*electionTimeout
	expiryInterval  = 500 * time.Millisecond
	minTTL          = 2
	maxTTL          = 9_000_000_000
)

// Latency is the default of Config.Latency.
const Latency = time.Millisecond

// Config configures a cluster.
type Config struct {
	Members int // 0: three
	Seed    uint64
	// Hear bounds the time until a member learns of a new leader of etcd. For a deposed leader, it
	// is exactly this long. 0: 20 ms.
	Hear time.Duration
	// Latency bounds the time that a message travels. 0: the constant Latency.
	Latency time.Duration
	// Version is what each member says is its own. "": 3.7.3.
	Version string
	// Rate is the rate of a member's clock, by which leases expire: 1.01 runs fast. nil: all 1.
	Rate func(member int) float64
	// Network decides about a message. method is gRPC's full method name, or Connect. nil: all
	// messages pass. It is never called twice at a time, and must not block.
	Network func(client, member, method string) Verdict
	// Log is told what happens to the cluster. It may be nil.
	Log func(format string, args ...any)
}

// Connect is what Config.Network gets as the method when a client connects.
const Connect = "connect"

// Verdict is what happens to a message.
type Verdict struct {
	Delay       time.Duration // of the request, beside its latency
	DropRequest bool
	Duplicate   bool // the request is carried out again, a little later
	AnswerDelay time.Duration
	DropAnswer  bool
}

// Cluster is a simulated cluster of etcd.
type Cluster struct {
	cfg Config

	mu      sync.Mutex
	members []*member
	store   *store
	log     []entry // all of it is committed
	term    uint64
	leader  *member // nil: there is none. It may be unable to lead, see canLead
	waiters []*waiter
	closed  bool

	network    sync.Mutex     // held while Config.Network is called
	background sync.WaitGroup // what handlers leave behind
}

// entry is what an update did to the store.
type entry struct {
	update
	rev, compact int64 // of the store after it
}

// member is one member of the cluster. Its fields are guarded by the cluster's lock.
type member struct {
	c      *Cluster
	id     int
	name   string // m1
	addr   string
	server *grpc.Server
	accept chan *conn
	conns  []*conn

	running, paused, isolated bool
	incarnation               int // counts crashes
	lag                       time.Duration

	term    uint64 // as it believes
	leader  *member
	heard   int         // counts the leaders that it has heard of
	hearing bool        // it will hear of the leader
	losing  *time.Timer // it will lose its leader; nil: it is in contact

	applied int // entries of the log
	lessor  lessor
	streams []*watchStream
	delayed []func() // what came due while it was paused
}

// New makes a cluster whose first member leads. Close must be called before the bubble ends.
func New(cfg Config) *Cluster {
	cfg.Members = cmp.Or(cfg.Members, 3)
	cfg.Hear = cmp.Or(cfg.Hear, 20*time.Millisecond)
	cfg.Latency = cmp.Or(cfg.Latency, Latency)
	cfg.Version = cmp.Or(cfg.Version, "3.7.3")
	if cfg.Log == nil {
		cfg.Log = func(string, ...any) {}
	}
	c := &Cluster{cfg: cfg, store: newStore(), term: 1}
	for id := 1; id <= cfg.Members; id++ {
		m := &member{
			c: c, id: id, name: fmt.Sprintf("m%d", id), addr: fmt.Sprintf("10.0.0.%d:2379", id),
			running: true, term: 1, lessor: newLessor(),
		}
		m.serve()
		c.members = append(c.members, m)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.members {
		m.after(c.jitter(expiryInterval, "tick", m.name), m.tick)
	}
	c.elect(c.members[0])
	for _, m := range c.members {
		m.hear()
	}
	return c
}

// Endpoints returns the members' URLs, the first member's first. Their hosts are addresses, so that
// nobody looks them up.
func (c *Cluster) Endpoints() (urls []string) {
	for _, m := range c.members {
		urls = append(urls, "http://"+m.addr)
	}
	return urls
}

// Leader returns the number of the member that leads, or 0 if nobody does or the leader has no
// majority.
func (c *Cluster) Leader() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.canLead() {
		return 0
	}
	return c.leader.id
}

// Close ends all connections. It returns when no request is under way any more.
func (c *Cluster) Close() {
	c.mu.Lock()
	c.closed = true
	for _, m := range c.members {
		for _, conn := range m.conns {
			conn.reset()
		}
	}
	c.settle()
	c.mu.Unlock()
	for _, m := range c.members {
		m.server.Stop()
	}
	c.background.Wait()
}

// after calls f with the cluster locked, unless the member has crashed meanwhile. If the member is
// paused then, f is called when it is resumed. The cluster must be locked.
func (m *member) after(d time.Duration, f func()) {
	incarnation := m.incarnation
	time.AfterFunc(d, func() {
		m.c.mu.Lock()
		defer m.c.mu.Unlock()
		switch {
		case m.c.closed || m.incarnation != incarnation:
		case m.paused:
			m.delayed = append(m.delayed, f)
		default:
			f()
			m.c.settle()
		}
	})
}

// waiter is a request that waits at a member until it can be carried out.
type waiter struct {
	m           *member
	incarnation int
	try         func() (done bool, err error)
	done        chan struct{}
	err         error
}

// wait calls try, with the cluster locked, after each change until it is done. So the requests that
// wait are carried out in the order in which they came. It does not look at ctx before the first
// try: a client that has given up can't take back a request that has arrived. A timeout of 0 means
// none.
func (m *member) wait(
	ctx context.Context, incarnation int, timeout time.Duration, try func() (bool, error),
) error {
	c := m.c
	w := &waiter{m: m, incarnation: incarnation, try: try, done: make(chan struct{})}
	c.mu.Lock()
	c.waiters = append(c.waiters, w)
	c.settle()
	c.mu.Unlock()
	var timedOut <-chan time.Time
	if timeout > 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		timedOut = timer.C
	}
	err := rpctypes.ErrGRPCTimeout
	select {
	case <-w.done:
	case <-timedOut:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.waiters, w); i >= 0 {
		c.waiters = slices.Delete(c.waiters, i, i+1)
		return err
	}
	return w.err
}

// settle carries out the requests that no longer have to wait. One may allow another.
func (c *Cluster) settle() {
	for again := true; again; {
		again = false
		for _, w := range slices.Clone(c.waiters) {
			var done bool
			switch {
			case c.closed || w.m.incarnation != w.incarnation:
				done, w.err = true, rpctypes.ErrGRPCStopped
			case !w.m.paused:
				done, w.err = w.try()
			}
			if done {
				c.waiters = slices.DeleteFunc(c.waiters, func(o *waiter) bool { return o == w })
				close(w.done)
				again = true
			}
		}
	}
}

// commit carries out an update, and appends it to the log if it succeeds. It returns how long the
// log is then.
func (c *Cluster) commit(run func(u *update) error) (int, error) {
	u := update{store: c.store}
	if err := run(&u); err != nil {
		return len(c.log), err
	}
	c.store.rev = u.now()
	c.log = append(c.log, entry{u, c.store.rev, c.store.compact})
	for _, m := range c.members {
		if m == c.leader && m.lag == 0 {
			m.apply(len(c.log))
		} else if c.inContact(m) {
			m.catchUp()
		}
	}
	return len(c.log), nil
}

// catchUp applies the log as it is now, a little later.
func (m *member) catchUp() {
	upTo := len(m.c.log)
	delay := m.c.jitter(m.c.cfg.Latency, "apply", m.name, fmt.Sprint(upTo))
	m.after(m.lag+delay, func() { m.apply(upTo) })
}

func (m *member) apply(upTo int) {
	for m.applied < upTo {
		e := &m.c.log[m.applied]
		m.applied++
		if e.granted != 0 {
			m.lessor.granted(m, e.granted, e.ttl)
		}
		if e.revoked != 0 {
			delete(m.lessor.leases, e.revoked)
		}
		for _, s := range m.streams {
			s.notify(e)
		}
	}
}

// show is the store as the member knows it.
func (m *member) show() snapshot {
	s := snapshot{m.c.store, 1, -1}
	if m.applied > 0 {
		e := m.c.log[m.applied-1]
		s.rev, s.compact = e.rev, e.compact
	}
	return s
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
