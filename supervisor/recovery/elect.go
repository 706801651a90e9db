//go:build linux

package recovery

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"leasehold/internal/boottime"
)

// Term is the term in which a `leasehold elect` leads. Deadlines are times since boot.
type Term struct {
	Lease  int64 // 0: it does not lead
	TTL    time.Duration
	Token  int64 // the create revision of its key
	StopAt time.Duration
	KillBy time.Duration
}

// App is whom the answers of elect are for, and what they promise. It has to be the same for two
// processes of which the second one goes on with the term of the first.
type App struct {
	Election, Identity string
	Contract           string // where the app asks, and for how long it may work
}

// held is what the state file of `leasehold elect` holds. All numbers have a fixed length, so that
// the file never changes its own.
type held struct {
	BootID string `json:"boot_id"`
	// NetNS is where the apps ask: on the loopback interface.
	NetNS fixed `json:"network_namespace"`
	// TimeNS has the clock of the deadlines; 0: the kernel knows none.
	TimeNS fixed `json:"time_namespace"`

	Election string `json:"election"`
	Identity string `json:"identity"`
	Contract string `json:"contract"`

	Lease  fixed `json:"lease"`
	TTL    fixed `json:"ttl"` // this one and the deadlines are nanoseconds
	Token  fixed `json:"token"`
	StopAt fixed `json:"stop_at"`
	KillBy fixed `json:"kill_by"`
	// Releasing is 1 when a request that deletes the key or revokes the lease may be under way.
	Releasing fixed `json:"releasing"`

	File fileID `json:"file"`
}

func (h *held) encode() ([]byte, error) {
	return encode(electHead, h, h.Election, h.Identity, h.Contract)
}

func (h *held) set(t Term) {
	h.Lease, h.TTL, h.Token = fixed(t.Lease), fixed(t.TTL), fixed(t.Token)
	h.StopAt, h.KillBy, h.Releasing = fixed(t.StopAt), fixed(t.KillBy), 0
}

// Held returns the term of the process before, to go on with it; one without a lease: there is
// none. It must be called before Hold. An error says why that term is left alone, and its lease has
// to expire.
//
// The lock is ours, so that process has exited. An app may have had the answer that it leads. It
// may work on for a while, and asks us now, if it is in our network namespace. Nothing may be
// revoked.
func (f *File) Held(app App) (Term, error) {
	content, err := read(f.fd)
	if err != nil || len(content) == 0 {
		return Term{}, err
	}
	var h held
	err = decode(electHead, content, &h)
	if err == nil {
		err = f.isOf(h.File, h.Election, h.Identity, app.Election, app.Identity)
	}
	if err != nil {
		return Term{}, err
	}
	switch now := f.hold(app); {
	case h.Lease == 0:
		return Term{}, nil
	case h.BootID != now.BootID:
		return Term{}, errors.New("the boot id is another one")
	case h.NetNS != now.NetNS:
		return Term{}, errors.New("an app in another network namespace may work for this lease")
	case h.TimeNS != now.TimeNS || time.Duration(h.StopAt) > boottime.Now()+time.Duration(h.TTL):
		return Term{}, errors.New("its deadlines are of another clock")
	case h.Contract != now.Contract:
		return Term{}, fmt.Errorf("other settings were in use: %s", h.Contract)
	case h.Releasing != 0:
		return Term{}, errors.New("it may be revoked at any moment")
	case time.Duration(h.StopAt) <= boottime.Now():
		return Term{}, errors.New("stop-at has passed")
	}
	return Term{
		Lease: int64(h.Lease), TTL: time.Duration(h.TTL), Token: int64(h.Token),
		StopAt: time.Duration(h.StopAt), KillBy: time.Duration(h.KillBy),
	}, nil
}

// hold is what this process writes before it leads.
func (f *File) hold(app App) held {
	return held{
		BootID: readLine(bootIDFile), NetNS: fixed(inode("/proc/self/ns/net")),
		TimeNS:   fixed(inode("/proc/self/ns/time")),
		Election: app.Election, Identity: app.Identity, Contract: app.Contract, File: f.id,
	}
}

// releaseTime bounds the wait for the disk before a release. The lease is renewed meanwhile.
const releaseTime = 5 * time.Second

// Holder writes into the state file which term `leasehold elect` has. A goroutine of its own
// writes, so that only the release of a term waits for the disk. All methods may be called on nil,
// which keeps nothing.
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

// Hold writes that this process has the file now, and that it goes on with a term. If it fails, the
// file must not be used, and that term neither.
func (f *File) Hold(app App, t Term, log *slog.Logger) (*Holder, error) {
	h := &Holder{
		held:   f.hold(app),
		writes: make(chan heldWrite, 1), done: make(chan struct{}),
	}
	if h.held.BootID == "" || h.held.NetNS == 0 {
		return nil, errors.New("the boot id or the network namespace can't be read")
	}
	h.held.set(t)
	if err := write(f.fd, &h.held); err != nil {
		return nil, err
	}
	go h.run(f.fd, log)
	return h, nil
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

// Leads notes a term that begins, or that the one before has ended if it has no lease. It does not
// block.
func (h *Holder) Leads(t Term) {
	h.change(func(l *held) bool {
		before := *l
		l.set(t)
		return *l != before
	}, nil)
}

// Extended notes later deadlines. It does not block. If they are not written in time, the next
// process has earlier ones. Deadlines of no term are dropped.
func (h *Holder) Extended(stopAt, killBy time.Duration) {
	h.change(func(l *held) bool {
		l.StopAt, l.KillBy = fixed(stopAt), fixed(killBy)
		return l.Lease != 0
	}, nil)
}

// Lost notes that the lease or the key is gone, or may be at any moment. It does not block.
func (h *Holder) Lost(lease int64) { h.change(releasing(lease), nil) }

func releasing(lease int64) func(*held) bool {
	return func(l *held) bool {
		l.Releasing = 1
		return int64(l.Lease) == lease
	}
}

// Releasing notes that the lease is given back from now on. It fails if that is not written in
// time. A lease under which no term has begun is in no file.
func (h *Holder) Releasing(lease int64) error {
	written := make(chan error, 1)
	if !h.change(releasing(lease), written) {
		return nil
	}
	timer := time.NewTimer(releaseTime)
	defer timer.Stop()
	select {
	case err := <-written:
		return err
	case <-timer.C:
		return fmt.Errorf("the state file was not written within %v", releaseTime)
	}
}

// change has what follows from it written, if it returns true, and returns that.
func (h *Holder) change(f func(*held) bool, written chan<- error) bool {
	if h == nil {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	changed := h.held
	if !f(&changed) {
		return false
	}
	h.held = changed
	select {
	case before := <-h.writes: // a later one counts
		if written == nil {
			written = before.written
		}
	default:
	}
	h.writes <- heldWrite{changed, written}
	return true
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
