package sim

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"leasehold/e2e/sim/simetcd"
)

// Schedule is all that a run depends on.
type Schedule struct {
	Seed   uint64
	TTL    time.Duration
	Faults []Fault
}

// Fault is one fault. A run without it leaves all others as they are.
type Fault struct {
	At, Lasts time.Duration
	Kind      string
	Daemon    int     // -1: whoever leads
	Members   []int   // of etcd; 0: whoever leads
	Level     float64 // how bad it is: from 0 to 1
}

func (f Fault) String() string {
	daemon := "of the leader"
	if f.Daemon >= 0 {
		daemon = "of " + string(rune('a'+f.Daemon))
	}
	return fmt.Sprintf("%8.3f s %-16s %s, members %v, for %.3f s, level %.3f",
		f.At.Seconds(), f.Kind, daemon, f.Members, f.Lasts.Seconds(), f.Level)
}

// kind is a sort of fault.
type kind struct {
	weight int
	lasts  float64 // at most, in TTLs
	inject func(*world, *Fault)
	end    func(*world, *Fault) // nil: it is done at once
}

var kinds map[string]kind

func init() {
	kinds = map[string]kind{
		"etcd-leader-moved":      {4, 0, moveLeader, nil},
		"etcd-leader-stale":      {5, 1.2, pauseLeader, resumeMember},
		"etcd-leader-stale-only": {6, 1, staleOnly, resumeMember},
		"etcd-leader-stale-win":  {6, 1, staleWin, resumeMember},
		"etcd-no-leader":         {2, 0.8, noLeader, nil},
		"member-paused":          {4, 1.5, pauseMember, resumeMember},
		"member-stopped": {
			4, 1.2, takeAway((*simetcd.Cluster).Stop),
			bringBack((*simetcd.Cluster).Start),
		},
		"member-isolated": {
			4, 1.2, takeAway((*simetcd.Cluster).Isolate),
			bringBack((*simetcd.Cluster).Heal),
		},
		"member-lags":        {3, 1.5, lagMember, unlagMember},
		"events-missed":      {5, 0, missEvents, nil},
		"events-late":        {3, 0, delayEvents, nil},
		"compacted":          {2, 0, func(w *world, _ *Fault) { w.cluster.Compact() }, nil},
		"link-down":          {5, 1.6, downLink, upLink},
		"link-lossy":         {4, 2, lossyLink, upLink},
		"link-slow":          {4, 2, slowLink, upLink},
		"link-dies":          {4, 0, dyingLink, nil},
		"link-out-lost":      {2, 1.6, outLost, upLink},
		"link-in-lost":       {3, 1.6, inLost, upLink},
		"link-twice":         {3, 2, twiceLink, upLink},
		"link-reset":         {2, 0, resetLink, nil},
		"elector-crashed":    {4, 0.5, crashElector, startDaemon},
		"elector-replaced":   {6, 0, replaceElector, nil},
		"replaced-releasing": {6, 1, replaceReleasing, restartReleasing},
		"suspended-stale":    {5, 0, suspendedStale, nil},
		"suspended-twice":    {5, 0, suspendedTwice, nil},
		"replaced-stale":     {5, 1, replaceStale, resumeMember},
		"replaced-winning":   {3, 0, replaceWinning, nil},
		"machine-crashed":    {3, 1, crashMachine, startDaemon},
		"stop":               {4, 0.5, stopDaemon, startDaemon},
		"job-fails":          {2, 0, failJob, nil},
		"key-deleted":        {3, 0, deleteKey, nil},
		"lease-revoked":      {3, 0, revokeLease, nil},
		"key-overwritten":    {2, 0, overwriteKey, nil},
		"standby-revoked":    {3, 0, revokeStandby, nil},
		"held":               {3, 2, holdElection, func(w *world, _ *Fault) { releaseElection(w) }},
		"switchover":         {4, 1.5, switchOver, withdraw},
		"switchover-lost":    {3, 1.5, loseSwitchover, withdraw},
		"clock-rate-changed": {2, 0, changeRate, nil},
	}
}

// IsKind reports whether there is such a kind of fault. "" stands for all.
func IsKind(name string) bool {
	_, found := kinds[name]
	return found || name == ""
}

// NewSchedule draws a schedule with that many faults. If only names a kind, all are of that kind,
// one after the other.
func NewSchedule(seed uint64, faults int, only string) Schedule {
	r := generator(seed, "schedule")
	s := Schedule{Seed: seed, TTL: []time.Duration{3, 5, 5, 10}[r.IntN(4)] * time.Second}
	var names []string
	for name, k := range kinds {
		for range k.weight {
			if only == "" || only == name {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	// Some runs have a fault at a time, some many.
	pause := float64(s.TTL) * []float64{0.1, 0.2, 0.3, 0.7}[r.IntN(4)]
	if only != "" {
		pause = 3 * float64(s.TTL)
	}
	at := 2 * s.TTL
	for range faults {
		at += time.Duration(pause * r.ExpFloat64())
		f := Fault{At: at, Kind: names[r.IntN(len(names))], Level: r.Float64()}
		f.Lasts = time.Duration(kinds[f.Kind].lasts * r.Float64() * float64(s.TTL))
		f.Daemon = r.IntN(2*Daemons) - Daemons
		f.Daemon = max(f.Daemon, -1)
		f.Members = drawMembers(r)
		s.Faults = append(s.Faults, f)
	}
	return s
}

func drawMembers(r *rand.Rand) []int {
	one := r.IntN(4)
	switch r.IntN(3) {
	case 0:
		return []int{1, 2, 3}
	case 1:
		return []int{1 + one%3, 1 + (one+1)%3}
	}
	return []int{one}
}

// member is the first member that the fault is for.
func (w *world) member(f *Fault) int {
	if m := f.Members[0]; m != 0 {
		return m
	}
	// The end of a fault is for the same member as its beginning.
	f.Members = []int{max(w.cluster.Leader(), 1)}
	return f.Members[0]
}

// daemon is the daemon that the fault is for.
func (w *world) daemon(f *Fault) *daemon {
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.Daemon < 0 {
		f.Daemon = int(f.Level * Daemons)
		for i, d := range w.daemons {
			if d.job != nil && d.job.alive() {
				f.Daemon = i
			}
		}
	}
	return w.daemons[f.Daemon]
}

func (w *world) other(member int, f *Fault) int {
	return 1 + (member+int(f.Level*2))%3
}

var (
	pauseMember  = takeAway((*simetcd.Cluster).Pause)
	resumeMember = bringBack((*simetcd.Cluster).Resume)
)

func moveLeader(w *world, f *Fault) { w.cluster.Elect(w.other(max(w.cluster.Leader(), 1), f)) }

// pauseLeader pauses etcd's leader, and has another one elected meanwhile. When it goes on, it
// acknowledges renewals until it hears of that.
func pauseLeader(w *world, f *Fault) {
	f.Members = []int{0}
	pauseMember(w, f)
	w.cluster.Elect(w.other(w.member(f), f))
}

// staleOnly pauses etcd's leader as pauseLeader does. Shortly before it goes on, the daemon loses
// the other members, and when it has heard of its successor, the daemon loses it too. So what it
// acknowledges in between is the last that the daemon hears. In half of the cases its answers are
// slow: when it answers the read that has to confirm the renewal, it has heard of its successor.
func staleOnly(w *world, f *Fault) {
	pauseLeader(w, f)
	m, d := w.member(f), w.daemon(f)
	part := math.Mod(2*f.Level, 1)
	cut := f.Lasts + time.Duration((0.8+0.4*part)*float64(w.hear))
	if f.Level < 0.5 {
		slow := &link{answerDelay: w.s.TTL / 20, leastDelay: 0.5}
		w.linkLater(max(0, f.Lasts-w.s.TTL/20), d, []int{m}, slow)
		cut = f.Lasts + w.hear + time.Duration(part*float64(w.s.TTL)/20)
	}
	down := &link{requestsLost: 1, answersLost: 1}
	w.linkLater(max(0, f.Lasts-w.s.TTL/5), d, without(m), down)
	w.linkLater(cut, d, []int{m}, &link{requestsLost: 1})
	w.linkLater(f.Lasts+w.s.TTL*3/2, d, []int{1, 2, 3}, nil)
}

func without(member int) []int {
	return slices.DeleteFunc([]int{1, 2, 3}, func(m int) bool { return m == member })
}

// staleWin pauses etcd's leader as pauseLeader does. When it goes on, it is the only member that
// a standby's requests reach, so it acknowledges that standby's renewal. The standby is the next in
// line, which lets no such renewal count, or the one behind it. Then all keys ahead are deleted,
// which the standby hears from any member. In half of the cases no request of the standby arrives
// any more. In the others the member has heard of its successor by then, and the standby's requests
// reach it for a moment: perhaps the read of its win, and not the next renewal.
func staleWin(w *world, f *Fault) {
	pauseLeader(w, f)
	w.later(max(0, f.Lasts-w.s.TTL/5), func() {
		queue, place := w.queue(), 1+f.Daemon&1
		if len(queue) <= place {
			return
		}
		next, m := w.daemons[queue[place]], w.member(f)
		part, lost := math.Mod(2*f.Level, 1), &link{requestsLost: 1}
		w.network.set(next.name, without(m), lost)
		resumed := min(f.Lasts, w.s.TTL/5)
		won := resumed + time.Duration(part*float64(w.s.TTL)/10)
		cut := won
		if f.Level < 0.5 {
			won = resumed + w.hear + time.Duration(part*float64(w.s.TTL)/20)
			slow := &link{answerDelay: w.s.TTL / 20, leastDelay: 0.5}
			w.linkLater(won, next, []int{m}, slow)
			cut = won + time.Duration(math.Mod(100*f.Level, 1)*float64(w.s.TTL)/10)
		}
		w.later(won, func() {
			for ahead := place - 1; ahead >= 0; ahead-- {
				leaveInName(w, &Fault{Daemon: queue[ahead]})
			}
		})
		w.linkLater(cut, next, []int{m}, lost)
		w.linkLater(won+w.s.TTL*3/2, next, []int{1, 2, 3}, nil)
	})
}

// missEvents breaks the connections of the next in line. Before it is back, its key is deleted. So
// only a read can show it that. Then, or when it is back, the leader leaves.
func missEvents(w *world, f *Fault) {
	queue := w.queue()
	if len(queue) < 2 {
		return
	}
	for m := range 3 {
		resetLink(w, &Fault{Daemon: queue[1], Members: []int{m + 1}})
	}
	deleteKey(w, &Fault{Daemon: queue[1]})
	if f.Level < 0.5 {
		w.cluster.Compact()
	}
	w.later(time.Duration(math.Mod(2*f.Level, 1)*float64(w.s.TTL)/5), func() {
		leaveInName(w, &Fault{Daemon: queue[0]})
	})
}

// delayEvents delays all answers to the next in line, and loses its requests, so that its last
// renewal gets old. Then the leader's key is deleted, and its own. It hears of both late.
func delayEvents(w *world, f *Fault) {
	queue := w.queue()
	if len(queue) < 2 {
		return
	}
	next, all := w.daemons[queue[1]], []int{1, 2, 3}
	w.network.set(next.name, all, &link{
		requestsLost: 1, leastDelay: 0.999,
		answerDelay: time.Duration((0.2 + 0.5*f.Level) * float64(w.s.TTL)),
	})
	leaveInName(w, &Fault{Daemon: queue[0]})
	w.later(w.s.TTL/50, func() { deleteKey(w, &Fault{Daemon: queue[1]}) })
	w.linkLater(w.s.TTL, next, all, nil)
}

// queue returns the numbers of the daemons that have a key, the leader's first.
func (w *world) queue() (queue []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	created := map[int]int64{}
	for i, d := range w.daemons {
		if d.guard.lease == 0 {
			continue
		}
		if created[i] = w.cluster.Created(keyOf(d.guard.lease)); created[i] != 0 {
			queue = append(queue, i)
		}
	}
	slices.SortFunc(queue, func(a, b int) int { return cmp.Compare(created[a], created[b]) })
	return queue
}

func noLeader(w *world, f *Fault) {
	w.cluster.NoLeader()
	w.noLeaderUntil.Store(int64(w.now() + f.Lasts))
}

// takeAway takes a member away. Most of the time it leaves a majority.
func takeAway(do func(*simetcd.Cluster, int) string) func(*world, *Fault) {
	return func(w *world, f *Fault) {
		m := w.member(f)
		if others := w.away &^ (1 << m); others != 0 && f.Level < 0.8 {
			return
		}
		w.away |= 1 << m
		do(w.cluster, m)
	}
}

func bringBack(do func(*simetcd.Cluster, int) string) func(*world, *Fault) {
	return func(w *world, f *Fault) {
		w.away &^= 1 << w.member(f)
		do(w.cluster, w.member(f))
	}
}

func unlagMember(w *world, f *Fault) { w.cluster.Lag(w.member(f), 0) }

func lagMember(w *world, f *Fault) {
	w.cluster.Lag(w.member(f), time.Duration(f.Level*float64(w.s.TTL)))
}

// later does something, unless all faults are over by then.
func (w *world) later(after time.Duration, do func()) {
	time.AfterFunc(after, func() {
		w.step(func() {
			if !w.over {
				do()
			}
		})
	})
}

// step does something that no other step of a fault may come between. do must not wait for the
// bubble's clock: it stands still while another step waits for the lock.
func (w *world) step(do func()) {
	w.steps.Lock()
	defer w.steps.Unlock()
	do()
}

func (w *world) linkLater(after time.Duration, d *daemon, members []int, l *link) {
	w.later(after, func() { w.network.set(d.name, members, l) })
}

func (w *world) setLink(f *Fault, l *link) {
	w.member(f)
	w.network.set(w.daemon(f).name, f.Members, l)
}

func upLink(w *world, f *Fault)   { w.setLink(f, nil) }
func downLink(w *world, f *Fault) { w.setLink(f, &link{requestsLost: 1, answersLost: 1}) }
func outLost(w *world, f *Fault)  { w.setLink(f, &link{requestsLost: 1}) }
func inLost(w *world, f *Fault)   { w.setLink(f, &link{answersLost: 1}) }
func twiceLink(w *world, f *Fault) {
	w.setLink(f, &link{twice: 0.5, requestDelay: time.Duration(f.Level * float64(w.s.TTL) / 10)})
}

func lossyLink(w *world, f *Fault) {
	w.setLink(f, &link{requestsLost: f.Level / 2, answersLost: f.Level / 2})
}

func slowLink(w *world, f *Fault) {
	most := time.Duration(f.Level * float64(w.s.TTL))
	w.setLink(f, &link{requestDelay: most / 2, answerDelay: most})
}

// dyingLink is slow at first, and then down for as long as a renewal counts. An answer that takes
// longer than a fifth of the TTL is not waited for.
func dyingLink(w *world, f *Fault) {
	f.Members = []int{1, 2, 3}
	most := time.Duration(f.Level * float64(w.s.TTL) / 5)
	w.setLink(f, &link{answerDelay: most, leastDelay: 0.8})
	slow := w.s.TTL/4 + most
	w.later(slow, func() { downLink(w, f) })
	w.later(slow+w.s.TTL*5/4, func() { upLink(w, f) })
}

// replacedAfter is how long the guard takes to replace the elector: 300 ms at most, or, in some
// cases, longer than a renewal counts.
func (w *world) replacedAfter(level float64) time.Duration {
	if level < 0.7 {
		return time.Duration(level / 0.7 * 0.3 * float64(time.Second))
	}
	return time.Duration((level - 0.7) * 5 * float64(w.s.TTL))
}

func replaceElector(w *world, f *Fault) { w.daemon(f).replace(w.replacedAfter(f.Level)) }

// replaceReleasing replaces the elector while a request of it takes its time to arrive. Most of the
// time that is the request to delete its key, because its job fails, or because it is to stop.
func replaceReleasing(w *world, f *Fault) {
	d, part := w.daemon(f), math.Mod(10*f.Level, 1)
	f.Members = []int{1, 2, 3}
	w.setLink(f, &link{requestDelay: w.s.TTL / 2, leastDelay: 0.2})
	w.network.arm(d.name, func() {
		w.later(1, func() {
			w.network.set(d.name, f.Members, nil)
			d.replace(w.replacedAfter(part * 0.75))
		})
	})
	switch {
	case f.Level < 0.6:
		d.fail(0)
	case f.Level < 0.8:
		d.stop()
	}
}

func restartReleasing(w *world, f *Fault) {
	d := w.daemon(f)
	w.network.arm(d.name, nil)
	upLink(w, f)
	d.start()
}

// replaceStale does what staleOnly does, and replaces the elector so that the first renewals of the
// new one are what the deposed leader of etcd acknowledges.
func replaceStale(w *world, f *Fault) {
	staleOnly(w, f)
	d := w.daemon(f)
	after := time.Duration(f.Level * 0.1 * float64(w.s.TTL))
	w.later(max(0, f.Lasts-after), func() { d.replace(after + 1) })
}

// suspendedStale cuts a daemon off until its term is suspended, if its job can be frozen. Meanwhile
// another leader of etcd is elected. Then the former one goes on, and for a moment the daemon
// reaches it alone.
func suspendedStale(w *world, f *Fault) {
	pauseLeader(w, f)
	m, d := w.member(f), w.daemon(f)
	all, down := []int{1, 2, 3}, &link{requestsLost: 1, answersLost: 1}
	w.network.set(d.name, all, down)
	resumed := time.Duration((0.6 + 0.3*f.Level) * float64(w.s.TTL))
	w.linkLater(resumed-w.s.TTL/50, d, []int{m}, nil)
	w.later(resumed, func() { resumeMember(w, f) })
	w.linkLater(resumed+2*w.hear, d, []int{m}, down)
	w.linkLater(resumed+w.s.TTL*3/2, d, all, nil)
}

// suspendedTwice cuts a daemon off until its term is suspended, if its job can be frozen. Then it
// reaches etcd for about as long as a renewal needs, and no more for a while.
func suspendedTwice(w *world, f *Fault) {
	d, all, down := w.daemon(f), []int{1, 2, 3}, &link{requestsLost: 1, answersLost: 1}
	w.network.set(d.name, all, down)
	back := time.Duration((0.7 + 0.25*f.Level) * float64(w.s.TTL))
	w.linkLater(back, d, all, nil)
	w.linkLater(back+w.s.TTL*3/20, d, all, down)
	w.linkLater(back+2*w.s.TTL, d, all, nil)
}

// replaceWinning deletes the leader's key, and replaces the elector of the next one in the queue
// while it wins.
func replaceWinning(w *world, f *Fault) {
	queue := w.queue()
	if len(queue) < 2 {
		return
	}
	deleteKey(w, &Fault{Daemon: queue[0]})
	w.later(time.Duration(f.Level*float64(10*time.Millisecond)), func() {
		w.daemons[queue[1]].replace(w.replacedAfter(math.Mod(10*f.Level, 1)))
	})
}

func resetLink(w *world, f *Fault) {
	d := w.daemon(f)
	w.mu.Lock()
	defer w.mu.Unlock()
	if d.elector != nil {
		w.cluster.Disconnect(d.elector.client, w.member(f))
	}
}

func crashElector(w *world, f *Fault) { w.daemon(f).crash(false) }
func crashMachine(w *world, f *Fault) { w.daemon(f).crash(true) }
func stopDaemon(w *world, f *Fault)   { w.daemon(f).stop() }
func startDaemon(w *world, f *Fault)  { w.daemon(f).start() }

// failJob lets the job exit by itself, too often to be started again here.
func failJob(w *world, f *Fault) { w.daemon(f).fail(time.Duration(f.Level * float64(w.s.TTL))) }

func changeRate(w *world, f *Fault) {
	d := w.daemon(f)
	w.mu.Lock()
	defer w.mu.Unlock()
	d.clock.set(1 + maxDrift*(2*f.Level-1))
	if d.job != nil {
		d.job.serve()
	}
}
