// Package sim runs the real election package against a simulated etcd, in a testing/synctest
// bubble: five daemons, each a real candidate with a simulated guard and job, under a seeded list
// of faults.
//
// docs/simulation.md says what is simulated, what is checked, and how to run it. world.go is one
// run, fault.go the faults, network.go the links, daemon.go a daemon's life, job.go its guard and
// job, check.go what must hold.
//
// # Determinism
//
// The same list of faults gives the same run. Nothing in a run uses the real time, and every random
// number comes from the seed: those of a daemon, a link or a fault from a generator of its own.
// What is left is what Go's runtime chooses at random: the case of a select, the order of a map,
// the numbers of math/rand, which timer of one instant comes first. e2e/cmd/sim compiles the
// runtime so that a bubble takes these from the seed as well, and so that nothing preempts a
// goroutine. One processor is needed. Without that runtime (go test), the faults are the same and
// the run is not.
package sim

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"leasehold/control"
	"leasehold/e2e/sim/simetcd"
	elect "leasehold/election"
)

// Result is what a run has shown.
type Result struct {
	Violations []string // what did not hold, the first one first
	Log        []byte
	Virtual    time.Duration // for how long the run took, by the clock of the bubble
	Terms      int           // jobs that were started
	Recovery   time.Duration // from the last fault until a job ran and all others were standby
}

// Summary is what a run's process writes, a line of JSON, for e2e/cmd/sim.
type Summary struct {
	Seed       uint64
	Faults     int
	Virtual    time.Duration
	Recovery   time.Duration
	Terms      int
	Digest     string   // of the log
	Violations []string `json:",omitempty"`
}

const election = "sim"

// world is one run.
type world struct {
	s       Schedule
	start   time.Time
	hear    time.Duration // until a leader of etcd that was deposed meanwhile hears of that
	near    int           // how many keys may be ahead of a candidate that watches the whole queue
	cluster *simetcd.Cluster
	network *network
	daemons []*daemon
	check   *checker

	noLeaderUntil atomic.Int64 // in virtual nanoseconds: etcd elects nobody before

	steps sync.Mutex // held while a fault does something; guards the schedule's faults, too
	away  int        // members that a fault has taken away, in bits
	over  bool       // all faults are over

	mu   sync.Mutex    // guards the guards, jobs, the checker and the hold
	hold *control.Hold // nil: there is none
	log  struct {
		sync.Mutex
		bytes.Buffer
	}
}

// Run runs the schedule.
func Run(t *testing.T, s Schedule) (r Result) {
	t.Helper()
	synctest.Test(t, func(*testing.T) {
		seedRuntime(s.Seed + 1)
		w := newWorld(s)
		w.run()
		r = w.result()
	})
	return r
}

// result is what the run has shown. A candidate whose process has crashed may still log something.
func (w *world) result() Result {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log.Lock()
	defer w.log.Unlock()
	return Result{
		Violations: slices.Clone(w.check.violations), Log: slices.Clone(w.log.Bytes()),
		Virtual: w.now(), Terms: w.check.terms, Recovery: w.check.recovery,
	}
}

func newWorld(s Schedule) *world {
	s.Faults = slices.Clone(s.Faults) // a fault keeps what it has hit
	w := &world{s: s, start: time.Now()}
	w.near = []int{elect.Near, 1}[s.Seed%2]
	w.check = &checker{w: w}
	w.network = newNetwork(s.Seed)
	r := w.random("etcd")
	rates := []float64{drift(r), drift(r), drift(r)}
	w.hear = time.Duration(1 + r.Int64N(int64(s.TTL/4)))
	w.cluster = simetcd.New(simetcd.Config{
		Members: 3, Seed: s.Seed, Hear: w.hear, Network: w.network.verdict,
		Rate: func(member int) float64 { return rates[member-1] },
		Log:  func(format string, args ...any) { w.note("etcd", format, args...) },
	})
	for i := range Daemons {
		w.daemons = append(w.daemons, newDaemon(w, string(rune('a'+i))))
	}
	return w
}

// random returns a generator for that use alone, so that no other use changes its numbers.
func (w *world) random(use string) *rand.Rand { return generator(w.s.Seed, use) }

func generator(seed uint64, use string) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(use))
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// now is the time since the run began.
func (w *world) now() time.Duration { return time.Since(w.start) }

func (w *world) note(actor, format string, args ...any) {
	w.log.Lock()
	defer w.log.Unlock()
	_, _ = fmt.Fprintf(&w.log, "%14.6f %-6s ", w.now().Seconds(), actor)
	_, _ = fmt.Fprintf(&w.log, format, args...)
	_ = w.log.WriteByte('\n')
}

// handler writes a candidate's log lines to the log of the run, without their time.
func (w *world) handler(actor string) slog.Handler {
	return slog.NewTextHandler(noteWriter{w, actor}, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		},
	})
}

type noteWriter struct {
	w     *world
	actor string
}

func (n noteWriter) Write(p []byte) (int, error) {
	n.w.note(n.actor, "%s", bytes.TrimSuffix(p, []byte("\n")))
	return len(p), nil
}

// event is something that the run does at a moment.
type event struct {
	at time.Duration
	do func()
}

func (w *world) run() {
	stop := make(chan struct{})
	var background sync.WaitGroup
	background.Go(func() { w.elections(stop) })
	background.Go(func() { w.check.watch(stop) })
	for _, d := range w.daemons {
		d.start()
	}
	time.Sleep(2 * w.s.TTL)
	for _, e := range w.events() {
		time.Sleep(e.at - w.now())
		w.step(e.do)
	}
	w.recover()
	w.check.settled()
	w.stop()
	close(stop)
	background.Wait()
	w.cluster.Close()
	time.Sleep(time.Minute) // gRPC closes its connections
}

// events are the faults' beginnings and ends, in order.
func (w *world) events() (events []event) {
	for i := range w.s.Faults {
		f := &w.s.Faults[i]
		events = append(events, event{f.At, func() {
			w.note("fault", "%v", *f)
			kinds[f.Kind].inject(w, f)
		}})
		if end := kinds[f.Kind].end; end != nil {
			events = append(events, event{f.At + f.Lasts, func() {
				w.note("fault", "over: %v", *f)
				end(w, f)
			}})
		}
	}
	slices.SortStableFunc(events, func(a, b event) int { return int(a.at - b.at) })
	return events
}

// elections elect a leader of etcd when there has been none for some time.
func (w *world) elections(stop chan struct{}) {
	r := w.random("elections")
	tick := time.NewTicker(100*time.Millisecond + 137)
	defer tick.Stop()
	wait := time.Duration(0)
	var since time.Time // when etcd's leader was last seen
	for {
		select {
		case <-stop:
			return
		case now := <-tick.C:
			switch {
			case w.cluster.Leader() != 0:
				since, wait = now, time.Second+time.Duration(r.Int64N(int64(time.Second)))
			case now.Sub(since) > wait && int64(w.now()) > w.noLeaderUntil.Load():
				w.cluster.Elect(1 + r.IntN(3))
			}
		}
	}
}

// recover ends what faults may have left behind.
func (w *world) recover() {
	w.step(func() {
		w.over = true
		w.note("fault", "all faults are over")
		for m := 1; m <= 3; m++ {
			w.cluster.Start(m)
			w.cluster.Resume(m)
			w.cluster.Heal(m)
			w.cluster.Lag(m, 0)
		}
		w.network.recover()
	})
	for !releaseElection(w) { // etcd may have no leader
		time.Sleep(100 * time.Millisecond)
	}
	withdraw(w, nil)
	for _, d := range w.daemons {
		d.start()
	}
}

var errStop = errors.New("asked to stop")

// stop stops all daemons, and waits until they have.
func (w *world) stop() {
	for _, d := range w.daemons {
		d.stop()
	}
	// Also if an elector is replaced meanwhile.
	r := w.random("stop")
	w.daemons[r.IntN(Daemons)].replace(time.Duration(r.Int64N(int64(time.Second))))
	for _, d := range w.daemons {
		if !d.waitDown(w.s.TTL * 4) {
			w.check.report("%s does not end", d.name)
			return
		}
	}
	if left := w.cluster.Keys(election + "/"); len(left) > 0 {
		w.check.report("keys are left when all daemons have ended: %v", left)
	}
}
