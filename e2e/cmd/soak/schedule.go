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
	freezeCount    = 2 // of the candidates, the first ones
	memberCount    = 3
	stopGrace      = 500 * time.Millisecond
	// recovers is how long after a fault TCP and gRPC may need to work again.
	recovers = 1500 * time.Millisecond
)

// drawn is one entry of a schedule.
type drawn struct {
	*kind
	number int
	at     time.Duration // from the beginning of the run
	lasts  time.Duration
	whom   string // for people
	// leader: it is for who leads at that moment; else, and where nobody does, for the one of this
	// index, or the next that can be hit.
	leader bool
	index  int
	reach  []int         // the members whose links to the candidate are hit
	loss   int           // of a hundred packets
	period time.Duration // of a link that flaps
	defrag bool
	loops  int // that keep the processors busy
	// priority is of a candidate from then on.
	priority int
}

// draw draws the schedule. Nothing but the settings has a say in it.
func draw(set settings) []drawn {
	rng := rand.New(rand.NewPCG(set.seed, 1))
	between := func(from, to float64) float64 { return from + (to-from)*rng.Float64() }
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	var schedule []drawn
	at := time.Duration(0)
	for n := range set.faults {
		pick := rng.IntN(total)
		i := 0
		for ; pick >= kinds[i].weight; i++ {
			pick -= kinds[i].weight
		}
		k := &kinds[i]
		lasts := time.Duration(between(k.from, k.to) * float64(set.ttl)).Round(time.Millisecond)
		f := drawn{
			kind: k, number: n + 1, at: at, lasts: lasts,
			leader: rng.Float64() < 0.5,
			loss:   20 + rng.IntN(50), period: time.Duration(50+rng.IntN(400)) * time.Millisecond,
			defrag: rng.IntN(2) == 0, loops: 3 + rng.IntN(4),
		}
		switch f.index = rng.IntN(candidateCount); k.target {
		case aDaemon, aLink:
			f.whom = candidateName(f.index)
		case aMember, allMembers, theCluster:
			f.index = rng.IntN(memberCount)
		}
		if k.target == aMember {
			f.whom = memberName(f.index)
		}
		if f.leader && f.whom != "" {
			f.whom = "leader, else " + f.whom
		}
		f.reach = rng.Perm(memberCount)
		if whole := rng.Float64() < 0.6; !whole {
			f.reach = f.reach[:1+rng.IntN(memberCount-1)]
		}
		slices.Sort(f.reach)
		// Amid other faults the old leader may hear late of what an operator does to it, and the
		// job of a lost elector may be moved. So that there are enough cases in which it must not,
		// some wait for calm.
		calm := rng.IntN(3) == 0
		if calm && (k.target == anElection || (&injection{drawn: f}).losesElector()) {
			for _, before := range schedule {
				f.at = max(f.at, before.at+before.lasts+recovers+100*time.Millisecond)
			}
		}
		schedule = append(schedule, f)
		wait := time.Duration(between(0.1, 1.8) * float64(time.Second))
		at = f.at + wait.Round(time.Millisecond)
	}
	return drawCommands(set, schedule)
}

// partOf is after how many faults all of them end, and it is checked how soon a job comes back.
const partOf = 100

// parts cuts a schedule.
func parts(schedule []drawn) (all [][]drawn) {
	from := 0
	for n, f := range schedule {
		if f.target != anElectionsFuture && f.number%partOf == 1 && f.number > 1 {
			all, from = append(all, schedule[from:n]), n
		}
	}
	return append(all, schedule[from:])
}

// entry is a line of the schedule.
func (f drawn) entry() string { return fmt.Sprintf("%4d %9.3fs  %v", f.number, f.at.Seconds(), f) }

// String says what the fault does, and to whom as far as that is known by now.
func (f drawn) String() string {
	text := f.name
	if f.whom != "" {
		text += ": " + f.whom
	}
	if f.target == aLink && len(f.reach) < memberCount {
		var to []string
		for _, m := range f.reach {
			to = append(to, memberName(m))
		}
		text += " (" + strings.Join(to, ", ") + ")"
	}
	member, defragmented := memberName(f.index), ""
	if f.defrag {
		defragmented = ", and " + member + " defragmented"
	}
	text += strings.NewReplacer("LOSS", fmt.Sprint(f.loss), "PERIOD", fmt.Sprint(f.period),
		"LOOPS", fmt.Sprint(f.loops), "CANDIDATE", candidateName(f.index),
		"PRIORITY", fmt.Sprint(f.priority), "MEMBER", member, "DEFRAG", defragmented,
	).Replace(f.details)
	if f.lasts > 0 {
		text += fmt.Sprintf(", for %v", f.lasts)
	}
	return text
}

func candidateName(i int) string { return string(rune('a' + i)) }
func memberName(i int) string    { return fmt.Sprintf("m%d", i+1) }

// behaviours draws how the job of a candidate's next daemon behaves and how long its supervisor
// waits before it starts that daemon. Each candidate has its own.
func behaviours(seed uint64, candidate int, root bool) func() ([]string, time.Duration) {
	r := rand.New(rand.NewPCG(seed, 100+uint64(candidate)))
	all := []string{
		"ignore-term", "daemonize", "setsid", "hold-pipes", "fork-bomb=2", "slow-stop", "main-gone",
	}
	return func() (words []string, pause time.Duration) {
		pause = time.Duration(50+r.IntN(900)) * time.Millisecond
		escapes := false
		for range r.IntN(3) {
			i := r.IntN(len(all))
			word := all[i]
			if word == "slow-stop" {
				word = fmt.Sprintf("slow-stop=%dms", 50+r.IntN(900))
			}
			words, escapes = append(words, word), escapes || 1 <= i && i <= 3
		}
		// Without a cgroup a wiped environment is what the README says can be missed.
		if wipe := r.IntN(3) == 0; wipe && escapes && root {
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
}

// writes draws whether the job of a candidate's next daemon writes to the storage. It does with one
// process more than the others.
func writes(seed uint64, candidate int) func() bool {
	r := rand.New(rand.NewPCG(seed, 200+uint64(candidate)))
	return func() bool { return r.IntN(4) > 0 }
}
