//go:build linux

package app

import (
	"fmt"
	"os"
	"testing"
	"time"

	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
)

func TestURL(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for listen, want := range map[string]string{
		"off": "", "127.0.0.1:4040": "", "localhost:4040": "", "[::1]:4040": "",
		":4040": "http://" + name + ":4040", "0.0.0.0:4040": "http://" + name + ":4040",
		"[::]:4040": "http://" + name + ":4040", "10.0.0.7:80": "http://10.0.0.7:80",
		"[2001:db8::1]:80": "http://[2001:db8::1]:80", "host:80": "http://host:80",
	} {
		if got := url(listen); got != want {
			t.Errorf("listening at %s: %q, want %q", listen, got, want)
		}
	}
}

// The history says why a term ended. What ended it first counts.
func TestTermEnd(t *testing.T) {
	for _, test := range []struct {
		cause, err error
		want       string
	}{
		{errPlannedStop, nil, "stopped"},
		{fmt.Errorf("%w to x", election.ErrSwitchover), nil, "switchover"},
		{election.ErrContactLost, supervisor.ErrGuardLost, "contact lost"},
		{election.ErrEnded, nil, "lost"},
		{nil, supervisor.ErrGuardLost, "guard lost"},
		{nil, &election.Backoff{}, "resigned"},
		{nil, &supervisor.ExitError{Refused: "no such file"}, "job not started"},
		{nil, &supervisor.ExitError{}, "job exited"},
		{nil, nil, "internal error"},
	} {
		if got := termEnd(test.cause, test.err); got != test.want {
			t.Errorf("ended by %v, with %v: %q, want %q", test.cause, test.err, got, test.want)
		}
	}
}

// The job's last exit belongs to the term in which it happened.
func TestLastExit(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	job := health.Job{Starts: 1, LastExit: &health.Exit{Signal: "SIGKILL", At: at}}
	for _, test := range []struct {
		name  string
		began time.Time
		want  bool
	}{
		{"in this term", at.Add(-time.Second), true},
		{"in the term before", at.Add(time.Second), false},
		{"in a term that an elector before this one began", time.Time{}, true},
	} {
		if got := lastExit(job, test.began); (got != nil) != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}
