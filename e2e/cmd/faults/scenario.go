//go:build linux

package main

import (
	"cmp"
	"slices"
	"time"

	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// A Scenario is one row of the table: a fault that the leader or what it stands on
// has, and what leasehold promises then.
type Scenario struct {
	Name  string // kebab-case
	Group string // one of groups; see in
	About string // the fault in a reader's words: "the daemon is killed (SIGKILL)"

	Fault func() fault.Fault
	// Duration is from the injection to the recovery. 0: until the trial ends.
	Duration time.Duration
	Longest  time.Duration // unless 0: it lasts from Duration to this, another time in each trial
	TTL      time.Duration // 5 s, unless the row says otherwise
	Etcd     etcd          // the group's, unless the row says otherwise
	Job      job
	// Proxied has each candidate reach each member through a proxy of its own.
	Proxied bool
	// Stress is on the machine from before the pair is brought up. All of the scenario's
	// trials have the same, since taking all memory takes long, and no others are made
	// meanwhile. It may be nil.
	Stress func(*harness.Cgroup, *harness.Programs) fault.Fault

	// Standby has the fault hit the standby's daemon, and not the leader's.
	Standby bool
	// Freeze has the leader's job frozen on loss of contact, and not stopped.
	Freeze bool
	// Replaced: the fault takes the daemon's elector, and another one must take its place.
	Replaced bool

	Promise Promise
	Expect  Expect
	// Check looks, after Verify, at what else was promised, again and again until it
	// returns nil. It may be nil.
	Check func(t *Trial) error

	Without   []string // implementations that can't have this fault
	User      bool     // as an ordinary user without a cgroup too
	Isolation Isolation
	CI        bool // one of those that CI runs
}

// untilNextJob is a Duration.
const untilNextJob time.Duration = -1

// etcd is what a scenario needs of etcd. Scenarios with the same share testbeds.
type etcd struct {
	Members int
	Flags   string // more flags for each of them
	Auth    bool   // it asks for user and password
	TLS     bool   // and for certificates
}

// job is the leader's. A standby's job behaves.
type job struct {
	Words []string // of the test job
	// Ready returns an error until the job is as it is to be. It may be nil.
	Ready func(t *Trial) error
	// ByThreads takes for the job's end the moment when SIGKILL has reached each of
	// its threads, for its connection closes later.
	ByThreads bool
}

// Promise is what leasehold promises of overlaps.
type Promise string

// The promises.
const (
	// Never: no two jobs run at once, while the guard is served within its margin.
	Never Promise = ""
	// Operator: at most 10 ms at p99, for somebody took the key or the lease away.
	Operator Promise = "operator"
	// Outside: nothing. The fencing token protects; what happens is reported.
	Outside Promise = "outside"
)

// Expect is what becomes of the job.
type Expect int

// The expectations.
const (
	// Failover: another candidate must start it.
	Failover Expect = iota
	// NoFailover: it must go on, with the same pid, term, token and lease, and a planned hand-over
	// must work afterwards.
	NoFailover
	// MayFailover: either; what happens is reported.
	MayFailover
)

// Isolation says which trials must have the machine for themselves.
type Isolation int

// The isolations.
const (
	SideBySide    Isolation = iota
	OursAlone               // our figure is of milliseconds; the others wait for a TTL anyway
	EveryoneAlone           // all figures are of milliseconds, or the whole machine has the fault
)

// groups are in the order of the table.
var groups = []struct{ Name, Title string }{
	{"daemon", "the daemon"},
	{"job", "the job"},
	{"link", "the links to etcd"},
	{"etcd", "etcd"},
	{"operator", "an operator"},
	{"command", "a command, a failback or an unfit leader, and a fault meanwhile"},
	{"freeze", "loss of contact, and the job is frozen (LEASEHOLD_CONTACT_LOSS=freeze)"},
	{"machine", "the machine"},
}

// in makes scenarios rows of a group, whose etcd they have unless they say otherwise.
func in(group string, on etcd, rows ...Scenario) []Scenario {
	for i := range rows {
		s := &rows[i]
		s.Group, s.Etcd, s.TTL = group, cmp.Or(s.Etcd, on), cmp.Or(s.TTL, 5*time.Second)
	}
	return rows
}

func (s *Scenario) info() RowInfo {
	return RowInfo{
		Name: s.Name, Group: s.Group, About: s.About, TTL: s.TTL.Seconds(), Members: s.Etcd.Members,
		Promise: s.Promise, Short: s.CI,
		NoFailover: s.Expect == NoFailover, MayFailover: s.Expect == MayFailover,
	}
}

// A variant is an implementation in one of the ways in which it is run.
type variant struct {
	harness.Implementation
	Title string
	uid   uint32
}

var variants = []variant{
	{harness.Leasehold, harness.Leasehold.Name, 0},
	{harness.Leasehold, harness.Leasehold.Name + ", ordinary user", 65534},
	{harness.NaiveClient, harness.NaiveClient.Name, 0},
	{harness.EtcdctlLock, harness.EtcdctlLock.Name, 0},
}

// has reports whether the scenario has trials of a variant. The naive client knows
// nothing of user and password.
func (s *Scenario) has(v variant) bool {
	return (v.uid == 0 || s.User) && !slices.Contains(s.Without, v.Name) &&
		(!s.Etcd.Auth || v.Name != harness.NaiveClient.Name)
}

// alone reports whether a variant's trials have the machine for themselves.
func (s *Scenario) alone(v variant) bool {
	return s.Isolation == EveryoneAlone || s.Isolation == OursAlone && v.Ours()
}
