package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	elect "leasehold/election"
)

// Daemons is how many daemons a run has.
const Daemons = 5

// maxDrift is by how much the rate of a clock may differ from 1. With a margin of a tenth of the
// TTL, that leaves a kill some 9 % of it.
const maxDrift = 0.005

func drift(r *rand.Rand) float64 { return 1 + maxDrift*(2*r.Float64()-1) }

// clock is a machine's CLOCK_BOOTTIME.
type clock struct {
	mu   sync.Mutex
	rate float64
	then time.Duration // what it showed
	at   time.Time     // at this moment
}

func (c *clock) now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.then + time.Duration(c.rate*float64(time.Since(c.at)))
}

// in is how long the clock takes to count d.
func (c *clock) in(d time.Duration) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d > 1000*time.Hour {
		return d
	}
	return max(0, 1+time.Duration(float64(d)/c.rate))
}

func (c *clock) set(rate float64) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rate, c.then, c.at = rate, now, time.Now()
}

// daemon is the daemon of one machine, started again and again.
type daemon struct {
	w      *world
	name   string
	clock  clock
	random *rand.Rand
	// freezes: its guard freezes the job at stop-at.
	freezes bool

	// The world's lock guards what follows.
	wanted    bool // it is to run
	leaving   bool // its elector has crashed, and its guard has not yet exited
	replacing bool // its elector has crashed, and its guard has not yet started another one
	elector   *elector
	guard     guard
	job       *job // the last one
	started   int  // electors
}

// guard is what the guard knows beside its job.
type guard struct {
	lease     int64 // 0: none
	created   int64 // the key's create revision; 0: not known to be put
	releasing bool
	stop      bool // the daemon was asked to stop
}

func newDaemon(w *world, name string) *daemon {
	d := &daemon{w: w, name: name, random: w.random("daemon " + name)}
	d.clock.at = time.Now()
	d.clock.rate = drift(d.random)
	d.clock.then = time.Hour + time.Duration(d.random.Int64N(int64(time.Hour)))
	d.freezes = w.random("freezes "+name).IntN(2) == 0
	return d
}

func (d *daemon) note(format string, args ...any) { d.w.note(d.name, format, args...) }

// elector is one process with a real candidate.
type elector struct {
	d         *daemon
	client    string // its name in the network
	candidate *elect.Candidate
	stop      context.CancelCauseFunc
	crashed   chan struct{} // closed when it has crashed
	leases    []int64       // that it had, guarded by the world's lock
}

var errCrashed = errors.New("crashed")

func (d *daemon) config(client string, callbacks elect.Callbacks) elect.Config {
	return elect.Config{
		Endpoints: d.w.cluster.Endpoints(), Election: election, Identity: d.name, TTL: d.w.s.TTL,
		LossGrace: -1, Margin: -1, Wait: -1, Failback: -1,
		DialTimeout: time.Second, Near: d.w.near,
		Dial: d.w.cluster.Dialer(client), Now: d.clock.now,
		Logger: slog.New(d.w.handler(client)), Callbacks: callbacks,
	}
}

// start starts the daemon if it does not run, or as soon as it has ended.
func (d *daemon) start() {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	d.wanted = true
	d.startIfWanted()
}

func (d *daemon) startIfWanted() {
	if !d.wanted || d.leaving || d.replacing || d.elector != nil {
		return
	}
	d.guard = guard{}
	d.startElector()
}

// startElector starts an elector, with a record of what the guard knows.
func (d *daemon) startElector() {
	d.started++
	e := &elector{
		d: d, client: fmt.Sprintf("%s.%d", d.name, d.started), crashed: make(chan struct{}),
	}
	cfg := d.config(e.client, e)
	if d.guard.lease != 0 {
		cfg.Adopt = d.record()
		e.leases = []int64{d.guard.lease}
	}
	var err error
	if e.candidate, err = elect.New(cfg); err != nil {
		panic(err)
	}
	ctx, stop := context.WithCancelCause(context.Background())
	e.stop, d.elector = stop, e
	d.note("starts as %s", e.client)
	if d.guard.stop {
		stop(errStop)
	}
	go e.run(ctx)
}

// record is what another elector is to know.
func (d *daemon) record() *elect.Adoption {
	a := &elect.Adoption{
		LeaseID: d.guard.lease, TTL: d.w.s.TTL, Created: d.guard.created,
		Releasing: d.guard.releasing,
	}
	if j := d.job; j != nil && j.lease == a.LeaseID && j.alive() {
		a.Leading, a.Ending, a.Deadlines = true, j.stopping || j.killing, j.deadlines
	}
	d.note("the record: %+v", *a)
	return a
}

func (e *elector) run(ctx context.Context) {
	err := e.candidate.Run(ctx)
	d := e.d
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if e.hasCrashed() {
		return
	}
	if err != nil || ctx.Err() == nil {
		d.w.check.violation("Run of %s returned without being asked to: %v", e.client, err)
	}
	d.note("has ended")
	d.elector, d.guard = nil, guard{}
	d.startIfWanted()
}

func (e *elector) hasCrashed() bool {
	select {
	case <-e.crashed:
		return true
	default:
		return false
	}
}

// stop is a planned stop.
func (d *daemon) stop() {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	d.wanted = false
	if d.elector == nil && !d.replacing {
		return
	}
	d.note("is asked to stop")
	d.guard.stop = true
	if j := d.job; j != nil && j.alive() { // the guard does not wait for the elector
		j.stop(d.w.s.TTL, errStop.Error())
	}
	if d.elector != nil {
		d.elector.stop(errStop)
	}
}

// waitDown reports whether the daemon ends in time.
func (d *daemon) waitDown(atMost time.Duration) bool {
	for end := time.Now().Add(atMost); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		d.w.mu.Lock()
		down := d.elector == nil && !d.leaving && !d.replacing
		d.w.mu.Unlock()
		if down {
			return true
		}
	}
	return false
}

// endElector ends the elector's process at once: its connections are reset, and no request of it
// leaves any more. Those on their way arrive.
func (d *daemon) endElector() {
	e := d.elector
	if e == nil {
		return
	}
	d.elector = nil
	close(e.crashed)
	e.stop(errCrashed)
	d.w.network.crash(e.client)
	for m := range 3 {
		d.w.cluster.Disconnect(e.client, m+1)
	}
}

// replace ends the elector's process. The guard and its job go on. After that time the guard starts
// another elector.
func (d *daemon) replace(after time.Duration) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if d.elector == nil {
		return
	}
	d.note("its elector crashes, and is replaced after %v", after)
	d.endElector()
	d.replacing = true
	ended := d.started
	time.AfterFunc(after, func() {
		d.w.mu.Lock()
		defer d.w.mu.Unlock()
		if d.replacing && d.started == ended {
			d.replacing = false
			d.startElector()
		}
	})
}

// crash ends the elector's process, and the guard gives up: it kills the job, waits for its exit,
// revokes the lease and exits. If all of the machine crashes, the job is gone at once, and nobody
// revokes.
func (d *daemon) crash(machine bool) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	d.wanted = false
	if d.elector == nil && !d.replacing {
		return
	}
	d.endElector()
	d.replacing = false
	j, lease := d.job, d.guard.lease
	d.guard = guard{}
	if machine {
		if j != nil && j.alive() {
			j.vanish()
		}
		return
	}
	d.leaving = true
	if j != nil {
		j.kill("elector lost")
	}
	go d.guardLeaves(j, lease)
}

func (d *daemon) guardLeaves(j *job, lease int64) {
	if j != nil {
		<-j.gone
	}
	if lease != 0 {
		ctx, cancel := context.WithTimeout(context.Background(), d.w.s.TTL)
		err := elect.Revoke(ctx, d.config(d.name+".guard", nil), lease)
		cancel()
		d.note("the guard has revoked the lease %x: %v", lease, err)
	}
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	d.leaving = false
	d.startIfWanted()
}

// Leased implements election.Callbacks.
func (e *elector) Leased(id int64, _ time.Duration) {
	e.d.w.mu.Lock()
	defer e.d.w.mu.Unlock()
	if e.hasCrashed() {
		return
	}
	e.d.guard = guard{lease: id, stop: e.d.guard.stop}
	if id != 0 {
		e.leases = append(e.leases, id)
	}
}

// Entered implements election.Callbacks.
func (e *elector) Entered(_ string, created int64) {
	e.d.w.mu.Lock()
	defer e.d.w.mu.Unlock()
	if !e.hasCrashed() {
		e.d.guard.created = created
	}
}

// Ended implements election.Callbacks.
func (e *elector) Ended(error, error) {}

// Releasing implements election.Callbacks.
func (e *elector) Releasing(lease int64) error {
	e.d.w.mu.Lock()
	defer e.d.w.mu.Unlock()
	switch {
	case e.hasCrashed():
		return errCrashed
	case lease != e.d.guard.lease || e.d.guard.releasing:
		e.d.w.check.violation("%s announces the release of %x, and its guard knows %+v",
			e.client, lease, e.d.guard)
	}
	e.d.note("is about to release the lease %x", lease)
	e.d.guard.releasing = true
	return nil
}

// Extended implements election.Callbacks.
func (e *elector) Extended(deadlines elect.Deadlines) {
	e.d.w.mu.Lock()
	defer e.d.w.mu.Unlock()
	if j := e.d.job; j != nil && j.alive() && !e.hasCrashed() {
		j.extend(deadlines)
	}
}

// Suspend implements election.Callbacks.
func (e *elector) Suspend() bool {
	e.d.w.mu.Lock()
	defer e.d.w.mu.Unlock()
	j := e.d.job
	return e.d.freezes && !e.hasCrashed() && !e.d.guard.stop && j != nil && j.alive() &&
		!j.stopping && !j.killing
}

// Lead implements election.Callbacks. It does what the supervisor does.
func (e *elector) Lead(ctx context.Context, t elect.Term) error {
	j, err := e.jobOf(t)
	if j == nil {
		return err
	}
	done, lost := ctx.Done(), t.Lost
	for {
		select {
		case <-lost:
			lost = nil
			e.order(j, "lease or key lost", 0)
		case <-done:
			done = nil
			grace := time.Duration(0)
			switch cause := context.Cause(ctx); {
			case errors.Is(cause, errStop):
				grace = e.d.w.s.TTL
			case errors.Is(cause, elect.ErrContactLost), errors.Is(cause, elect.ErrEnded):
				grace = forever
			}
			e.order(j, context.Cause(ctx).Error(), grace)
		case <-e.crashed:
			return errCrashed
		case <-j.gone:
			return j.result
		}
	}
}

// jobOf returns the job of the term: the one that runs, or a new one. It returns nil if none is to
// run.
func (e *elector) jobOf(t elect.Term) (*job, error) {
	d := e.d
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	j := d.job
	switch {
	case e.hasCrashed():
		return nil, errCrashed
	case t.Adopted:
		return j, nil
	case j != nil && j.token == t.Token && j.result != nil && d.random.IntN(2) == 0:
		// It failed, too often for the elector before. By other settings it may start again.
		return nil, j.result
	}
	return d.startJob(t), nil
}

// order has the guard end the job.
func (e *elector) order(j *job, why string, grace time.Duration) {
	e.d.w.mu.Lock()
	defer e.d.w.mu.Unlock()
	switch {
	case e.hasCrashed():
	case grace == 0:
		j.kill(why)
	default:
		j.stop(grace, why)
	}
}
