//go:build linux

package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

// A Row is one fault of the table: what befalls the leader or what it stands
// on, and what leasehold promises then.
type Row struct {
	Name  string // kebab-case
	Group string // one of groups
	About string // the fault in a reader's words: "the daemon is killed (SIGKILL)"

	TTL     time.Duration // 0: 5 s
	Members int           // of etcd; 0: one
	Flags   []string      // more flags for each of them
	Auth    bool          // etcd asks for user and password; the stock loop knows nothing of that and is left out

	Job     []string // the words of the leader's test job; a standby's job behaves
	Env     []string // more variables for leasehold
	Proxied bool     // each candidate reaches each member through a proxy of its own: Contestant.Roads
	Shifted bool     // Stage.shifted has programs whose wall clock can be made to jump
	// Change may change how a candidate is started. It may be nil.
	Change func(t *Trial, cfg *harness.CandidateConfig) error

	Ours    bool     // the others have no such process
	Without []string // contenders that can't be had with this fault

	Promise   Promise
	Untouched bool // the job must neither end nor be started again, and a planned hand-over must work afterwards
	Either    bool // the job may be moved or not: what becomes of it is reported
	Alone     Alone
	CI        bool // one of those that CI runs
	User      bool // as an ordinary user without a cgroup too

	// Burden starts what weighs on the machine from before the pair is brought
	// up. The row's other trials have the same, since taking all memory takes
	// long. It may be nil.
	Burden func(ctx context.Context, h *runner) (*burden, error)
	// Prepare does what must be done before the fault and takes time. It may be nil.
	Prepare func(ctx context.Context, t *Trial) error
	// Strike makes the fault. It is taken to begin when Strike is called, or
	// when that calls t.Begin.
	Strike func(ctx context.Context, t *Trial) error
	// Lasts and Heal: so long after Strike has returned the fault is ended by
	// Heal. Without Heal it lasts until the trial ends. Whatever the trial's own
	// end mends needs no Heal: ways, roads, and members that are paused or dead.
	Lasts time.Duration
	Heal  func(ctx context.Context, t *Trial) error
	// After looks at the trial when its outcome is known, for figures of its
	// own: t.Figure. It may be nil.
	After func(ctx context.Context, t *Trial) error
}

// Promise is what leasehold promises of overlaps.
type Promise string

// The promises.
const (
	Never    Promise = ""         // no two jobs alive, while the guard is served within its margin
	Operator Promise = "operator" // at most 10 ms at p99: somebody took the key or the lease away
	Outside  Promise = "outside"  // nothing: the fencing token protects; what happens is reported
)

// Alone says which trials must have the machine for themselves.
type Alone int

// Who runs alone.
const (
	SideBySide Alone = iota
	OursAlone        // our figure is one of milliseconds; the others wait for a TTL anyway
	RowAlone         // some trials of the row side by side, but of no other one
	AllAlone         // all figures are of milliseconds, or the fault is one of the whole machine
)

// groups are in the order of the table.
var groups = []struct{ Name, Title string }{
	{"daemon", "the daemon"},
	{"job", "the job"},
	{"road", "the road to etcd"},
	{"etcd", "etcd"},
	{"operator", "an operator"},
	{"machine", "the machine"},
}

// rows is the table.
var rows = slices.Concat(daemonRows, jobRows, roadRows, etcdRows, operatorRows, machineRows)

func (r *Row) ttl() time.Duration {
	if r.TTL == 0 {
		return 5 * time.Second
	}
	return r.TTL
}

// shape is what a stage for the row must have. Rows of one shape share stages.
func (r *Row) shape() shape {
	return shape{members: max(1, r.Members), flags: strings.Join(r.Flags, " "), auth: r.Auth}
}

// An entrant is a contender in one of the ways in which it is run.
type entrant struct {
	harness.Implementation
	Title string
	uid   uint32
}

var entrants = []entrant{
	{harness.Leasehold, harness.Leasehold.Name, 0},
	{harness.Leasehold, harness.Leasehold.Name + ", ordinary user", 65534},
	{harness.StockLoop, harness.StockLoop.Name, 0},
	{harness.EtcdctlLock, harness.EtcdctlLock.Name, 0},
}

func (e entrant) ours() bool { return e.Name == harness.Leasehold.Name }

// takesPart tells if an entrant is in the row.
func (r *Row) takesPart(e entrant) bool {
	switch {
	case e.uid != 0 && !r.User:
		return false
	case !e.ours() && r.Ours, slices.Contains(r.Without, e.Name):
		return false
	case r.Auth && e.Name == harness.StockLoop.Name:
		return false
	}
	return true
}

// alone tells if an entrant's trials in the row have the machine for themselves.
func (r *Row) alone(e entrant) bool {
	return r.Alone == AllAlone || r.Alone == OursAlone && e.ours()
}
