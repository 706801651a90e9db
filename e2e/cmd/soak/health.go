//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

const (
	askEvery = 40 * time.Millisecond
	// A daemon that hangs answers when it goes on, so questions wait for it; those that were sent
	// while it hung are the most telling.
	askTimeout = 10 * time.Second
	askAtOnce  = 8
)

// ask asks a candidate for /leader and /status all the time, whoever answers there, until ctx ends.
func (k *checker) ask(ctx context.Context, candidate, addr string) {
	transport := &http.Transport{MaxIdleConnsPerHost: 2, DisableCompression: true}
	client := &http.Client{Timeout: askTimeout, Transport: transport}
	defer client.CloseIdleConnections()
	var asking sync.WaitGroup
	defer asking.Wait()
	var waiting atomic.Int64
	for n := 0; harness.Wait(ctx, askEvery) == nil; n++ {
		// While questions hang, few more are sent.
		if w := waiting.Load(); w == askAtOnce || w > 2 && n%16 != 0 {
			continue
		}
		waiting.Add(1)
		asking.Go(func() {
			defer waiting.Add(-1)
			sent := harness.Now()
			if code, _, err := get(ctx, client, "http://"+addr+"/leader"); err == nil {
				k.answeredLeader(candidate, sent, code)
			}
			sent = harness.Now()
			code, body, err := get(ctx, client, "http://"+addr+"/status")
			if err == nil && code == http.StatusOK {
				k.answeredStatus(candidate, sent, body)
			}
		})
	}
}

func get(ctx context.Context, client *http.Client, url string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// health is what candidates said of themselves.
type health struct {
	rises []rise // of the highest token received by anyone
	yes   []*yes // answers of /leader to be explained
	stale []stale
	// backoffs are when a leader said that its job had ended by itself and was to be started again;
	// backsOff has who said so last, and when.
	backoffs check.Intervals
	backsOff map[string]time.Duration
	// late are /leader's 200 after a job's end, by excuse, in ms after the end.
	late map[string][]float64
	// excused are /status's "leading" after an action, in ms after a higher token was received.
	excused map[class][]float64
}

// rise is when a token was received that is higher than all before it.
type rise struct {
	token int64
	at    time.Duration
}

// yes is a 200 of /leader.
type yes struct {
	candidate      string
	sent, received time.Duration
	looked         int // how often a life was looked for that explains it
}

// stale is a "leading" of /status with a token lower than one received before, after an action that
// may excuse it.
type stale struct {
	candidate    string
	token        int64
	sent, higher time.Duration
}

func (h *health) receives(token int64) {
	if n := len(h.rises); n == 0 || token > h.rises[n-1].token {
		h.rises = append(h.rises, rise{token, harness.Now()})
	}
}

// status is what the checker reads of /status.
type status struct {
	State  string
	Leader *struct{ Token int64 }
	Lease  *struct {
		ID       string
		ValidFor float64 `json:"valid_for_seconds"`
	}
	Job *struct{ State string }
}

// answeredStatus checks that nobody says to lead with a token lower than one that had been received
// before the question was sent.
func (k *checker) answeredStatus(candidate string, sent time.Duration, body []byte) {
	var s status
	if err := json.Unmarshal(body, &s); err != nil {
		k.violate([]string{candidate}, "/status of %s is no JSON: %v: %s", candidate, err, body)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Status++
	if s.Lease != nil {
		k.leases.claim(s.Lease.ID, sent+time.Duration(s.Lease.ValidFor*float64(time.Second)))
	}
	backsOff := s.State == "leading" && s.Job != nil && s.Job.State == "backoff"
	if since := k.health.backsOff[candidate]; backsOff && since != 0 {
		k.health.backoffs = append(k.health.backoffs, check.Interval{From: since, To: sent})
	}
	delete(k.health.backsOff, candidate)
	if backsOff {
		k.health.backsOff[candidate] = sent
	}
	if s.Leader == nil {
		return
	}
	token := s.Leader.Token
	k.health.receives(token)
	if s.State != "leading" {
		return
	}
	k.counts.Leading++
	higher := slices.IndexFunc(k.health.rises, func(r rise) bool { return r.token > token })
	if higher < 0 || k.health.rises[higher].at >= sent {
		return
	}
	r := k.health.rises[higher]
	if a := k.excuses.actionOn(token, sent); a != nil && sent < a.at+k.ttl {
		k.health.stale = append(k.health.stale, stale{candidate, token, sent, r.at})
		return
	}
	k.violate([]string{candidate}, "/status of %s, asked at %v, says leading with token %d, "+
		"after token %d had been received: %s", candidate, sent-k.began, token, r.token, body)
}

// excuse puts what is stale under the class of its action. A leader within reach of etcd that an
// operator's action hit has no excuse for longer than until the next renewal, which tells at the
// latest.
func (k *checker) excuse(now time.Duration, over bool) {
	k.health.stale = slices.DeleteFunc(k.health.stale, func(s stale) bool {
		if !over && now < s.sent+2*around {
			return false
		}
		a := k.excuses.actionOn(s.token, s.sent)
		c, _ := k.excuses.after(a)
		after := s.sent - s.higher
		if c == afterAction && k.excuses.stalled(s.higher, s.sent) > 0.5 {
			c = starved
		}
		k.health.excused[c] = append(k.health.excused[c], harness.Milliseconds(after))
		if c == afterAction && a.token != 0 && after > k.ttl/5+noticedIn {
			k.violate([]string{s.candidate}, "/status of %s, asked at %v, says leading with "+
				"token %d, %v after a higher one had been received (%s, and etcd was within reach)",
				s.candidate, s.sent-k.began, s.token, after, a.cause)
		}
		return true
	})
}

func (k *checker) answeredLeader(candidate string, sent time.Duration, code int) {
	received := harness.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Leader++
	if code == http.StatusOK {
		k.counts.Yes++
		y := &yes{candidate: candidate, sent: sent, received: received}
		k.health.yes = append(k.health.yes, y)
	}
}

const (
	// explainAfter is when a job that /leader has spoken of must have told the witness of itself,
	// and explainLooks how often the checker must have looked for it: a machine that hangs keeps
	// them both from it.
	explainAfter = 2 * time.Second
	explainLooks = 30
	// noticedIn is from the witness's hearing of a process's end until the kernel tells it to
	// whoever asks: a process at its end must have a processor for that, which a starved machine
	// may not give it soon.
	noticedIn = 250 * time.Millisecond
)

// explain checks that /leader said 200 only while the candidate's job lived, and was not frozen.
func (k *checker) explain(now time.Duration, over bool) {
	k.health.yes = slices.DeleteFunc(k.health.yes, func(y *yes) bool {
		lives, last, of := k.jobBefore(y, now)
		switch f := k.heldFrozen(y, now); {
		case f == nil:
		case k.excuses.starved(f.From, y.received, k.margin()):
			k.counts.FrozenYes++ // the daemon has asked for the thaw, or will be told of the freeze
		default:
			k.violate([]string{y.candidate}, "/leader of %s, asked at %v, says 200, and its job "+
				"was frozen", y.candidate, y.sent-k.began)
		}
		if lives {
			return over || now > y.received+noticedIn
		}
		y.looked++
		waits := y.received
		for _, f := range k.excuses.frozen[y.candidate] {
			waits = max(waits, f.To) // the job may not have come to speak
		}
		early := now-explainAfter < waits || y.looked < explainLooks
		switch {
		case early && !over:
			return false
		case k.untold(y):
			k.counts.Untold++
		case of == nil:
			k.violate([]string{y.candidate}, "/leader of %s, asked at %v, says 200, "+
				"and no job of it has lived lately", y.candidate, y.sent-k.began)
		default:
			k.lateYes(y, last, of)
		}
		return true
	})
}

// jobBefore reports whether a job of the candidate lived at the time of an answer. Otherwise it
// returns when the last one before that ended, and of which term that was.
func (k *checker) jobBefore(y *yes, now time.Duration,
) (lives bool, last time.Duration, of *check.Term) {
	for _, t := range k.terms {
		if t.Candidate != y.candidate {
			continue
		}
		for _, l := range t.Lives {
			// From the fork on the job is there, though it has yet to say so.
			from, to := min(l.Started, l.Forked), check.End(l, now)
			if from <= y.received && to >= y.sent {
				return true, 0, nil
			}
			if to < y.sent && to > last {
				last, of = to, t
			}
		}
	}
	return false, last, of
}

// lateYes takes a 200 that was sent after the job's end.
func (k *checker) lateYes(y *yes, end time.Duration, of *check.Term) {
	excuse, bound := "", time.Duration(0)
	killed := k.excuses.last[[2]string{guardKilled, y.candidate}]
	switch {
	case endsByItself(of):
		excuse, bound = "the job's own end", noticedIn
	case killed != 0 && killed <= end && end < killed+noticedIn:
		excuse, bound = "the job's end with its guard", noticedIn
	}
	after := y.sent - end
	k.health.late[excuse] = append(k.health.late[excuse], harness.Milliseconds(after))
	if after > bound {
		k.violate([]string{y.candidate}, "/leader of %s, asked at %v, says 200 though its job had "+
			"exited %v before (after %s; token %d)", y.candidate, y.sent-k.began, after,
			cmp.Or(excuse, "leasehold had killed it"), of.Token)
	}
}

// untold reports whether an answer was of a job that by its daemon's log ran then, and was killed
// before it could tell the witness of itself: on a starved machine the start of a program may take
// longer than a term.
func (k *checker) untold(y *yes) bool {
	sent, received := k.wall(y.sent), k.wall(y.received)
	states := check.JobStates(k.log(y.candidate))
	for i := 1; i < len(states); i++ {
		from, to := states[i-1], states[i]
		ran := from.Match == "started" && to.Match != "started"
		if ran && !from.At.After(received) && !to.At.Before(sent) {
			return !k.told(y.candidate, from.At.Add(-time.Second), to.At.Add(time.Second))
		}
	}
	return false
}

// told reports whether the witness has heard of a job of the candidate that started in that time.
func (k *checker) told(candidate string, from, to time.Time) bool {
	return slices.ContainsFunc(k.terms, func(t *check.Term) bool {
		return t.Candidate == candidate && slices.ContainsFunc(t.Lives, func(l harness.Life) bool {
			at := k.wall(l.Started)
			return !at.Before(from) && !at.After(to)
		})
	})
}
