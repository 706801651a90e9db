//go:build linux

package main

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"leasehold/control"
	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// steered is what has come of the operator's commands.
type steered struct {
	Commands map[string]*outcomes `json:"-"` // by kind
	// HeldFor is how long the election was held in all, in ms.
	HeldFor float64 `json:"held_ms"`
	// Accepted are requests for a switchover that a leader has accepted. All those terms ended.
	Accepted  int `json:"switchovers_accepted"`
	Failbacks int `json:"failbacks"`
	// Missed is how often changes in etcd were compacted before they were seen.
	Missed int `json:"changes_missed"`

	stopped  []float64 // ms from a hold with --stop until no job ran
	switched []float64 // ms that a switchover took
	silent   []float64 // ms since a target's last renewal, when it was chosen
	released []float64 // ms from a release until a job ran, while nothing else was wrong
}

// outcomes are what commands of a kind came to. Those that are none of it came to nothing.
type outcomes struct {
	Done     int `json:"done"`
	Refused  int `json:"refused"`
	Unserved int `json:"not_served"`
}

func (s *steered) of(kind string) *outcomes {
	if s.Commands == nil {
		s.Commands = map[string]*outcomes{}
	}
	if s.Commands[kind] == nil {
		s.Commands[kind] = &outcomes{}
	}
	return s.Commands[kind]
}

// does counts a command that was carried out.
func (k *checker) does(kind string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Steered.of(kind).Done++
}

// returned is told how long after a release a job ran.
func (k *checker) returned(took time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Steered.released = append(k.counts.Steered.released, harness.Milliseconds(took))
}

// held is a hold, from when it was there until its release was asked for.
type held struct {
	made     int64 // the revision of etcd
	token    int64 // of the leader that goes on
	stop     bool  // it does not
	from, to time.Duration
	stopsIn  time.Duration // with stop: within what time the job must have ended
	judged   bool
}

// holds is told of a hold that is there.
func (k *checker) holds(h *held) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h.stopsIn = cmp.Or(h.stopsIn, k.ttl+stopGrace+time.Second)
	k.held = append(k.held, h)
}

// releases is told that the hold is about to be released.
func (k *checker) releases(h *held) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if h.from != 0 {
		k.counts.Steered.HeldFor += harness.Milliseconds(
			max(0, min(h.to, harness.Now())-h.from))
	}
	h.to = min(h.to, harness.Now())
}

// holdGone is told that etcd has had no hold since a revision.
func (k *checker) holdGone(now time.Duration, revision int64) {
	for _, h := range k.held {
		if h.made < revision && now < h.to {
			k.violateAt(now, nil, "the hold that was there from %s on is gone, and nobody has "+
				"released it", k.clock(h.from))
		}
	}
}

// judgeHeld looks for jobs that have started in spite of a hold, or run in spite of one that is to
// stop them.
func (k *checker) judgeHeld(now time.Duration) {
	for _, h := range k.held {
		for _, t := range k.since(h.from) {
			for _, l := range t.Lives {
				if l.Role == "job" && t.Token != h.token && h.from < l.Forked && l.Started < h.to {
					k.violateAt(l.Started, []string{t.Candidate}, "the %v, started %v after the "+
						"election was held, and the hold names the token %d",
						t, l.Forked-h.from, h.token)
				}
			}
		}
		k.judgeStopped(h, now)
	}
	k.held = slices.DeleteFunc(k.held, func(h *held) bool { return h.to < now-remembered })
}

// judgeStopped looks whether a hold has stopped the job in time. A frozen job, and one on a machine
// that stands still, stops only when it goes on.
func (k *checker) judgeStopped(h *held, now time.Duration) {
	until := min(now, h.to)
	if !h.stop || h.judged || until < h.from {
		return
	}
	h.judged = h.to < now-time.Second
	end, of := h.from, (*check.Term)(nil) // of the last job that ran
	for _, t := range k.since(h.from) {
		ran := k.awake(until)(t).And(check.Intervals{{From: h.from, To: until}})
		for _, f := range append(slices.Clone(k.excuses.frozen[t.Candidate]), k.frozenIn(t)...) {
			if f.To < until {
				f.To += stopGrace + time.Second
			}
			ran = ran.Without(check.Intervals{f})
		}
		if n := len(ran); n > 0 && ran[n-1].To > end {
			end, of = ran[n-1].To, t
		}
	}
	late := end - h.from - h.stopsIn
	if late > 0 && !k.excuses.starved(h.from, end, k.margin()) {
		k.violateAt(end, []string{of.Candidate}, "the %v, ran %v after the election was held to "+
			"stop it", of, end-h.from)
	}
	if h.judged && end < until {
		k.counts.Steered.stopped = append(k.counts.Steered.stopped,
			harness.Milliseconds(end-h.from))
	}
}

// askedFor is told of a request for a switchover, as etcd has it now.
func (k *checker) askedFor(now time.Duration, a control.Switchover) {
	r := k.shown.requests[a.ID]
	switch {
	case r == nil:
		r = &request{Switchover: a, asked: now}
		k.shown.requests[a.ID] = r
		if a.Answer == "" {
			return
		}
	case a.Answer == r.Answer: // another leader is asked
		r.Switchover = a
		return
	case r.Answer != "":
		k.violateAt(now, nil, "a switchover that was asked for by %s was %s, and later %s", a.By,
			r.Answer, a.Answer)
	case r.over:
		k.violateAt(now, nil, "a switchover that was asked for by %s was %s after it was withdrawn",
			a.By, a.Answer)
	}
	if r.Switchover, r.answered = a, now; a.Answer != control.Accepted {
		return
	}
	k.counts.Steered.Accepted++
	target := k.shown.queue[a.Key]
	if target == nil {
		k.noteAt(now, "  a switchover is accepted, to %s, which has left the queue", a.Key)
		return
	}
	if a.To != "" && a.To != target.identity {
		k.violateAt(now, nil, "a switchover to %s is accepted, and %s was chosen", a.To,
			target.identity)
	}
	late := k.shown.isLate(now)
	if k.noteAt(now, "  a switchover is accepted, to %s; etcd's watch is late: %v",
		target.identity, late); !late {
		k.chosen = append(k.chosen, choice{now, "a switchover", target})
	}
}

// choice is a candidate to which a leader hands over.
type choice struct {
	at     time.Duration
	what   string
	target *entry
}

// judgeChosen judges, when all is known of that time, that whoever was chosen had renewed its lease
// lately. etcd says so in whole seconds. A new leader of etcd takes all leases for renewed. If etcd
// was silent, the leader may have chosen long before it could say so.
func (k *checker) judgeChosen(now time.Duration, last bool) {
	k.chosen = slices.DeleteFunc(k.chosen, func(c choice) bool {
		if now < c.at+settles && !last {
			return false
		}
		lease := c.target.lease()
		renewed, known := k.leases.renewedBefore(lease, c.at, k.ttl)
		silent := within(k.leases.silent, check.Interval{From: c.at - k.ttl, To: c.at + settles})
		k.noteAt(c.at, "  %s goes to %s, lease %s, last renewed at %s: %v; etcd was silent for %v",
			c.what, c.target.identity, lease, k.clock(renewed), known, silent)
		if !known || silent > 0 {
			return true
		}
		since := c.at - renewed
		k.counts.Steered.silent = append(k.counts.Steered.silent, harness.Milliseconds(since))
		for _, reset := range k.leases.resets {
			if reset <= c.at+settles {
				since = min(since, c.at-reset)
			}
		}
		if since > k.ttl-time.Second+chosenFor && !k.excuses.starved(renewed, c.at, k.margin()) {
			k.violateAt(c.at, []string{c.target.identity}, "%s goes to %s, whose lease %s was not "+
				"renewed for %v", c.what, c.target.identity, lease, since)
		}
		return true
	})
}

const (
	// chosenFor is how long a leader may need to stop for a candidate that it has found alive.
	chosenFor = 500 * time.Millisecond
	// endsWithin is how much longer than a TTL and the job's grace the end of a term may take after
	// a switchover is accepted: if the leader is lost then, its lease has to expire.
	endsWithin = 3 * time.Second
)

// isCalm reports whether etcd has answered each read since a moment, and the machine had
// processors for all.
func (k *checker) isCalm(since time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := harness.Now()
	return within(k.leases.silent, check.Interval{From: since, To: now}) == 0 &&
		!k.excuses.starved(since, now, k.margin())
}

// judgeShown looks whether what etcd has shown has come to an end in time.
func (k *checker) judgeShown(now time.Duration) {
	s := &k.shown
	if s.isLate(now) || now > s.heard+silence {
		return
	}
	now = s.complete
	for _, r := range s.requests {
		switch {
		case r.Answer == control.Accepted && !r.served:
			t := s.term(r.Token)
			if r.served = t == nil || t.gone != 0; r.served {
				continue
			}
			since := now - max(r.answered, s.lagged(), k.leases.reset)
			if since > k.ttl+stopGrace+endsWithin {
				k.violateAt(now, []string{t.identity}, "%s has accepted a switchover, and still "+
					"leads %v after that, token %d", t.identity, since, r.Token)
			}
		case r.Answer == "" && !r.over:
			since := now - max(r.asked, s.lagged(), k.leases.reset)
			if since > switchTimeout+time.Second+endsWithin {
				k.violateAt(now, nil, "a request for a switchover is there after %v, and nobody "+
					"has answered it", since)
			}
		}
	}
}

// termEnded is told why a term has ended, by the history.
func (k *checker) termEnded(t control.Term) {
	s := &k.shown
	e := s.term(t.Token)
	if e == nil {
		return
	}
	switch t.Why {
	case "held":
		mayEnd := slices.ContainsFunc(s.holds, func(h *shownHold) bool {
			overlaps := (h.gone == 0 || h.gone > e.first) && (e.gone == 0 || h.made < e.gone)
			return overlaps && (h.Stop || h.Token != e.token)
		})
		if !mayEnd && !s.hasGap(e.led, check.Forever) {
			k.violate([]string{e.identity}, "the term of %s, token %d, has ended because of a "+
				"hold, and every hold lets it go on", e.identity, e.token)
		}
	case "switchover":
		for _, r := range s.requests {
			if r.Token == t.Token && r.Answer == control.Accepted {
				k.handedOver(e, s.queue[r.Key])
			}
		}
	}
}

// handedOver judges that a leader which has handed over itself has done so to the candidate that it
// had chosen, if that is still there and was ready.
func (k *checker) handedOver(e, chosen *entry) {
	s := &k.shown
	byOwn := e.gone != 0 && e.exited && e.next != nil
	if chosen == nil || !byOwn || e.next.identity == chosen.identity {
		return
	}
	if s.queue[chosen.key] == chosen && s.isReady(chosen, e.gone) {
		k.violate([]string{e.identity, chosen.identity}, "%s, token %d, has handed over to %s, "+
			"and %s leads", e.identity, e.token, chosen.identity, e.next.identity)
	}
}

// isReady reports whether a candidate said so last before a revision.
func (s *shown) isReady(e *entry, revision int64) (ready bool) {
	for _, r := range s.records[e.lease()] {
		if r.revision <= revision {
			ready = r.Ready
		}
	}
	return ready
}

// answered takes what a switchover came to. One that is refused ends no term.
func (k *checker) answered(
	i *injection, code int, said string, began time.Time, handovers func() []check.Entry,
) error {
	ended := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	late := k.unserved != 0 && harness.Now()-k.unserved < lateAnswer
	came := k.counts.Steered.of(i.name)
	switch {
	case code == 0:
		came.Done++
		k.counts.Steered.switched = append(k.counts.Steered.switched,
			harness.Milliseconds(ended.Sub(began)))
		k.said = append(k.said, claimed{at: harness.Now(), said: said, to: i.switchesTo()})
	case code == 75:
		came.Unserved++
		k.unserved = harness.Now()
	case code == 1 && refusals.MatchString(said):
		came.Refused++
		if done := check.Between(handovers(), began, ended); len(done) > 0 && !late {
			k.violate(nil, "a switchover was refused (%s), and a leader handed over to %s",
				said, done[0].Match)
		}
	case code == 1 && i.switchesTo() != "" && otherLeads.MatchString(said):
		came.Done++
	case code == 1 && withdrawn.MatchString(said):
		came.Unserved++
		k.unserved = harness.Now()
	case code != 69: // that is: etcd does not answer
		k.violate(nil, "a switchover has ended with %d, and says: %s", code, said)
	default:
		k.unserved = harness.Now()
		return fmt.Errorf("it ended with %d: %s", code, said)
	}
	return nil
}

// These are what a switchover says that ends with 1.
var (
	refusals = regexp.MustCompile(`: refused: (?:nobody waits$|nobody that waits is ready$|` +
		`there is no candidate$|there is no candidate "[^"]*" that waits$|` +
		`"[^"]*" is not ready$|"[^"]*" has not renewed its lease for a while$|` +
		`the next in line, "[^"]*", has no record: |ahead of "[^"]*" wait others that can't be |` +
		`this candidate is not the first in the queue$|the election is held by |` +
		`.* has asked for a switchover to )`)
	// Another candidate leads than was asked for.
	otherLeads = regexp.MustCompile(`"[^"]*" has gone meanwhile: "[^"]*" leads, token \d+$`)
	// A hold came when the leader had handed over; the command's lease has expired in an outage.
	withdrawn = regexp.MustCompile(`: nobody leads: the election is held by ` +
		`|: somebody has withdrawn the request$`)
)

// claimed is what a switchover said that has happened.
type claimed struct {
	at       time.Duration
	said, to string // to: who was asked for; "": anybody
}

// nowLeads is what a switchover prints.
var nowLeads = regexp.MustCompile(`"([^"]*)" leads(?: already)?, token (\d+)`)

// judgeSaid judges, when etcd has shown it, that the candidate leads of whom a switchover says so.
func (k *checker) judgeSaid(now time.Duration) {
	s := &k.shown
	k.said = slices.DeleteFunc(k.said, func(c claimed) bool {
		if s.complete <= c.at {
			return false
		}
		m := nowLeads.FindStringSubmatch(c.said)
		if m == nil {
			k.violateAt(c.at, nil, "a switchover has ended with 0, and says: %s", c.said)
			return true
		}
		token, _ := strconv.ParseInt(m[2], 10, 64)
		led := s.term(token)
		switch {
		case s.hasGap(c.at-remembered, now):
		case led == nil || led.identity != m[1]:
			k.violateAt(c.at, nil, "a switchover says that %s leads, token %d, and etcd has shown "+
				"no such leader", m[1], token)
		case c.to != "" && c.to != led.identity:
			k.violateAt(c.at, nil, "a switchover to %s says that %s leads", c.to, led.identity)
		}
		return true
	})
}

// failedBack takes the failbacks of a daemon, by its log. Each goes to a candidate that is alive
// and has a higher priority, and the next one is not before its time.
func (k *checker) failedBack(candidate, setting, log string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range check.Failbacks(log) {
		at := harness.Now() - time.Since(f.At)
		k.counts.Steered.Failbacks++
		k.noteAt(at, "  a failback from %s to %s", candidate, f.Match)
		if setting != failback.String() {
			k.violateAt(at, []string{candidate}, "a failback from %s to %s, and it may make none",
				candidate, f.Match)
		}
		k.judgeFailback(candidate, f.Match, at)
		least := max(failback, 2*k.ttl)
		for _, other := range k.failbacks {
			apart := (at - other).Abs()
			if apart < least-time.Second {
				k.violateAt(at, []string{candidate}, "a failback from %s to %s, and another one "+
					"was %v before or after it", candidate, f.Match, apart)
			}
		}
		k.failbacks = append(k.failbacks, at)
	}
}

func (k *checker) judgeFailback(from, to string, at time.Duration) {
	s := &k.shown
	around := check.Interval{From: at - k.ttl - settles, To: at + settles}
	late := func(lag time.Duration) bool { return at-failback < lag && lag < at+settles }
	if s.hasGap(at-remembered, at+remembered) || slices.ContainsFunc(s.lags, late) {
		return
	}
	var leader *entry
	for _, e := range s.heads {
		if e.identity == from && e.led <= at {
			leader = e
		}
	}
	if leader == nil {
		return // etcd's watch was late
	}
	known, higher := false, false
	var target *entry
	for _, e := range s.entries {
		if e.identity != to || e.from > around.To || e.to != 0 && e.to < at-settles {
			continue
		}
		for _, a := range s.inForce(e.lease(), around) {
			for _, b := range s.inForce(leader.lease(), around) {
				known = true
				if a.Priority > b.Priority && s.records[e.lease()][0].at <= at-failback {
					higher, target = true, e
				}
			}
		}
	}
	switch {
	case !known:
		k.noteAt(at, "  the priorities of %s and %s are not known", from, to)
	case !higher:
		k.violateAt(at, []string{from, to}, "a failback from %s, token %d, to %s, which has not "+
			"had a higher priority for %v", from, leader.token, to, failback)
	default:
		k.chosen = append(k.chosen, choice{at, "a failback", target})
		k.handedOver(leader, target)
	}
}
