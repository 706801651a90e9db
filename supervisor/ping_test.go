//go:build linux

package supervisor

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
)

// TestPingInterval: pings are rare while no deadline needs them, and frequent before one does.
func TestPingInterval(t *testing.T) {
	const ttl, margin = 15 * time.Second, 1500 * time.Millisecond
	now := time.Hour
	renewed := func(ago time.Duration) func(*job) {
		return func(j *job) {
			j.term.StopAt, j.term.KillBy = now-ago+10500*time.Millisecond, now-ago+ttl-margin
			j.known = j.term.KillBy
		}
	}
	for _, c := range []struct {
		name  string
		state JobState
		set   func(*job)
		least time.Duration
		most  time.Duration
	}{
		{"no job", JobNone, renewed(0), 3 * time.Second, 3 * time.Second},
		{"just renewed", JobRunning, renewed(0), 3 * time.Second, 3 * time.Second},
		{"starting", JobStarting, renewed(0), 0, 500 * time.Millisecond},
		{"stopping", JobStopping, renewed(0), 0, 500 * time.Millisecond},
		{
			"a third of the TTL before stop-at soon", JobRunning, renewed(4 * time.Second),
			500 * time.Millisecond, time.Second,
		},
		{
			"a third of the TTL before stop-at", JobRunning, renewed(6 * time.Second),
			0, 500 * time.Millisecond,
		},
		{"kill-by soon", JobRunning, renewed(13 * time.Second), 0, 500 * time.Millisecond},
		{
			"frozen, and past kill-by", JobFrozen, func(j *job) {
				renewed(time.Hour)(j)
				j.frozen = true
			}, 3 * time.Second, 3 * time.Second,
		},
		{"asked to be thawed", JobFrozen, renewed(0), 0, 500 * time.Millisecond},
		{"overdue", JobRunning, renewed(14 * time.Second), 0, 100 * time.Millisecond},
		{
			"the guard may not know", JobRunning, func(j *job) {
				renewed(0)(j)
				j.known = now + margin
			}, 0, 500 * time.Millisecond,
		},
		{
			"to be killed soon", JobRunning, func(j *job) {
				renewed(0)(j)
				j.due = now + 100*time.Millisecond
			}, 0, 500 * time.Millisecond,
		},
	} {
		s := newTestSupervisor(t)
		s.cfg.TTL, s.cfg.MaxPing = ttl, time.Minute
		s.cfg.Margin = func() time.Duration { return margin }
		s.job.shown.State, s.job.due = c.state, forever
		c.set(&s.job)
		if d := s.pingInterval(now); d < c.least || d > c.most {
			t.Errorf("%s: the next ping is after %v, want %v to %v", c.name, d, c.least, c.most)
		}
	}
}

// TestPingInterval_BeforeTheGuardChecks: with any TTL a ping comes before the guard would check
// whether a healthy elector is silent, and systemd's watchdog is served.
func TestPingInterval_BeforeTheGuardChecks(t *testing.T) {
	const now = time.Hour
	for _, ttl := range []time.Duration{2, 3, 15, 60, 71, 300} {
		ttl *= time.Second
		margin, interval := max(ttl/10, 200*time.Millisecond), ttl/5
		slack := ttl / 100
		for _, watchdog := range []time.Duration{250 * time.Millisecond, time.Minute} {
			s := newTestSupervisor(t)
			s.cfg.TTL, s.cfg.MaxPing = ttl, watchdog
			s.cfg.Margin = func() time.Duration { return margin }
			check := func(what string, job bool, untilStopAt time.Duration) {
				t.Helper()
				d, most := s.pingInterval(now), watchdog
				if limit := ipc.Silence(ttl, job, untilStopAt); d+slack > limit || d > most {
					t.Errorf("%s, TTL %v: a ping after %v, and the guard checks after %v", what,
						ttl, d, limit)
				}
			}
			check("no job", false, 0)
			s.job.shown.State, s.job.due = JobRunning, forever
			for ago := time.Duration(0); ago < 4*interval; ago += interval / 10 {
				s.job.term.KillBy = now - ago + ttl - margin
				s.job.term.StopAt = s.job.term.KillBy - ttl/5
				s.job.known = s.job.term.KillBy
				check(ago.String()+" after a renewal", true, s.job.term.StopAt-now)
			}
			s.job.shown.State, s.stopped = JobExited, true
			if d := s.pingInterval(now); d > time.Second {
				t.Errorf("the guard waits for the release, and a ping comes after %v", d)
			}
		}
	}
}

// TestPing_Answered: what the guard knows for sure is what was sent before a ping that it has
// answered. Without a job, it need not answer.
func TestPing_Answered(t *testing.T) {
	s := newTestSupervisor(t)
	var p pings
	s.ping(&p)
	if p.sent != 0 {
		t.Error("without a job, an answer is awaited")
	}
	at := boottime.Now()
	if _, err := s.startAsked(Term{StopAt: at + time.Hour, KillBy: at + time.Hour}); err != nil {
		t.Fatal(err)
	}
	s.job.term.KillBy = at + 2*time.Hour
	s.ping(&p)
	if s.job.known != at+time.Hour {
		t.Error("the guard has not answered")
	}
	s.job.term.KillBy = at + 3*time.Hour // after the ping
	s.answered(ipc.Pong{Number: p.sent}, &p)
	if s.job.known != at+2*time.Hour {
		t.Errorf("the guard knows of %v", s.job.known-at)
	}
	s.ping(&p)
	s.ping(&p)
	s.answered(ipc.Pong{Number: p.sent - 1}, &p)
	if s.job.known != at+2*time.Hour {
		t.Error("the answer to an earlier ping counts for the last one")
	}
}

// TestGuardHangs_UnreadAnswers: answers that have come count, also if nobody has read them yet.
func TestGuardHangs_UnreadAnswers(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(unix.Close(pipe[0]), unix.Close(pipe[1])) }()
	s := newTestSupervisor(t)
	s.cfg.In, s.cfg.TTL = pipe[0], time.Second
	s.cfg.Margin = func() time.Duration { return 100 * time.Millisecond }
	if _, err := s.startAsked(Term{StopAt: 1, KillBy: 1}); err != nil {
		t.Fatal(err)
	}
	s.job.askedAt = 1
	messages := make(chan ipc.Message, 1)
	hangs := func(p *pings) bool { return s.guardHangs(p) && !s.unread(messages, p) }
	p := &pings{sent: 5}
	if !hangs(p) {
		t.Error("five pings are unanswered, and the guard is not taken for hung")
	}
	out := ipc.Outbox{FD: pipe[1]}
	if err := out.Send(ipc.Pong{Number: 5}); err != nil {
		t.Fatal(err)
	}
	if hangs(p) {
		t.Error("an answer is in the pipe, and the guard is taken for hung")
	}
	var inbox ipc.Inbox
	if _, err := inbox.Fill(pipe[0]); err != nil {
		t.Fatal(err)
	}
	m, _ := inbox.Next()
	messages <- m
	if hangs(p) || p.answered != 5 {
		t.Error("an answer is read and not yet taken, and the guard is taken for hung")
	}
}
