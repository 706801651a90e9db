//go:build linux

package recovery

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

var testApp = App{Election: "election", Identity: "identity", Contract: "poll 4040"}

// testTerm is one that can be gone on with.
func testTerm() Term {
	now := boottime.Now()
	return Term{
		Lease: 7, TTL: time.Hour, Token: 42,
		StopAt: now + time.Hour/2, KillBy: now + time.Hour,
	}
}

// holds is the file of an elect that has done that, and was killed.
func holds(t *testing.T, dir string, does func(*Holder)) {
	t.Helper()
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := f.Hold(testApp, Term{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	does(h)
	h.Close(time.Minute)
}

// TestHeld: the next elect goes on with the term of the one before, unless an app may have been
// promised something else, or the lease was given back.
func TestHeld(t *testing.T) {
	term := testTerm()
	for _, c := range []struct {
		what string
		does func(*Holder)
		want Term
		says string // "": no error
	}{
		{"nothing", func(*Holder) {}, Term{}, ""},
		{"a term", func(h *Holder) {
			h.Leads(Term{Lease: 3, StopAt: 1})
			h.Leads(term)
		}, term, ""},
		{"later deadlines", func(h *Holder) {
			h.Leads(Term{Lease: 7, TTL: term.TTL, Token: 42, StopAt: 1, KillBy: 2})
			h.Extended(term.StopAt, term.KillBy)
		}, term, ""},
		{"deadlines of no term", func(h *Holder) {
			h.Extended(term.StopAt, term.KillBy)
		}, Term{}, ""},
		{"stop-at passed", func(h *Holder) {
			h.Leads(term)
			h.Extended(boottime.Now(), term.KillBy)
		}, Term{}, "stop-at has passed"},
		{"over", func(h *Holder) {
			h.Leads(term)
			h.Leads(Term{})
		}, Term{}, ""},
		{"being released", func(h *Holder) {
			h.Leads(term)
			if err := h.Releasing(7); err != nil {
				t.Error(err)
			}
		}, Term{}, "revoked at any moment"},
		{"another one released", func(h *Holder) {
			h.Leads(term)
			if err := h.Releasing(3); err != nil {
				t.Error(err)
			}
		}, term, ""},
		{"the next one after a release", func(h *Holder) {
			h.Leads(Term{Lease: 3, StopAt: term.StopAt})
			if err := h.Releasing(3); err != nil {
				t.Error(err)
			}
			h.Leads(term)
		}, term, ""},
		{"another boot", func(h *Holder) {
			h.held.BootID = "another"
			h.Leads(term)
		}, Term{}, "boot id"},
		{"another network namespace", func(h *Holder) {
			h.held.NetNS++
			h.Leads(term)
		}, Term{}, "another network namespace"},
		{"another time namespace", func(h *Holder) {
			h.held.TimeNS++
			h.Leads(term)
		}, Term{}, "another clock"},
		{"another contract", func(h *Holder) {
			h.held.Contract = "poll 4041"
			h.Leads(term)
		}, Term{}, "other settings were in use: poll 4041"},
		{"another election", func(h *Holder) {
			h.held.Election = "other"
			h.Leads(term)
		}, Term{}, "it is of the election"},
		{"another identity", func(h *Holder) {
			h.held.Identity = "other"
			h.Leads(term)
		}, Term{}, "it is of the identity"},
		{"lost", func(h *Holder) {
			h.Leads(term)
			h.Lost(7)
		}, Term{}, "revoked at any moment"},
		{"another one lost", func(h *Holder) {
			h.Leads(term)
			h.Lost(3)
		}, term, ""},
		{"a stop-at that no renewal has given", func(h *Holder) {
			h.Leads(term)
			h.Extended(boottime.Now()+time.Hour+time.Minute, term.KillBy)
		}, Term{}, "another clock"},
		{"a copy", func(h *Holder) {
			h.held.File.Born++
			h.Leads(term)
		}, Term{}, "copy"},
	} {
		t.Run(c.what, func(t *testing.T) {
			dir := t.TempDir()
			holds(t, dir, c.does)
			f := open(t, dir)
			got, err := f.Held(testApp)
			if got != c.want || (err == nil) != (c.says == "") ||
				err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%+v, %v; want %+v, %q", got, err, c.want, c.says)
			}
			// The next one may be killed before it has done anything.
			h, err := f.Hold(testApp, got, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			h.Close(time.Minute)
			if again, err := f.Held(testApp); again != got || err != nil {
				t.Errorf("one after that: %+v, %v; want %+v", again, err, got)
			}
		})
	}
}

// TestHeld_NotUsed: a damaged file says nothing. The two commands do not read each other's files.
func TestHeld_NotUsed(t *testing.T) {
	dir := t.TempDir()
	holds(t, dir, func(h *Holder) { h.Leads(testTerm()) })
	f := open(t, dir)
	if r, err := f.Read("election", "identity"); r != nil || err == nil {
		t.Errorf("a daemon with a job reads %+v, %v", r, err)
	}
	path := filepath.Join(dir, FileName)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range content {
		if err := os.WriteFile(path, content[:n], 0); err != nil {
			t.Fatal(err)
		}
		if term, err := f.Held(testApp); term != (Term{}) || (err == nil) != (n == 0) {
			t.Fatalf("the first %d bytes: %+v, %v", n, term, err)
		}
	}
	other := t.TempDir()
	claimed(t, other, 7)
	if term, err := open(t, other).Held(testApp); term != (Term{}) || err == nil {
		t.Errorf("the file of a daemon with a job: %+v, %v", term, err)
	}
}

// TestHolder_ReleaseFails: what is not written must not be sent.
func TestHolder_ReleaseFails(t *testing.T) {
	full, err := unix.Open("/dev/full", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := &File{fd: full, path: "/dev/full"}
	defer f.Close()
	if _, err := f.Hold(testApp, Term{}, nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("hold: %v", err)
	}
	h := &Holder{writes: make(chan heldWrite, 1), done: make(chan struct{})}
	h.Leads(testTerm())
	if err := h.Releasing(7); err == nil { // nobody writes: the disk hangs
		t.Error("a release that is not written is sent")
	}
	if err := h.Releasing(8); err != nil { // it is in no file
		t.Errorf("a lease under which no term has begun: %v", err)
	}
	written := make(chan error, 1)
	h.change(releasing(7), written)
	h.Extended(3, 4) // a renewal that is reported late
	go h.run(full, slog.New(slog.DiscardHandler))
	if err := <-written; !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the disk is full: %v", err)
	}
	h.Close(time.Minute)
}

// TestHolder_None: without a file all is as with one.
func TestHolder_None(t *testing.T) {
	var h *Holder
	h.Leads(testTerm())
	h.Extended(1, 2)
	if err := h.Releasing(7); err != nil {
		t.Error(err)
	}
	h.Close(0)
}
