package election

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// newTestMachine makes a machine that is in a state.
func newTestMachine(t *testing.T, state State) *machine {
	t.Helper()
	metrics, err := newMetrics(nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine(Config{
		Logger: slog.New(slog.DiscardHandler),
		Now:    func() time.Duration { return 0 },
	})
	m.metrics = metrics
	m.leased(1, time.Minute, Deadlines{StopAt: time.Second})
	switch state {
	case Connecting:
	case Standby:
		m.queued()
	case Leading, Suspended, Stopping:
		m.elected(&term{end: func(error) {}, lost: make(chan struct{})}, Entry{})
		if state == Stopping {
			m.termEnded(errors.New("planned"))
		}
		if state == Suspended {
			m.suspended()
		}
	}
	return m
}

// Each event in each state: where it leads, or that it can't be ("").
func TestMachine(t *testing.T) {
	events := map[string]func(*machine){
		"connecting":        func(m *machine) { m.connecting("why") },
		"campaigning again": (*machine).campaigningAgain,
		"queued":            (*machine).queued,
		"entry lost":        func(m *machine) { m.entryLost(ErrKeyDeleted) },
		"elected":           func(m *machine) { m.elected(&term{}, Entry{}) },
		"adopted":           func(m *machine) { m.adopted(&term{}, Entry{}) },
		"suspended":         func(m *machine) { m.suspended() },
		"renewed":           func(m *machine) { m.renewed(Deadlines{StopAt: time.Second}) },
		"renewed too late":  func(m *machine) { m.renewed(Deadlines{}) },
		"term ended":        func(m *machine) { m.termEnded(ErrContactLost) },
		"lead returned":     func(m *machine) { m.leadReturned(nil) },
		"run ended":         (*machine).runEnded,
	}
	states := []State{Connecting, Standby, Leading, Suspended, Stopping}
	for name, next := range map[string][]State{
		"connecting":        {Connecting, Connecting, "", "", Connecting},
		"campaigning again": {Connecting, Connecting, "", "", Connecting},
		"queued":            {Standby, Standby, "", "", ""},
		"entry lost":        {Connecting, Connecting, "", "", ""},
		"elected":           {Leading, Leading, "", "", ""},
		"adopted":           {Leading, "", "", "", ""},
		"suspended":         {Connecting, Standby, Suspended, Suspended, Stopping},
		"renewed":           {Connecting, Standby, Leading, Leading, Stopping},
		"renewed too late":  {Connecting, Standby, Leading, Suspended, Stopping},
		// No term runs, at first.
		"term ended":    {Connecting, Standby, Stopping, Stopping, Stopping},
		"lead returned": {"", "", Stopping, Stopping, Stopping},
		"run ended":     {Stopping, Stopping, "", "", Stopping},
	} {
		for i, want := range next {
			m := newTestMachine(t, states[i])
			var got State
			func() {
				defer func() {
					if recover() != nil {
						got = ""
					}
				}()
				events[name](m)
				got = m.get().State
			}()
			if got != want {
				t.Errorf("%s while %s: %q, want %q", name, states[i], got, want)
			}
		}
	}
}

// That an entry is lost is logged also where the lease had expired before: the candidate is
// Connecting by then.
func TestMachine_EntryLostIsLogged(t *testing.T) {
	for _, state := range []State{Standby, Connecting} {
		m := newTestMachine(t, state)
		before := m.get().Since
		var log bytes.Buffer
		m.log = slog.New(slog.NewTextHandler(&log, nil))
		m.entryLost(ErrLeaseLost)
		if got := log.String(); strings.Count(got, "queue entry lost") != 1 ||
			!strings.Contains(got, "level=WARN") || !strings.Contains(got, ErrLeaseLost.Error()) {
			t.Errorf("%s: the log is %q", state, got)
		}
		if isNew := m.get().Since != before; isNew != (state != Connecting) {
			t.Errorf("%s: a new Since: %v", state, isNew)
		}
	}
}

// A log that blocks does not keep anybody from what is known.
func TestMachine_LogBlocks(t *testing.T) {
	m := newTestMachine(t, Connecting)
	r, w := io.Pipe()
	m.log = slog.New(slog.NewTextHandler(w, nil))
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.queued()
	}()
	if _, err := r.Read(make([]byte, 1)); err != nil { // the line is being written
		t.Fatal(err)
	}
	if got := m.get().State; got != Standby {
		t.Errorf("state %s", got)
	}
	_ = r.Close()
	<-done
}

// Whoever has won too late does not lead.
func TestMachine_ElectedAfterStopAt(t *testing.T) {
	m := newTestMachine(t, Standby)
	m.now = func() time.Duration { return time.Second }
	if _, begun := m.elected(&term{}, Entry{}); begun || m.get().State != Standby {
		t.Errorf("begun: %v, %+v", begun, m.get())
	}
}

// The first cause ends the term; a loss that follows is passed on all the same.
func TestMachine_LostAfterItsEnd(t *testing.T) {
	m := newTestMachine(t, Connecting)
	var causes []error
	running := &term{
		end: func(cause error) { causes = append(causes, cause) }, lost: make(chan struct{}),
	}
	m.elected(running, Entry{})
	if !m.renewed(Deadlines{StopAt: 2 * time.Second}) {
		t.Error("a renewal does not extend the term")
	}
	m.termEnded(ErrContactLost)
	if m.renewed(Deadlines{StopAt: 3 * time.Second}) {
		t.Error("a renewal extends a term that stop-at has ended")
	}
	m.termEnded(ErrKeyDeleted)
	m.termEnded(ErrLeaseLost)
	if len(causes) != 1 || !errors.Is(causes[0], ErrContactLost) {
		t.Errorf("the term ended with %v", causes)
	}
	select {
	case <-running.lost:
	default:
		t.Error("the loss is not passed on")
	}
}

// A term that is suspended goes on with a renewal, and does so no more once it is over.
func TestMachine_Suspended(t *testing.T) {
	m := newTestMachine(t, Suspended)
	if !m.get().Leading {
		t.Error("a term that is suspended counts as lost or given up")
	}
	if m.renewed(Deadlines{}) {
		t.Error("a renewal extends the term, and its stop-at has passed")
	}
	if !m.renewed(Deadlines{StopAt: time.Second}) {
		t.Error("a renewal does not extend the term")
	}
	m.suspended()
	m.termEnded(errors.New("planned"))
	if m.renewed(Deadlines{StopAt: time.Second}) || m.suspended() {
		t.Error("the term goes on after its end")
	}
}
