//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"leasehold/e2e/check"
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

// overlap is of two terms' jobs.
type overlap struct {
	check.Overlap
	from   time.Duration
	class  class
	judged time.Duration // how much of it has been judged
}

func (o *overlap) lasted() time.Duration { return o.During.Total() }

// checker knows the promises. Everything in it is told as it happens.
type checker struct {
	settings
	began  time.Duration
	log    func(candidate string) string // what the last daemons of a candidate wrote
	first  atomic.Pointer[violation]
	broken func(error) // is told of the first

	mu       sync.Mutex
	events   []event
	counts   counts
	terms    check.History
	overlaps map[[2]int64]*overlap // by tokens
	excuses  excuses
	health   health
	leases   leases
	kept     []*kept
	held     []*held
	unserved time.Duration // when a switchover was last not served in time
	said     []claimed
	chosen   []choice
	shown    shown
	// failbacks are when there were any.
	failbacks []time.Duration
	frozen    []*frozenJob
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
	// Untold are of jobs that were killed before the witness heard of them.
	Untold int `json:"leader_yes_untold"`
	Leases int `json:"leases"`
	// Kept are of jobs that lost their elector, and nothing else was wrong. KeptStarved are those
	// whose next elector came too late, on a starved machine.
	Kept        int `json:"jobs_kept"`
	KeptStarved int `json:"jobs_not_kept_starved"`
	// Frozen are of jobs on loss of contact. KilledFrozen are those that were not thawed. Of
	// UnknownFrozen the looks came too late to tell.
	Frozen        int `json:"jobs_frozen"`
	KilledFrozen  int `json:"jobs_killed_frozen"`
	UnknownFrozen int `json:"jobs_killed_frozen_or_thawed"`
	// FrozenYes are of jobs that were frozen, on a starved machine.
	FrozenYes int `json:"leader_yes_frozen_starved"`
	// Steered is what has come of an operator's commands.
	Steered steered `json:"commands"`
	// Transitions that daemons logged, by state machine.
	Transitions check.Counts `json:"transitions"`
}

func newChecker(set settings) *checker {
	now := harness.Now()
	return &checker{
		settings: set, began: now, broken: func(error) {}, overlaps: map[[2]int64]*overlap{},
		excuses: excuses{
			frozen: map[string]check.Intervals{}, last: map[[2]string]time.Duration{},
		},
		health: health{
			backsOff: map[string]time.Duration{},
			late:     map[string][]float64{}, excused: map[class][]float64{},
		},
		leases: leases{looked: now, claims: map[string]claim{}},
		shown:  newShown(),
		counts: counts{Transitions: check.Counts{}},
	}
}

// note puts a line into the time line.
func (k *checker) note(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noteAt(harness.Now(), format, args...)
}

func (k *checker) noteAt(at time.Duration, format string, args ...any) {
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
		k.broken(v)
	}
}

// clock is a moment as the time line shows it.
func (k *checker) clock(at time.Duration) string {
	return fmt.Sprintf("%+9.3fs", (at - k.began).Seconds())
}

// wall is what the wall clock shows at a moment, for the daemons' logs.
func (k *checker) wall(at time.Duration) time.Time { return time.Now().Add(at - harness.Now()) }

// saw takes what the witness knew of all processes at a moment.
func (k *checker) saw(now time.Duration, lives []harness.Life) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range lives {
		t, isNew := k.terms.Add(l)
		if isNew {
			k.start(t, l)
		}
		if !l.Alive() && !t.Alive() {
			k.noteAt(t.End, "the %v, has exited", t)
		}
	}
	k.excuses.sample(now)
	k.judge(now, false)
}

// start takes a process that the witness has not known, and checks the order of the fencing tokens.
func (k *checker) start(t *check.Term, l harness.Life) {
	if k.counts.Processes++; len(t.Lives) == 1 {
		k.counts.Terms++
		k.health.receives(l.Token)
	}
	if l.Role != "job" {
		return
	}
	k.counts.Jobs++
	does := ""
	if len(l.Args) > 1 {
		does = fmt.Sprintf(", does %q", l.Args[1:])
	}
	k.noteAt(l.Started, "the %v, starts: pid %d%s", t, l.Pid, does)
	for _, other := range k.terms {
		for _, o := range other.Lives {
			// The kernel rounds down, so that only a whole step earlier is earlier.
			inverted := o.Token == l.Token || o.Token > l.Token && o.Forked < l.Forked ||
				o.Token < l.Token && o.Forked > l.Forked
			if other == t || o.Role != "job" || !inverted {
				continue
			}
			earlier, later := t, other
			if o.Token < l.Token {
				earlier, later = other, t
			}
			at := max(o.Forked, l.Forked)
			// After an action of etcd's own the candidate may not have said so yet.
			c, why := k.classify(earlier, at)
			if c == unexcused && k.excuses.actionOn(earlier.Token, at) == nil {
				k.violate([]string{t.Candidate, other.Candidate},
					"the fencing tokens do not rise: the %v, started "+
						"though the %v, had started before%s",
					earlier, later, why)
			}
		}
	}
}

// endsByItself reports whether the job of a term is one that does.
func endsByItself(t *check.Term) bool {
	return slices.ContainsFunc(t.Lives, func(l harness.Life) bool {
		return strings.Contains(strings.Join(l.Args, " "), " exit=")
	})
}

// awake is when a term's job could run.
func (k *checker) awake(now time.Duration) func(*check.Term) check.Intervals {
	return func(t *check.Term) check.Intervals {
		return t.Intervals(now).Without(k.excuses.frozen[t.Candidate]).Without(k.frozenIn(t))
	}
}

// since are the terms whose jobs lived after a moment.
func (k *checker) since(at time.Duration) check.History {
	return slices.DeleteFunc(slices.Clone(k.terms), func(t *check.Term) bool {
		return !t.Alive() && t.End <= at
	})
}

// remembered is how long a term that is over is compared with others.
const remembered = 20 * time.Second

// judge looks for two jobs alive at once. At last, when no job lives and every daemon has said what
// it had to, nothing waits for a later look.
func (k *checker) judge(now time.Duration, last bool) {
	for _, both := range k.since(now - remembered).Overlaps(k.awake(now)) {
		k.judgeOverlap(both, now, last)
	}
	k.judgeHeld(now)
	k.judgeShown(now)
	k.judgeSaid(now)
	k.judgeChosen(now, last)
	k.judgeKept(now, last)
	k.judgeFrozen(now, last)
	k.explain(now, last)
	k.excuse(now, last)
}

func (k *checker) judgeOverlap(both check.Overlap, now time.Duration, last bool) {
	earlier, later := both.Earlier, both.Later
	key := [2]int64{earlier.Token, later.Token}
	o := k.overlaps[key]
	if o == nil {
		o = &overlap{from: both.During[0].From}
		k.overlaps[key] = o
		k.noteAt(o.from, "OVERLAP: the %v, and the %v, both live", earlier, later)
	}
	o.Overlap = both
	// A guard says how late it was when all is over, so wait for that, but not for ever.
	end, over := both.During[len(both.During)-1].To, !earlier.Alive() || !later.Alive()
	early := !over && o.lasted() < k.ttl || over && now < end+time.Second
	if o.lasted() <= o.judged || early && !last {
		return
	}
	o.judged = o.lasted()
	var why string
	o.class, why = k.classify(earlier, o.from)
	k.noteAt(now, "%v: %s%s", both, o.class, why)
	if o.class == afterThaw && o.lasted() > k.margin() &&
		k.excuses.stalled(o.from, o.from+o.lasted()) > 0.5 {
		o.class = slowThaw
	}
	bound := k.bound(o.class)
	if o.class == guardLate { // the next leader waits for the margin, the job needs time to end
		bound = k.killedLate(earlier) + k.margin()
	}
	if o.lasted() > bound {
		k.violate([]string{earlier.Candidate, later.Candidate},
			"two jobs were alive for %v (%s%s): the %v, and the %v",
			o.lasted(), o.class, why, earlier, later)
	}
}

// leading names the candidate whose job lives, or "".
func (k *checker) leading() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range slices.Backward(k.terms) {
		if t.Alive() {
			return t.Candidate
		}
	}
	return ""
}

// jobOf returns the token of the job that a candidate runs, and when that was started; 0, 0: none.
func (k *checker) jobOf(candidate string) (token int64, started time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.terms {
		for _, l := range t.Lives {
			if t.Candidate == candidate && l.Role == "job" && l.Alive() {
				token, started = t.Token, l.Started
			}
		}
	}
	return token, started
}

// jobAfter is how long after a moment a job could run, or none could by now. Where a leader waits
// to start a job again that crashes all the time, that is the job's doing: it does not count.
func (k *checker) jobAfter(at time.Duration) (took time.Duration, found bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	until := check.Interval{From: at, To: harness.Now()}
	lived := check.Intervals{until}.Without(k.downtime(until))
	if found = len(lived) > 0; found {
		until.To = lived[0].From
	}
	return until.Length() - within(k.health.backoffs, until), found
}

// downtime is when no job could run.
func (k *checker) downtime(of check.Interval) check.Intervals {
	return k.since(of.From).Downtime(of, k.awake(of.To))
}

// within is how much of a time some intervals take.
func within(all check.Intervals, of check.Interval) time.Duration {
	return check.Merge(all...).And(check.Intervals{of}).Total()
}
