//go:build linux

package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

const (
	candidateCount = 5
	memberCount    = 3
	stopGrace      = 500 * time.Millisecond
	// recovers is how long after a fault TCP and gRPC may need to hear again.
	recovers = 1500 * time.Millisecond
)

// margin is leasehold's own default.
func (s settings) margin() time.Duration { return max(s.ttl/10, 200*time.Millisecond) }

// kind is a sort of fault.
type kind struct {
	name   string
	weight int
	what   target
	// from and to bound how long it lasts, in TTLs; of frozen briefly, in margins.
	from, to float64
}

type target string

const (
	onCandidate target = "candidate" // a process of it: one at a time
	onRoad      target = "road"      // of a candidate, to one or more members of etcd
	onMember    target = "member"    // of etcd: one at a time
	onEtcd      target = "etcd"
	onElection  target = "election"
	onMachine   target = "machine"
)

var kinds = []kind{
	{"guard killed", 6, onCandidate, 0, 0},
	{"elector killed", 6, onCandidate, 0, 0},
	{"guard stopped", 4, onCandidate, 0.02, 1.2},
	{"elector stopped", 4, onCandidate, 0.02, 1.4},
	{"spawner killed", 4, onCandidate, 0, 0},
	{"spawner stopped", 3, onCandidate, 0.02, 1.4},
	{"frozen briefly", 3, onCandidate, 0.1, 0.8},
	{"frozen for long", 2, onCandidate, 1, 1.5},
	{"asked to end", 5, onCandidate, 0, 0},
	{"asked to end twice", 2, onCandidate, 0, 0},
	{"road cut", 5, onRoad, 0.1, 1.6},
	{"road cut to etcd", 2, onRoad, 0.1, 1.6},
	{"road cut from etcd", 2, onRoad, 0.1, 1.6},
	{"road lossy", 3, onRoad, 0.3, 2},
	{"road flapping", 3, onRoad, 0.5, 2},
	{"member killed", 4, onMember, 0.1, 1.2},
	{"member paused", 4, onMember, 0.1, 1.5},
	{"member cut off", 3, onMember, 0.1, 1.2},
	{"all members restarted", 1, onEtcd, 0.05, 0.3},
	{"etcd leader moved", 3, onEtcd, 0, 0},
	{"compacted", 3, onEtcd, 0, 0},
	{"leader's key deleted", 4, onElection, 0, 0},
	{"leader's lease revoked", 4, onElection, 0, 0},
	{"starved", 3, onMachine, 0.3, 0.8},
}

// fault is one entry of a schedule.
type fault struct {
	kind
	number int
	at     time.Duration // from the beginning of the run
	lasts  time.Duration
	// leader: it is for who leads at that moment; else, and where nobody does, for
	// the one of this number, or the next that can be hit.
	leader bool
	index  int
	reach  []int         // the members that a road leads to
	loss   int           // of a hundred packets
	period time.Duration // of a road that flaps
	defrag bool
	hogs   int
}

// draw draws the schedule. Nothing but the settings has a say in it.
func draw(set settings) []fault {
	rng := rand.New(rand.NewPCG(set.seed, 1))
	between := func(from, to float64) float64 { return from + (to-from)*rng.Float64() }
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	var faults []fault
	at := time.Duration(0)
	for n := range set.faults {
		pick := rng.IntN(total)
		i := 0
		for ; pick >= kinds[i].weight; i++ {
			pick -= kinds[i].weight
		}
		unit := set.ttl
		if kinds[i].name == "frozen briefly" {
			unit = set.margin()
		}
		f := fault{
			kind: kinds[i], number: n + 1, at: at,
			lasts:  time.Duration(between(kinds[i].from, kinds[i].to) * float64(unit)).Round(time.Millisecond),
			leader: rng.Float64() < 0.5,
			loss:   20 + rng.IntN(50), period: time.Duration(50+rng.IntN(400)) * time.Millisecond,
			defrag: rng.IntN(2) == 0, hogs: 3 + rng.IntN(4),
		}
		f.index = rng.IntN(candidateCount)
		if f.what == onMember || f.what == onEtcd {
			f.index = rng.IntN(memberCount)
		}
		f.reach = rng.Perm(memberCount)
		if whole := rng.Float64() < 0.6; !whole {
			f.reach = f.reach[:1+rng.IntN(memberCount-1)]
		}
		slices.Sort(f.reach)
		// Amid other faults the old leader may hear late of what an operator does to
		// it. So that there are enough cases in which it must not, some wait for calm.
		if calm := rng.IntN(3) == 0; calm && f.what == onElection {
			for _, before := range faults {
				f.at = max(f.at, before.at+before.lasts+recovers+100*time.Millisecond)
			}
		}
		faults = append(faults, f)
		at = f.at + time.Duration(between(0.1, 1.8)*float64(time.Second)).Round(time.Millisecond)
	}
	return faults
}

// String is an entry as the schedule shows it.
func (f fault) String() string {
	return fmt.Sprintf("%4d %9.3fs  %s", f.number, f.at.Seconds(), f.deed(""))
}

// deed says what the fault does, and to whom where that is known by now.
func (f fault) deed(whom string) string {
	if whom == "" {
		switch f.what {
		case onCandidate, onRoad:
			whom = candidateName(f.index)
		case onMember:
			whom = memberName(f.index)
		}
		if f.leader && whom != "" {
			whom = "leader, else " + whom
		}
	}
	text := f.name
	if whom != "" {
		text += ": " + whom
	}
	switch {
	case f.what == onRoad && len(f.reach) < memberCount:
		var to []string
		for _, m := range f.reach {
			to = append(to, memberName(m))
		}
		text += " (" + strings.Join(to, ", ") + ")"
	case f.name == "etcd leader moved":
		text += " to " + memberName(f.index)
	case f.name == "compacted" && f.defrag:
		text += ", and " + memberName(f.index) + " defragmented"
	}
	switch f.name {
	case "road lossy":
		text += fmt.Sprintf(", %d %%", f.loss)
	case "road flapping":
		text += fmt.Sprintf(", every %v", f.period)
	case "starved":
		text += fmt.Sprintf(" by %d busy loops", f.hogs)
	}
	if f.lasts > 0 {
		text += fmt.Sprintf(", for %v", f.lasts)
	}
	return text
}

func candidateName(i int) string { return string(rune('a' + i)) }
func memberName(i int) string    { return fmt.Sprintf("m%d", i+1) }

// moods draws how the job of a candidate's next daemon behaves and how long its
// supervisor waits before it starts that daemon. Each candidate has its own.
type moods struct {
	rng  *rand.Rand
	root bool
}

func newMoods(set settings, candidate int, root bool) *moods {
	return &moods{rng: rand.New(rand.NewPCG(set.seed, 100+uint64(candidate))), root: root}
}

func (m *moods) next() (words []string, pause time.Duration) {
	r := m.rng
	pause = time.Duration(50+r.IntN(900)) * time.Millisecond
	escapes := false
	for range r.IntN(3) {
		switch r.IntN(7) {
		case 0:
			words = append(words, "ignore-term")
		case 1:
			words, escapes = append(words, "daemonize"), true
		case 2:
			words, escapes = append(words, "setsid"), true
		case 3:
			words, escapes = append(words, "hold-pipes"), true
		case 4:
			words = append(words, "fork-bomb=2")
		case 5:
			words = append(words, fmt.Sprintf("slow-stop=%dms", 50+r.IntN(900)))
		case 6:
			words = append(words, "main-gone")
		}
	}
	// Without a cgroup a wiped environment is what the README says can be missed.
	if wipe := r.IntN(3) == 0; wipe && escapes && m.root {
		words = append(words, "wipe-env")
	}
	after := fmt.Sprintf("after=%dms", 200+r.IntN(6000))
	switch r.IntN(10) {
	case 0: // it crashes, again and again
		words = append(words, "exit=3")
	case 1:
		words = append(words, "exit=3", after)
	case 2: // it has done its work
		words = append(words, "exit=0", after)
	}
	slices.Sort(words)
	return slices.Compact(words), pause
}
