//go:build linux

package app

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"leasehold/election"
	"leasehold/internal/boottime"
)

// What a process before this one has renewed last is not known: the app may work for as long as a
// renewal at the start of this process would let it.
func TestAppEnd(t *testing.T) {
	timing := election.NewTiming(15*time.Second, 3*time.Second, -1, 0)
	if got, want := appEnd(timing, time.Minute), time.Minute+13500*time.Millisecond; got != want {
		t.Errorf("%v, want %v", got, want)
	}
}

// A loss of contact holds the lease until the latest kill-by that was known, in whatever order that
// was reported.
func TestLeaseCallbacks_HoldsUntilTheLatestKillBy(t *testing.T) {
	now := boottime.Now()
	for name, report := range map[string]func(l *leaseCallbacks) election.Deadlines{
		"renewed before the term": func(l *leaseCallbacks) election.Deadlines {
			l.Extended(election.Deadlines{KillBy: now + time.Hour})
			return election.Deadlines{KillBy: now + time.Minute}
		},
		"taken over": func(l *leaseCallbacks) election.Deadlines {
			l.extend(now + time.Hour)
			return election.Deadlines{KillBy: now + time.Minute}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &leaseCallbacks{force: make(chan struct{})}
				d := report(l)
				ctx, end := context.WithCancelCause(t.Context())
				end(election.ErrContactLost)
				began := time.Now()
				_ = l.Lead(ctx, election.Term{Deadlines: d, Lost: make(chan struct{})})
				if held := time.Since(began); held < 59*time.Minute {
					t.Errorf("held for %v, want an hour", held)
				}
			})
		})
	}
}
