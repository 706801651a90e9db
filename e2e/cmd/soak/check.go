//go:build linux

package main

import (
	"fmt"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"leasehold/e2e/harness"
)

// violation is a broken promise.
type violation struct {
	at         time.Duration
	what       string
	candidates []string // those involved; none: all
}

func (v *violation) Error() string { return v.what }

func (v *violation) involves(candidate string) bool {
	return len(v.candidates) == 0 || slices.Contains(v.candidates, candidate)
}

// event is one line of the time line.
type event struct {
	at   time.Duration
	text string
}

// term is what the witness saw of the job of one term.
type term struct {
	candidate string
	token     int64
	lives     []harness.Life
	first     time.Duration // its first instruction
	jobs      int           // how often its first process was started
	own       bool          // its job is one that ends by itself
}

// spans are when the term's job was alive, the living until now.
func (t *term) spans(now time.Duration) []span {
	var spans []span
	for _, l := range t.lives {
		spans = append(spans, span{l.Started, until(l, now)})
	}
	return merge(spans)
}

func until(l harness.Life, now time.Duration) time.Duration {
	if l.Alive() {
		return now
	}
	return l.End
}

func (t *term) alive() bool { return slices.ContainsFunc(t.lives, harness.Life.Alive) }

// end is when the last process of it ended; it must not be alive.
func (t *term) end() time.Duration {
	var end time.Duration
	for _, l := range t.lives {
		end = max(end, l.End)
	}
	return end
}

func (t *term) String() string {
	return fmt.Sprintf("job of %s, token %d", t.candidate, t.token)
}

// deed is a term taken away under its leader's feet, by an operator or by etcd.
type deed struct {
	at    time.Duration
	token int64 // 0: of whichever term it hit
	hit   bool  // that term's job was alive
	cause string
	until time.Duration // when two jobs can last begin to live at once by it
	// deaf: something may have kept the old leader from learning of it.
	deaf string
	// stalled is for how much of the time around it some process waited for a
	// processor; -1: not known yet.
	stalled float64
}

// class is what overlaps after it are counted as. On a starved machine they say
// little of leasehold: a job that has got its SIGKILL is seen dead only when it
// has got a processor to end on.
func (d *deed) class() class {
	switch {
	case d.deaf != "":
		return deafToDeed
	case d.stalled > 0.5:
		return starved
	}
	return afterDeed
}

// class is what an overlap is counted as.
type class string

const (
	afterDeed  class = "after an operator's deed, the old leader within reach"
	deafToDeed class = "after an operator's deed, the old leader out of reach"
	starved    class = "after an operator's deed, the machine starved"
	afterThaw  class = "after a thaw past the TTL, from the thaw on"
	guardLate  class = "the guard was later than its margin"
	unexcused  class = "outside of every exception"
)

// overlap is of two terms' jobs.
type overlap struct {
	earlier, later *term
	from           time.Duration
	lasted         time.Duration
	class          class
	judged         time.Duration // how much of it has been judged
}

// checker knows the promises. Everything in it is told as it happens.
type checker struct {
	settings
	began  time.Duration
	first  atomic.Pointer[violation]
	broken chan struct{} // closed with the first

	mu         sync.Mutex
	events     []event
	terms      []*term // not long over, in the order of their first instruction
	frozen     map[string][]span
	deeds      []deed
	overlaps   []*overlap // those found so far
	pairs      map[[2]*term]*overlap
	past       []span // lives that have been forgotten
	highest    int64  // token received by anyone
	yes        []*yes // answers of /leader to be explained
	counts     counts
	idles      map[int]bool // faults, by their place, that came to nothing
	mostLeases int
	killed     map[string]time.Duration // when a candidate's guard last got SIGKILL
	stopped    map[string]time.Duration // and SIGSTOP
	claimed    map[int64]time.Duration  // leases, by when /status last named them
	late       map[string][]float64     // /leader's 200 after a job's end, by its excuse, in ms after the end
	rises      []rise
	stale      []stale
	excused    map[class][]float64 // /status' "leading" after a deed, in ms after a higher token was received
	// log is what the last daemons of a candidate wrote.
	log      func(candidate string) string
	pressure pressure
	felt     time.Duration
	silent   []span // when no member of etcd answered a read
	// backoffs are when a leader said that its job had ended by itself and was to
	// be started again; backsOff has who said so last, and when.
	backoffs []span
	backsOff map[string]time.Duration
}

// counts are of checks and of what was seen.
type counts struct {
	Terms     int `json:"terms"`
	Jobs      int `json:"jobs"`
	Processes int `json:"processes"`
	Status    int `json:"status"`
	Leading   int `json:"status_leading"`
	Leader    int `json:"leader"`
	Yes       int `json:"leader_yes"`
	Untold    int `json:"leader_yes_untold"` // of jobs that were killed before the witness heard of them
	Leases    int `json:"leases"`
}

// yes is a 200 of /leader.
type yes struct {
	candidate      string
	sent, received time.Duration
	looked         int // how often a life was looked for that explains it
}

func newChecker(set settings) *checker {
	return &checker{
		settings: set, began: harness.Now(), broken: make(chan struct{}),
		frozen: map[string][]span{}, late: map[string][]float64{}, excused: map[class][]float64{}, pairs: map[[2]*term]*overlap{},
		killed: map[string]time.Duration{}, stopped: map[string]time.Duration{}, claimed: map[int64]time.Duration{}, backsOff: map[string]time.Duration{}, idles: map[int]bool{},
	}
}

// note puts a line into the time line.
func (k *checker) note(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noted(harness.Now(), format, args...)
}

func (k *checker) noted(at time.Duration, format string, args ...any) {
	k.events = append(k.events, event{at, fmt.Sprintf(format, args...)})
}

func (k *checker) eventsUntil(at time.Duration) []event {
	k.mu.Lock()
	defer k.mu.Unlock()
	events := slices.Clone(k.events)
	slices.SortStableFunc(events, func(a, b event) int { return int(a.at - b.at) })
	return slices.DeleteFunc(events, func(e event) bool { return e.at > at })
}

// violate reports a broken promise; only the first is kept.
func (k *checker) violate(candidates []string, format string, args ...any) {
	k.violateAt(harness.Now(), candidates, format, args...)
}

func (k *checker) violateAt(at time.Duration, candidates []string, format string, args ...any) {
	v := &violation{at: at, what: fmt.Sprintf(format, args...), candidates: candidates}
	if k.first.CompareAndSwap(nil, v) {
		close(k.broken)
	}
}

// idle is told of a fault that came to nothing.
func (k *checker) idle(fault int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.idles[fault] = true
}

// saw takes what the witness knew of all processes at a moment.
func (k *checker) saw(now time.Duration, lives []harness.Life) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range lives {
		t := k.termOf(l)
		i := slices.IndexFunc(t.lives, func(o harness.Life) bool { return o.Pid == l.Pid && o.Started == l.Started })
		if i < 0 {
			t.lives = append(t.lives, l)
			i = len(t.lives) - 1
			k.begun(t, l)
		} else if t.lives[i].Alive() {
			t.lives[i].End = l.End
		} else {
			continue
		}
		if !t.lives[i].Alive() && !t.alive() {
			k.noted(t.end(), "the %s, is dead", t)
		}
	}
	if now > k.felt+50*time.Millisecond {
		k.felt = now
		k.feel(now)
	}
	k.judge(now, false)
}

func (k *checker) termOf(l harness.Life) *term {
	i := slices.IndexFunc(k.terms, func(t *term) bool { return t.token == l.Token && t.candidate == l.Candidate })
	if i >= 0 {
		return k.terms[i]
	}
	t := &term{candidate: l.Candidate, token: l.Token, first: l.Started}
	k.terms = append(k.terms, t)
	k.counts.Terms++
	k.receives(l.Token)
	return t
}

// begun checks the order of the fencing tokens.
func (k *checker) begun(t *term, l harness.Life) {
	k.counts.Processes++
	if l.Role != "job" {
		return
	}
	k.counts.Jobs++
	t.jobs++
	t.own = slices.ContainsFunc(l.Args, isExit)
	k.noted(l.Started, "the %s, starts: pid %d%s", t, l.Pid, words(l.Args))
	for _, other := range k.terms {
		// The kernel rounds down, so that only a whole step earlier is earlier.
		for _, o := range other.lives {
			if o.Role != "job" || other == t {
				continue
			}
			inverted := o.Token > l.Token && o.Forked < l.Forked || o.Token < l.Token && o.Forked > l.Forked || o.Token == l.Token
			if !inverted {
				continue
			}
			earlier, later := t, other
			if o.Token < l.Token {
				earlier, later = other, t
			}
			at := max(o.Forked, l.Forked)
			// After a deed of etcd's own the candidate may not have said so yet.
			if c, why := k.classify(earlier, at); c == unexcused && k.deedOn(earlier.token, at) == nil {
				k.violate([]string{t.candidate, other.candidate},
					"the fencing tokens do not rise: the %s, started though the %s, had started before%s", earlier, later, why)
			}
		}
	}
}

func isExit(word string) bool { return len(word) > 5 && word[:5] == "exit=" }

func words(args []string) string {
	if len(args) < 2 {
		return ""
	}
	return fmt.Sprintf(", does %q", args[1:])
}

// remembered is how long a term that has ended is compared with others.
const remembered = 20 * time.Second

// judge looks for two jobs alive at once. At last, when no job lives and every
// daemon has said what it had to, nothing waits for a later look.
func (k *checker) judge(now time.Duration, last bool) {
	for i, later := range k.terms {
		for _, earlier := range k.terms[:i] {
			k.pair(earlier, later, now, last)
		}
	}
	k.explain(now, last)
	k.excuse(now, last)
	kept := k.terms[:0]
	for _, t := range k.terms {
		if t.alive() || t.end() > now-remembered {
			kept = append(kept, t)
			continue
		}
		k.past = append(k.past, k.awake(t, now)...)
	}
	clear(k.terms[len(kept):])
	k.terms = kept
	if len(k.past) > 1000 {
		k.past = merge(k.past)
	}
}

func (k *checker) pair(a, b *term, now time.Duration, last bool) {
	earlier, later := a, b
	if b.token < a.token {
		earlier, later = b, a
	}
	if !earlier.alive() && earlier.end() <= later.first || !later.alive() && later.end() <= earlier.first {
		return
	}
	shared := both(k.awake(earlier, now), k.awake(later, now))
	if len(shared) == 0 {
		return
	}
	o := k.pairs[[2]*term{earlier, later}]
	if o == nil {
		o = &overlap{earlier: earlier, later: later, from: shared[0].from}
		k.pairs[[2]*term{earlier, later}] = o
		k.overlaps = append(k.overlaps, o)
		k.noted(o.from, "OVERLAP: the %s, and the %s, both live", earlier, later)
	}
	o.lasted = total(shared)
	// A guard says how late it was when all is over, so wait for that, but not for ever.
	over := !earlier.alive() || !later.alive()
	early := !over && o.lasted < k.ttl || over && now < shared[len(shared)-1].to+200*time.Millisecond
	if o.lasted <= o.judged || early && !last {
		return
	}
	o.judged = o.lasted
	var why string
	o.class, why = k.classify(earlier, o.from)
	k.noted(now, "the overlap of the %s, and the %s, lasted %v: %s%s", earlier, later, o.lasted, o.class, why)
	bound := time.Duration(0)
	switch o.class {
	case afterDeed, deafToDeed, starved:
		bound = k.ttl
	case afterThaw:
		bound = k.margin()
		if o.lasted > bound && k.pressure.stalled(o.from-pressureAround, o.from+o.lasted+pressureAround) > 0.5 {
			o.class, bound = guardLate, k.ttl
		}
	case guardLate:
		bound = k.ttl
	}
	if o.lasted > bound {
		k.violate([]string{earlier.candidate, later.candidate}, "two jobs were alive for %v (%s%s): the %s, and the %s",
			o.lasted, o.class, why, earlier, later)
	}
}

// awake is when a term's job could run.
func (k *checker) awake(t *term, now time.Duration) []span {
	return without(t.spans(now), k.frozen[t.candidate])
}

// classify finds the exception under which the earlier term's job may have
// been alive at a moment together with a later one.
func (k *checker) classify(earlier *term, at time.Duration) (class, string) {
	if d := k.deedOn(earlier.token, at); d != nil && (d.token != 0 || d.deaf != "" || k.heard(earlier.candidate, at)) {
		switch c := d.class(); c {
		case deafToDeed:
			return c, fmt.Sprintf(" (%s; %s)", d.cause, d.deaf)
		case starved:
			return c, fmt.Sprintf(" (%s; processes waited for a processor %.0f %% of the time)", d.cause, 100*d.stalled)
		default:
			return c, fmt.Sprintf(" (%s)", d.cause)
		}
	}
	for _, f := range k.frozen[earlier.candidate] {
		if f.length() >= k.margin() && f.from >= earlier.first && f.to <= at && at <= f.to+k.margin() {
			return afterThaw, fmt.Sprintf(" (frozen for %v until %v before)", f.length(), at-f.to)
		}
	}
	// A guard that was stopped is no excuse: its elector stands in for it.
	if at, ever := k.stopped[earlier.candidate]; ever && at >= earlier.first {
		return unexcused, " (its guard had been stopped)"
	}
	for _, l := range latenessSince(k.log(earlier.candidate), k.wall(at), k.ttl) {
		if l > k.margin() {
			return guardLate, fmt.Sprintf(" (by %v)", l)
		}
	}
	return unexcused, ""
}

func (k *checker) deedOn(token int64, at time.Duration) *deed {
	var window *deed
	for i, d := range k.deeds {
		switch {
		case at < d.at || at > d.until:
		case d.token == token:
			return &k.deeds[i]
		case d.token == 0:
			window = &k.deeds[i]
		}
	}
	return window
}

// wall is what the wall clock shows at a moment, for the daemons' logs.
func (k *checker) wall(at time.Duration) time.Time { return time.Now().Add(at - harness.Now()) }

var lossPattern = regexp.MustCompile(`time=(\S+) .*(the lease|the leader's key) is gone from etcd`)

// heard tells if a candidate wrote, about that moment, that etcd had taken its
// term away: a deed of which nobody knows whom it hit excuses nobody else.
func (k *checker) heard(candidate string, at time.Duration) bool {
	around := k.wall(at)
	for _, m := range lossPattern.FindAllStringSubmatch(k.log(candidate), -1) {
		if written, err := time.Parse(time.RFC3339Nano, m[1]); err == nil && written.After(around.Add(-time.Second)) && written.Before(around.Add(k.ttl)) {
			return true
		}
	}
	return false
}

var latenessPattern = regexp.MustCompile(`time=(\S+) .*guard_lateness=(\S+)`)

// latenessSince is by how much a guard said to be late, where it said so within
// a time after that moment: it does when the job is dead. A second is for the log.
func latenessSince(log string, at time.Time, within time.Duration) []time.Duration {
	var late []time.Duration
	for _, m := range latenessPattern.FindAllStringSubmatch(log, -1) {
		written, errTime := time.Parse(time.RFC3339Nano, m[1])
		by, err := time.ParseDuration(m[2])
		if errTime == nil && err == nil && written.After(at.Add(-time.Second)) && written.Before(at.Add(within+time.Second)) {
			late = append(late, by)
		}
	}
	return late
}

// forever is the end of what lasts still.
const forever = time.Duration(1<<63 - 1)

// freezes is told when a candidate has been frozen, thaws before it is thawed.
func (k *checker) freezes(candidate string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.frozen[candidate] = append(k.frozen[candidate], span{harness.Now(), forever})
}

func (k *checker) thaws(candidate string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.frozen[candidate][len(k.frozen[candidate])-1].to = harness.Now()
}

// stops is told before a candidate's guard gets SIGSTOP.
func (k *checker) stops(candidate string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.stopped[candidate] = harness.Now()
}

// kills is told before a candidate's guard gets SIGKILL.
func (k *checker) kills(candidate string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.killed[candidate] = harness.Now()
}

// did is told before the deed is done, and returns its number.
func (k *checker) did(d deed) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.terms {
		d.hit = d.hit || t.token == d.token && t.alive()
	}
	d.stalled = -1
	k.deeds = append(k.deeds, d)
	return len(k.deeds) - 1
}

// worked is told when etcd has said that the deed is done. By then the old
// leader, wherever it is, has renewed its lease for the last time.
func (k *checker) worked(number int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.deeds[number].until = harness.Now() + k.ttl
}

// leading names the candidate whose job lives, or "".
func (k *checker) leading() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range slices.Backward(k.terms) {
		if t.alive() {
			return t.candidate
		}
	}
	return ""
}

// backedOff is for how much of a time a leader waited to start a job again that
// had ended by itself.
func (k *checker) backedOff(of span) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return total(both([]span{of}, merge(k.backoffs)))
}

// aliveSince is the first moment after the given one at which a job could run,
// if there is one by now.
func (k *checker) aliveSince(at time.Duration) (time.Duration, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	first, found := forever, false
	for _, t := range k.terms {
		for _, s := range without(t.spans(harness.Now()), k.frozen[t.candidate]) {
			if s.to > at {
				first, found = min(first, max(s.from, at)), true
			}
		}
	}
	return first, found
}
