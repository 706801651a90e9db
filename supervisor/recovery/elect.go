//go:build linux

package recovery

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Lease is the lease of `leasehold elect`, and its key.
type Lease struct {
	ID  int64         // 0: there is none
	TTL time.Duration // as granted
	// Created is the create revision of the key; 0: it is not known to be put.
	Created int64
	// Releasing: a request that deletes the key or revokes the lease may be under way.
	Releasing bool
}

// held is what the state file of `leasehold elect` holds.
type held struct {
	BootID string `json:"boot_id"`
	// NetNS is where the apps ask: on the loopback interface.
	NetNS uint64 `json:"network_namespace"`

	Election string  `json:"election"`
	Identity string  `json:"identity"`
	Lease    leaseID `json:"lease"`
	TTL      int64   `json:"ttl"` // nanoseconds
	Created  int64   `json:"created"`
	// Releasing is that of Lease.
	Releasing bool `json:"releasing"`

	File fileID `json:"file"`
}

func (h *held) encode() ([]byte, error) { return encode(electHead, h, h.Election, h.Identity) }

// Held returns the lease of the process before, to go on with it; one without ID: there is none. It
// must be called before Hold. An error says why that lease is left alone, and has to expire.
//
// The lock is ours, so that process has exited. An app may have had the answer that it leads. It
// may work on for a while, and asks us now, if it is in our network namespace. Nothing may be
// revoked.
func (f *File) Held(election, identity string) (Lease, error) {
	content, err := read(f.fd)
	if err != nil || len(content) == 0 {
		return Lease{}, err
	}
	var h held
	err = decode(electHead, content, &h)
	if err == nil {
		err = f.isOf(h.File, h.Election, h.Identity, election, identity)
	}
	if err != nil {
		return Lease{}, err
	}
	switch now := f.hold(election, identity); {
	case h.Lease == 0:
		return Lease{}, nil
	case h.BootID == "" || h.BootID != now.BootID:
		return Lease{}, errors.New("the boot id is another one, or not known")
	case h.NetNS == 0 || h.NetNS != now.NetNS:
		return Lease{}, errors.New("an app in another network namespace may work for this lease")
	case h.Releasing:
		return Lease{}, errors.New("it may be revoked at any moment")
	case h.Created == 0:
		return Lease{}, errors.New("it is not known whether its key was put")
	}
	return Lease{ID: int64(h.Lease), TTL: time.Duration(h.TTL), Created: h.Created}, nil
}

func (f *File) hold(election, identity string) held {
	return held{
		BootID: readLine(bootIDFile), NetNS: inode("/proc/self/ns/net"),
		Election: election, Identity: identity, File: f.id,
	}
}

// releaseTime bounds the wait for the disk before a release.
const releaseTime = time.Second

// Holder writes into the state file which lease `leasehold elect` has. A goroutine of its own
// writes, so that only a release waits for the disk. All methods may be called on nil, which keeps
// nothing.
type Holder struct {
	mu     sync.Mutex
	held   held
	writes chan heldWrite // room for one: the latest that is not written yet
	done   chan struct{}
}

type heldWrite struct {
	held
	written chan<- error // nil: nobody waits
}

// Hold writes that this process has the file now, and that it goes on with a lease. If it fails,
// the file must not be used, and that lease neither.
func (f *File) Hold(election, identity string, lease Lease, log *slog.Logger) (*Holder, error) {
	h := &Holder{
		held:   f.hold(election, identity),
		writes: make(chan heldWrite, 1), done: make(chan struct{}),
	}
	h.held.set(lease)
	if err := write(f.fd, &h.held); err != nil {
		return nil, err
	}
	go h.run(f.fd, log)
	return h, nil
}

func (h *held) set(l Lease) {
	h.Lease, h.TTL, h.Created, h.Releasing = leaseID(l.ID), int64(l.TTL), l.Created, l.Releasing
}

func (h *Holder) run(fd int, log *slog.Logger) {
	defer close(h.done)
	for w := range h.writes {
		err := write(fd, &w.held)
		if w.written != nil {
			w.written <- err
		} else if err != nil {
			log.Warn("write the lease into the state file: "+
				"if this process is killed, its lease has to expire", "err", err)
		}
	}
}

// Leased notes which lease the process has; 0: none. It does not block.
func (h *Holder) Leased(id int64, ttl time.Duration) {
	h.change(nil, func(l *held) {
		if id == int64(l.Lease) {
			l.TTL = int64(ttl)
		} else {
			l.set(Lease{ID: id, TTL: ttl})
		}
	})
}

// Entered notes the create revision of the key. It does not block.
func (h *Holder) Entered(created int64) {
	h.change(nil, func(l *held) { l.Created = created })
}

// Releasing notes that the lease is given back from now on. It fails if that is not written soon.
func (h *Holder) Releasing(lease int64) error {
	if h == nil {
		return nil
	}
	written := make(chan error, 1)
	h.change(written, func(l *held) {
		if int64(l.Lease) == lease {
			l.Releasing = true
		}
	})
	timer := time.NewTimer(releaseTime)
	defer timer.Stop()
	select {
	case err := <-written:
		return err
	case <-timer.C:
		return fmt.Errorf("the state file was not written within %v", releaseTime)
	}
}

// change has what follows from it written.
func (h *Holder) change(written chan<- error, f func(*held)) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.held)
	select {
	case <-h.writes: // a later one counts
	default:
	}
	h.writes <- heldWrite{h.held, written}
}

// Close waits until the last change is written, for d at most.
func (h *Holder) Close(d time.Duration) {
	if h == nil {
		return
	}
	close(h.writes)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-h.done:
	case <-timer.C:
	}
}
