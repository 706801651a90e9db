//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
	"leasehold/e2e/store"
)

const (
	readEvery = 60 * time.Millisecond // at each member of etcd
	lateEvery = 80 * time.Millisecond // at each member of etcd
	// lateTerms is how many terms' guards the late writers use: the last of them may still last.
	lateTerms = 4
)

// newStore makes the record of the storage that the jobs write, beside the programs: an ordinary
// user's job must get there.
func (r *run) newStore() (err error) {
	r.storeLog = filepath.Join(filepath.Dir(r.programs.Testjob), "store.jsonl")
	if r.store, err = store.OpenLog(r.storeLog); err != nil {
		return err
	}
	return os.Chmod(r.storeLog, 0o666) // whatever the umask is
}

// useStore reads the storage at each member of etcd, and writes there by the guards of the last
// terms: those requests were on their way for long, as it were. It goes on until ctx ends.
func (r *run) useStore(ctx context.Context, url string) error {
	etcd, err := r.Etcd.NewClient(url)
	if err != nil {
		return err
	}
	defer func() { _ = etcd.Close() }()
	failed := make(chan error, 2)
	go func() {
		c := store.Client{Name: "reader " + url, Etcd: etcd, Log: r.store}
		failed <- every(ctx, readEvery, c.Read)
	}()
	go func() {
		c := store.Client{
			Name: "late writer " + url, Etcd: etcd, Log: r.store, Unguarded: r.unguarded,
		}
		failed <- every(ctx, lateEvery, func(ctx context.Context) error {
			guards := r.check.lastGuards(lateTerms)
			if len(guards) == 0 {
				return nil
			}
			return c.Write(ctx, guards[rand.IntN(len(guards))])
		})
	}()
	return errors.Join(<-failed, <-failed)
}

// every calls f again and again until ctx ends or f fails.
func every(ctx context.Context, d time.Duration, f func(context.Context) error) error {
	for harness.Wait(ctx, d) == nil {
		if err := f(context.WithoutCancel(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// lastGuards are those of the last terms whose jobs the witness knows.
func (k *checker) lastGuards(n int) (guards []store.Guard) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.terms[max(0, len(k.terms)-n):] {
		for _, kv := range t.Lives[0].Env {
			if key, found := strings.CutPrefix(kv, "LEASEHOLD_KEY="); found {
				guards = append(guards, store.Guard{Key: key, Token: t.Token})
			}
		}
	}
	return guards
}

// writeHistory adds to the record what the lock did, and copies all of it to where it is asked for.
func (r *run) writeHistory(to string) error {
	for i, o := range r.check.lockHistory() {
		o.Client, o.N = "lock", i+1
		if err := r.store.Add(o); err != nil {
			return err
		}
	}
	from, err := os.Open(r.storeLog)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	file, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, from)
	return errors.Join(err, file.Close())
}

// lockHistory is when each term's job started and ended, by the witness, and when a term may have
// been taken from under its job: by an operator, by etcd, by a freeze past the lease's end, and by
// a guard that was late.
func (k *checker) lockHistory() (all []store.Operation) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.terms {
		forked := t.Start // the kernel rounds down
		for _, l := range t.Lives {
			forked = min(forked, l.Forked)
		}
		for _, a := range k.excuses.actions {
			if !k.mayTake(a, t) {
				continue
			}
			// etcd has done what was asked for when it answers. What follows takes up to a TTL.
			done := a.until
			if a.token != 0 {
				done -= k.ttl
			}
			all = append(all, taken(t.Token, a.at, done, 0, a.cause))
			// A job may start when its term is taken already. The term itself was there before.
			if a.at <= t.Start && t.Start <= a.until {
				forked = min(forked, a.at)
			}
		}
		all = append(all, store.Operation{
			Kind: store.Acquire, Token: t.Token, Call: forked, Return: t.Start, Why: t.Candidate,
		})
		end := t.End
		for _, f := range k.frozen {
			if f.term == t && f.end != stillFrozen && f.end != thawed {
				end = f.From // it never ran again, as far as anybody knows
			}
		}
		if end != 0 {
			all = append(all, store.Operation{
				Kind: store.Release, Token: t.Token, Call: end, Return: end, Why: t.Candidate,
			})
		}
		for _, f := range k.excuses.frozen[t.Candidate] {
			if f.Length() >= k.margin() && f.From >= t.Start && (t.Alive() || f.From <= t.End) {
				all = append(all, taken(t.Token, f.From, f.To, k.margin(), "frozen"))
			}
		}
		if late := k.killedLate(t); late > 0 {
			why := fmt.Sprintf("%v", guardLate)
			all = append(all, taken(t.Token, t.End-late-k.ttl, t.End, 0, why))
		}
	}
	return all
}

// mayTake reports whether an action may have taken a term. Of an action of etcd's own nobody knows
// whom it hit: whose job lived meanwhile, unless its lease was renewed afterwards.
func (k *checker) mayTake(a *action, t *check.Term) bool {
	if a.token != 0 {
		return a.token == t.Token
	}
	deadline, known := k.leases.deadlineOf(t)
	renewed := known && deadline-k.ttl > a.until
	return !renewed && t.Start <= a.until && (t.Alive() || t.End >= a.at)
}

// taken is that of a term between two moments; where the second is not known, until now.
func taken(token int64, from, to, more time.Duration, why string) store.Operation {
	until := min(to, harness.Now()) + more
	return store.Operation{Kind: store.Take, Token: token, Call: from, Return: until, Why: why}
}
