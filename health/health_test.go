package health

import (
	"bytes"
	"cmp"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// leading returns the snapshot of a leader with a running job, 10 s before stop-at and 15 s before
// the lease's end when the clock shows 100 s.
func leading(change ...func(*Snapshot)) Snapshot {
	s := Snapshot{
		Election: "jobs/a", Identity: "b", State: Leading,
		Since:   time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.FixedZone("", 3600)),
		Leader:  &Leader{Identity: "b", Key: "jobs/a/1f", Token: 17},
		Queue:   &Queue{First: []string{}},
		LeaseID: 0x1f, TTL: 20 * time.Second,
		StopAt: 110 * time.Second, KillBy: 113 * time.Second, End: 115 * time.Second, Leading: true,
		JobWanted: true,
		Job: Job{
			State: JobRunning, PID: 4711, StartedAt: time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC),
		},
	}
	for _, c := range change {
		c(&s)
	}
	return s
}

func standby(s *Snapshot) {
	s.State, s.Leading, s.Job = Standby, false, Job{State: "none"}
	s.Leader = &Leader{Identity: "a", Key: "jobs/a/1e", Token: 16}
}

// TestCheck_ShowsLittle: something other than leasehold may listen at that address.
func TestCheck_ShowsLittle(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var now atomic.Pointer[[]byte]
	go serveAnswers(l, &now)
	for answer, want := range map[string]string{
		strings.Repeat("\x1b", 1<<20):                                      "nobody answers: ",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n": "nobody answers: ",
		"HTTP/1.1 404 \x1b[2J" + strings.Repeat("x", 2000) + "\r\n\r\n":    "nobody answers: some",
		"HTTP/1.1 503 x\r\n\r\n\x1b[2J\u009b" + strings.Repeat("x", 1<<20): "no\n",
	} {
		text := []byte(answer)
		now.Store(&text)
		var out bytes.Buffer
		err := Check(t.Context(), l.Addr().String(), "leader", &out)
		if err == nil || !strings.HasPrefix(err.Error()+"\n", want) || len(err.Error()) > 2200 ||
			!plain(err.Error()) || out.Len() > 5000 || !plain(out.String()) {
			t.Errorf("%.40q: %.99q..., shows %d bytes, want %q", answer, err, out.Len(), want)
		}
	}
}

func TestTruth(t *testing.T) {
	const at = 100 * time.Second
	for _, c := range []struct {
		name     string
		now      time.Duration
		snapshot Snapshot
		// "" for yes, otherwise a part of the reason.
		live, ready, leader, standby string
	}{
		{"leading", at, leading(), "", "", "", "leading"},
		{"just before stop-at", 110*time.Second - 1, leading(), "", "", "", "leading"},
		{
			"at stop-at", 110 * time.Second, leading(),
			"", "stop-at has passed", "stop-at has passed", "stopping",
		},
		{
			"at stop-at, and the job is frozen", 110 * time.Second,
			leading(func(s *Snapshot) { s.Suspends = true }),
			"", "suspended: contact with etcd lost", "suspended", "suspended",
		},
		{
			"suspended", 200 * time.Second, leading(func(s *Snapshot) { s.State = Suspended }),
			"", "suspended", "suspended", "suspended",
		},
		{
			"not yet thawed", at, leading(func(s *Snapshot) { s.Job.State = "frozen" }),
			"", "", "the job is not running: frozen", "leading",
		},
		{
			"past the lease's end", 200 * time.Second, leading(),
			"", "stopping", "stopping", "stopping",
		},
		{
			"leading without a lease", at, leading(func(s *Snapshot) { s.StopAt, s.End = 0, 0 }),
			"", "", "stop-at has passed", "leading",
		},
		{
			"term lost", at, leading(func(s *Snapshot) { s.Leading = false }),
			"", "", "the term has ended", "leading",
		},
		{
			"stopping", at, leading(func(s *Snapshot) { s.State = Stopping }),
			"", "stopping", "stopping", "stopping",
		},
		{
			"job starting", at, leading(func(s *Snapshot) { s.Job.State = "starting" }),
			"", "", "the job is not running: starting", "leading",
		},
		{
			"job in backoff", at, leading(func(s *Snapshot) { s.Job.State = "backoff" }),
			"", "", "the job is not running: backoff", "leading",
		},
		{
			"job stopping", at, leading(func(s *Snapshot) { s.Job.State = "stopping" }),
			"", "", "the job is not running: stopping", "leading",
		},
		{
			"no job state", at, leading(func(s *Snapshot) { s.Job = Job{} }),
			"", "", "the job is not running: none", "leading",
		},
		{
			"no job wanted", at, leading(func(s *Snapshot) { s.JobWanted, s.Job = false, Job{} }),
			"", "", "", "leading",
		},
		{"standby", at, leading(standby), "", "", "standby: a leads", ""},
		{"standby past stop-at", 112 * time.Second, leading(standby), "", "", "standby", ""},
		{
			"standby past its lease's end", 115 * time.Second, leading(standby),
			"", "the lease has expired", "the lease has expired", "the lease has expired",
		},
		{
			"connecting", at,
			Snapshot{State: Connecting, Reason: "etcd does not answer"},
			"", "connecting: etcd does not answer", "connecting: etcd does not answer",
			"connecting: etcd does not answer",
		},
		{
			"hung", at, leading(func(s *Snapshot) { s.Live = errors.New("no heartbeat for 5s") }),
			"no heartbeat for 5s", "", "", "leading",
		},
		{"nothing yet", at, Snapshot{}, "", "no state yet", "no state yet", "no state yet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.snapshot.update(c.now, time.Now())
			for _, rule := range []struct {
				name string
				got  error
				want string
			}{
				{"live", s.live(), c.live},
				{"ready", s.ready(), c.ready},
				{"leader", s.leader(c.now), c.leader},
				{"standby", s.standby(), c.standby},
			} {
				if rule.want == "" && rule.got != nil || rule.want != "" &&
					(rule.got == nil || !strings.Contains(rule.got.Error(), rule.want)) {
					t.Errorf("%s: %v, want %q", rule.name, rule.got, cmp.Or(rule.want, "yes"))
				}
			}
		})
	}
}

// TestTruth_NeverTwo: no state of the daemon is both leader and standby, and none is leader without
// a future stop-at.
func TestTruth_NeverTwo(t *testing.T) {
	for _, state := range []string{"", Connecting, Standby, Leading, Stopping, "nonsense"} {
		for _, job := range []string{
			"", "none", "starting", JobRunning, "frozen", "stopping", "backoff", "exited",
		} {
			for _, isLeading := range []bool{true, false} {
				for _, second := range []time.Duration{0, 109, 110, 115} {
					neverTwo(t, state, job, isLeading, second*time.Second)
				}
			}
		}
	}
}

func neverTwo(t *testing.T, state, job string, isLeading bool, now time.Duration) {
	t.Helper()
	s := leading(func(s *Snapshot) {
		s.State, s.Job.State, s.Leading = state, job, isLeading
	}).update(now, time.Now())
	isLeader, isStandby, isReady := s.leader(now) == nil, s.standby() == nil, s.ready() == nil
	want := state == Leading && job == JobRunning && isLeading && now < 110*time.Second
	if isLeader != want || isLeader && isStandby || (isLeader || isStandby) && !isReady {
		t.Errorf("state %q, job %q, leading %v at %v: leader %v, standby %v, ready %v",
			state, job, isLeading, now, isLeader, isStandby, isReady)
	}
}

func TestStatus_JSON(t *testing.T) {
	exit := &Exit{Code: 0, At: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	for _, c := range []struct {
		name     string
		now      time.Duration
		snapshot Snapshot
		want     string
	}{
		{
			"nothing", 0,
			Snapshot{Election: "e", Identity: "i", State: Connecting, Reason: `etcd says "no" <&>`},
			`{
  "name": "",
  "election": "e",
  "identity": "i",
  "state": "connecting",
  "reason": "etcd says \"no\" <&>",
  "unfit": null,
  "leader": null,
  "position": null,
  "lease": null,
  "deadlines": null,
  "job": {
    "state": "none",
    "pid": null,
    "started_at": null,
    "restarts": 0,
    "last_exit": null,
    "health": null,
    "ready": false
  },
  "blocker": null,
  "hold": null,
  "control_problem": null,
  "since": null,
  "version": "v1"
}
`,
		},
		{"everything", 100*time.Second + 1, leading(func(s *Snapshot) {
			s.Job.Restarts, s.Job.LastExit = 3, exit
			s.Blocker = &Blocker{
				Key: "jobs/a/x", Why: "it has no lease", Remedy: "etcdctl del jobs/a/x",
			}
		}), `{
  "name": "b",
  "election": "jobs/a",
  "identity": "b",
  "state": "leading",
  "reason": null,
  "unfit": null,
  "leader": {
    "identity": "b",
    "key": "jobs/a/1f",
    "token": 17
  },
  "position": {
    "ahead": 0,
    "first": []
  },
  "lease": {
    "id": "1f",
    "ttl_seconds": 20,
    "valid_for_seconds": 14.999
  },
  "deadlines": {
    "now": 100,
    "stop_at": 110,
    "kill_by": 113,
    "lease_end": 115
  },
  "job": {
    "state": "running",
    "pid": 4711,
    "started_at": "2026-01-02T03:04:06Z",
    "restarts": 3,
    "last_exit": {
      "code": 0,
      "signal": null,
      "at": "2026-01-02T03:04:05Z"
    },
    "health": null,
    "ready": true
  },
  "blocker": {
    "key": "jobs/a/x",
    "why": "it has no lease",
    "remedy": "etcdctl del jobs/a/x"
  },
  "hold": null,
  "control_problem": null,
  "since": "2026-01-02T02:04:05.006Z",
  "version": "v1"
}
`},
		{
			"cut off", 120 * time.Second,
			leading(func(s *Snapshot) { s.Job.LastExit = &Exit{Code: -1, Signal: "SIGKILL"} }), `{
  "name": "",
  "election": "jobs/a",
  "identity": "b",
  "state": "stopping",
  "reason": "contact with etcd lost: stop-at has passed",
  "unfit": null,
  "leader": null,
  "position": null,
  "lease": {
    "id": "1f",
    "ttl_seconds": 20,
    "valid_for_seconds": 0
  },
  "deadlines": {
    "now": 120,
    "stop_at": 110,
    "kill_by": 113,
    "lease_end": 115
  },
  "job": {
    "state": "running",
    "pid": 4711,
    "started_at": "2026-01-02T03:04:06Z",
    "restarts": 0,
    "last_exit": {
      "code": null,
      "signal": "SIGKILL",
      "at": null
    },
    "health": null,
    "ready": true
  },
  "blocker": null,
  "hold": null,
  "control_problem": null,
  "since": "2026-02-03T04:04:55Z",
  "version": "v1"
}
`,
		},
	} {
		wall := time.Date(2026, 2, 3, 4, 5, 5, 0, time.UTC)
		if got := encode(c.snapshot.update(c.now, wall).status(c.now, "v1"), "  "); got != c.want {
			t.Errorf("%s:\n%s\nwant:\n%s", c.name, got, c.want)
		}
	}
}

func TestStatusFields(t *testing.T) {
	seen := map[string]Field{}
	for _, f := range StatusFields() {
		if f.Path == "" || f.Meaning == "" || strings.HasSuffix(f.Path, ".") {
			t.Errorf("field without name or meaning: %+v", f)
		}
		seen[f.Path] = f
	}
	for path, kind := range map[string]string{
		"name": "string", "leader": "object or null", "leader.token": "number",
		"lease.valid_for_seconds": "number",
		"job":                     "object", "job.pid": "number or null",
		"job.last_exit.signal": "string or null", "since": "string or null",
	} {
		if seen[path].Type != kind {
			t.Errorf("%s is %q, want %q", path, seen[path].Type, kind)
		}
	}
}
