package election

import (
	"errors"
	"io"
	"log/slog"
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
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Now:    func() time.Duration { return 0 },
	})
	m.metrics = metrics
	m.leased(1, time.Minute, Deadlines{StopAt: time.Second})
	switch state {
	case Connecting:
	case Standby:
		m.queued()
	case Leading, Stopping:
		m.elected(&term{end: func(error) {}, lost: make(chan struct{})}, Entry{})
		if state == Stopping {
			m.termEnded(errors.New("planned"))
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
		"term ended":        func(m *machine) { m.termEnded(ErrContactLost) },
		"lead returned":     func(m *machine) { m.leadReturned(nil) },
		"run ended":         (*machine).runEnded,
	}
	states := []State{Connecting, Standby, Leading, Stopping}
	for name, next := range map[string][]State{
		"connecting":        {Connecting, Connecting, "", Connecting},
		"campaigning again": {Connecting, Connecting, "", Connecting},
		"queued":            {Standby, Standby, "", ""},
		"entry lost":        {Connecting, Connecting, "", ""},
		"elected":           {Leading, Leading, "", ""},
		"term ended":        {Connecting, Standby, Stopping, Stopping}, // none runs, at first
		"lead returned":     {"", "", Stopping, Stopping},
		"run ended":         {Stopping, Stopping, "", Stopping},
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
