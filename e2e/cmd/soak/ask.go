//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"leasehold/e2e/harness"
)

const (
	askEvery = 40 * time.Millisecond
	// A daemon that hangs answers when it goes on, so questions wait for it; those
	// that were sent while it hung are the most telling.
	askPatience = 10 * time.Second
	askAtOnce   = 8
)

// ask asks a candidate for /leader and /status all the time, whoever answers
// there, until ctx ends.
func (k *checker) ask(ctx context.Context, candidate, addr string) {
	client := &http.Client{Timeout: askPatience, Transport: &http.Transport{MaxIdleConnsPerHost: 2, DisableCompression: true}}
	defer client.CloseIdleConnections()
	var asking sync.WaitGroup
	defer asking.Wait()
	free := make(chan struct{}, askAtOnce)
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// While questions hang, few more are sent.
		if hanging := len(free); hanging > 2 && n%16 != 0 {
			continue
		}
		select {
		case free <- struct{}{}:
		default:
			continue
		}
		asking.Go(func() {
			defer func() { <-free }()
			k.askOnce(ctx, client, candidate, addr)
		})
	}
}

func (k *checker) askOnce(ctx context.Context, client *http.Client, candidate, addr string) {
	sent := harness.Now()
	if code, _, err := get(ctx, client, "http://"+addr+"/leader"); err == nil {
		k.answeredLeader(&yes{candidate: candidate, sent: sent, received: harness.Now()}, code)
	}
	k.mu.Lock()
	highest := k.highest
	k.mu.Unlock()
	sent = harness.Now()
	if code, body, err := get(ctx, client, "http://"+addr+"/status"); err == nil && code == http.StatusOK {
		k.answeredStatus(candidate, sent, highest, body)
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

// status is what the checker reads of /status.
type status struct {
	State  string
	Leader *struct {
		Identity string
		Token    int64
	}
	Lease *struct{ ID string }
	Job   *struct{ State string }
}

// answeredStatus checks that nobody says to lead with a token lower than one
// that had been received before the question was sent.
func (k *checker) answeredStatus(candidate string, sent time.Duration, highest int64, body []byte) {
	var s status
	if err := json.Unmarshal(body, &s); err != nil {
		k.violate([]string{candidate}, "/status of %s is no JSON: %v: %s", candidate, err, body)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Status++
	if s.Lease != nil {
		if id, err := strconv.ParseInt(s.Lease.ID, 16, 64); err == nil {
			k.claimed[id] = harness.Now()
		}
	}
	backsOff := s.State == "leading" && s.Job != nil && s.Job.State == "backoff"
	if since := k.backsOff[candidate]; backsOff && since != 0 {
		k.backoffs = append(k.backoffs, span{since, sent})
	}
	delete(k.backsOff, candidate)
	if backsOff {
		k.backsOff[candidate] = sent
	}
	if s.Leader == nil {
		return
	}
	k.receives(s.Leader.Token)
	if s.State != "leading" {
		return
	}
	k.counts.Leading++
	if s.Leader.Token >= highest {
		return
	}
	if d := k.deedOn(s.Leader.Token, sent); d != nil && sent < d.at+k.ttl {
		k.stale = append(k.stale, stale{candidate, s.Leader.Token, sent, k.received(s.Leader.Token + 1)})
		return
	}
	k.violate([]string{candidate}, "/status of %s, asked at %v, says leading with token %d, after token %d had been received: %s",
		candidate, sent-k.began, s.Leader.Token, highest, body)
}

// rise is when a token was received that is higher than all before it.
type rise struct {
	token int64
	at    time.Duration
}

func (k *checker) receives(token int64) {
	if token > k.highest {
		k.highest = token
		k.rises = append(k.rises, rise{token, harness.Now()})
	}
}

// received is when one at least as high as that was received first.
func (k *checker) received(token int64) time.Duration {
	i, _ := slices.BinarySearchFunc(k.rises, token, func(r rise, t int64) int { return cmp.Compare(r.token, t) })
	return k.rises[i].at
}

// stale is a "leading" of /status with a token lower than one received before,
// after a deed that may excuse it.
type stale struct {
	candidate    string
	token        int64
	sent, higher time.Duration
}

// excuse puts those under the class of their deed. A leader within reach of
// etcd that an operator's deed hit has no excuse for longer than until the next
// renewal, which tells at the latest.
func (k *checker) excuse(now time.Duration, over bool) {
	k.stale = slices.DeleteFunc(k.stale, func(s stale) bool {
		if !over && now < s.sent+2*pressureAround {
			return false
		}
		d := k.deedOn(s.token, s.sent)
		c, after := d.class(), s.sent-s.higher
		if c == afterDeed && k.pressure.stalled(s.higher-pressureAround, s.sent+pressureAround) > 0.5 {
			c = starved
		}
		k.excused[c] = append(k.excused[c], harness.Milliseconds(after))
		if c == afterDeed && d.token != 0 && after > k.ttl/5+noticedIn {
			k.violate([]string{s.candidate}, "/status of %s, asked at %v, says leading with token %d, %v after a higher one had been received (%s, and etcd was within reach)",
				s.candidate, s.sent-k.began, s.token, after, d.cause)
		}
		return true
	})
}

func (k *checker) answeredLeader(y *yes, code int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counts.Leader++
	if code == http.StatusOK {
		k.counts.Yes++
		k.yes = append(k.yes, y)
	}
}

const (
	// explainAfter is when a job that /leader has spoken of must have told the
	// witness of itself, and explainLooks how often the checker must have looked
	// for it: a machine that hangs keeps them both from it.
	explainAfter = 2 * time.Second
	explainLooks = 30
	// noticedIn is from the witness's hearing of a process's end until the kernel
	// tells it to whoever asks: a process at its end must have a processor for
	// that, which a starved machine may not give it soon.
	noticedIn = 250 * time.Millisecond
)

// explain checks that /leader said 200 only while the candidate's job lived.
func (k *checker) explain(now time.Duration, over bool) {
	k.yes = slices.DeleteFunc(k.yes, func(y *yes) bool {
		frozen := k.frozen[y.candidate]
		last := span{}
		var of *term
		for _, t := range k.terms {
			if t.candidate != y.candidate {
				continue
			}
			for _, l := range t.lives {
				// From the fork on the job is there, though it has yet to say so.
				s := span{min(l.Started, l.Forked), until(l, now)}
				if s.from <= y.received && s.to >= y.sent {
					return true
				}
				if s.to < y.sent && s.to > last.to {
					last, of = s, t
				}
			}
		}
		y.looked++
		early := now < y.received+explainAfter || y.looked < explainLooks
		if n := len(frozen); n > 0 && frozen[n-1].to > y.received { // the job may not have come to speak
			early = early || now < frozen[n-1].to || now < frozen[n-1].to+explainAfter
		}
		if early && !over {
			return false
		}
		if k.untold(y) {
			k.counts.Untold++
			return true
		}
		if of == nil {
			k.violate([]string{y.candidate}, "/leader of %s, asked at %v, says 200, and no job of it has lived lately", y.candidate, y.sent-k.began)
			return true
		}
		after := y.sent - last.to
		excuse, bound := "", time.Duration(0)
		killed := k.killed[y.candidate]
		switch {
		case of.own:
			excuse, bound = "the job's own end", noticedIn
		case killed != 0 && killed <= last.to && last.to < killed+noticedIn:
			excuse, bound = "the job's end with its guard", noticedIn
		}
		k.late[excuse] = append(k.late[excuse], harness.Milliseconds(after))
		if after > bound {
			k.violate([]string{y.candidate}, "/leader of %s, asked at %v, says 200 though its job had been dead for %v (after %s; token %d)",
				y.candidate, y.sent-k.began, after, cmp.Or(excuse, "leasehold had killed it"), of.token)
		}
		return true
	})
}

var jobLinePattern = regexp.MustCompile(`time=(\S+) .*msg="the job (runs|is dead)"`)

// untold tells if an answer was of a job that by its daemon's log ran then, and
// was killed before it could tell the witness of itself: on a starved machine
// the start of a program may take longer than a term.
func (k *checker) untold(y *yes) bool {
	sent, received := k.wall(y.sent), k.wall(y.received)
	var runs time.Time
	for _, m := range jobLinePattern.FindAllStringSubmatch(k.log(y.candidate), -1) {
		at, err := time.Parse(time.RFC3339Nano, m[1])
		switch {
		case err != nil:
		case m[2] == "runs":
			runs = at
		case !runs.IsZero() && !runs.After(received) && !at.Before(sent):
			return !k.told(y.candidate, runs, at)
		default:
			runs = time.Time{}
		}
	}
	return false
}

// told tells if the witness has heard of a job of the candidate that started in
// that time.
func (k *checker) told(candidate string, from, to time.Time) bool {
	for _, t := range k.terms {
		for _, l := range t.lives {
			if at := k.wall(l.Started); t.candidate == candidate && !at.Before(from.Add(-time.Second)) && !at.After(to.Add(time.Second)) {
				return true
			}
		}
	}
	return false
}
