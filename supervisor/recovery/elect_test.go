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
)

// holds is the file of an elect that has done that, and was killed.
func holds(t *testing.T, dir string, does func(*Holder)) {
	t.Helper()
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := f.Hold("election", "identity", Lease{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	does(h)
	h.Close(time.Minute)
}

func queued(h *Holder) {
	h.Leased(3, time.Second)
	h.Leased(7, 2*time.Second)
	h.Leased(7, 5*time.Second) // etcd has granted more
	h.Entered(42)
}

// TestHeld: the next elect goes on with the lease of the one before if its key was put and it was
// not given back.
func TestHeld(t *testing.T) {
	for _, c := range []struct {
		what string
		does func(*Holder)
		want Lease
		says string // "": no error
	}{
		{"nothing", func(*Holder) {}, Lease{}, ""},
		{"a key", queued, Lease{ID: 7, TTL: 5 * time.Second, Created: 42}, ""},
		{"no key yet", func(h *Holder) {
			queued(h)
			h.Leased(8, time.Second)
		}, Lease{}, "whether its key was put"},
		{"revoked", func(h *Holder) {
			queued(h)
			h.Leased(0, 0)
		}, Lease{}, ""},
		{"being released", func(h *Holder) {
			queued(h)
			if err := h.Releasing(7); err != nil {
				t.Error(err)
			}
		}, Lease{}, "revoked at any moment"},
		{"another one released", func(h *Holder) {
			queued(h)
			if err := h.Releasing(3); err != nil {
				t.Error(err)
			}
		}, Lease{ID: 7, TTL: 5 * time.Second, Created: 42}, ""},
		{"another boot", func(h *Holder) {
			h.held.BootID = "another"
			queued(h)
		}, Lease{}, "boot id"},
		{"no boot id", func(h *Holder) {
			h.held.BootID = ""
			queued(h)
		}, Lease{}, "boot id"},
		{"another network namespace", func(h *Holder) {
			h.held.NetNS++
			queued(h)
		}, Lease{}, "another network namespace"},
		{"a copy", func(h *Holder) {
			h.held.File.Born++
			queued(h)
		}, Lease{}, "copy"},
	} {
		t.Run(c.what, func(t *testing.T) {
			dir := t.TempDir()
			holds(t, dir, c.does)
			f := open(t, dir)
			got, err := f.Held("election", "identity")
			if got != c.want || (err == nil) != (c.says == "") ||
				err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%+v, %v; want %+v, %q", got, err, c.want, c.says)
			}
			// The next one may be killed before it has done anything.
			h, err := f.Hold("election", "identity", got, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			h.Close(time.Minute)
			if again, err := f.Held("election", "identity"); again != got || err != nil {
				t.Errorf("one after that: %+v, %v; want %+v", again, err, got)
			}
		})
	}
}

// TestHeld_NotUsed: a file that is of somebody else, or damaged, says nothing. The two commands do
// not read each other's files.
func TestHeld_NotUsed(t *testing.T) {
	dir := t.TempDir()
	holds(t, dir, queued)
	f := open(t, dir)
	for _, c := range []struct{ election, identity, says string }{
		{"other", "identity", "it is of the election"},
		{"election", "other", "it is of the identity"},
	} {
		if l, err := f.Held(c.election, c.identity); l != (Lease{}) || err == nil ||
			!strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %+v, %v", c, l, err)
		}
	}
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
		if l, err := f.Held("election", "identity"); l != (Lease{}) || (err == nil) != (n == 0) {
			t.Fatalf("the first %d bytes: %+v, %v", n, l, err)
		}
	}
	other := t.TempDir()
	claimed(t, other, 7)
	if l, err := open(t, other).Held("election", "identity"); l != (Lease{}) || err == nil {
		t.Errorf("the file of a daemon with a job: %+v, %v", l, err)
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
	if _, err := f.Hold("election", "identity", Lease{}, nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("hold: %v", err)
	}
	h := &Holder{writes: make(chan heldWrite, 1), done: make(chan struct{})}
	queued(h)
	if err := h.Releasing(7); err == nil { // nobody writes: the disk hangs
		t.Error("a release that is not written is sent")
	}
	go h.run(full, slog.New(slog.DiscardHandler))
	if err := h.Releasing(7); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the disk is full: %v", err)
	}
	h.Close(time.Minute)
}

// TestHolder_None: without a file all is as with one.
func TestHolder_None(t *testing.T) {
	var h *Holder
	queued(h)
	if err := h.Releasing(7); err != nil {
		t.Error(err)
	}
	h.Close(0)
}
