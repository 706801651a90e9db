//go:build linux

package ipc

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newTestPipe(t *testing.T) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(p[0]); _ = unix.Close(p[1]) })
	return p[0], p[1]
}

// decode returns the value of a message.
func decode(m Message) any {
	switch m.Kind {
	case KindReady:
		return Ready{}
	case KindLease:
		return m.Lease()
	case KindEntered:
		return m.Entered()
	case KindRestarts:
		return m.Restarts()
	case KindRecord:
		return m.Record()
	case KindToken:
		return Token{Value: bytes.Clone(m.Token().Value)}
	case KindStart:
		return m.Start()
	case KindExtend:
		return m.Extend()
	case KindStop:
		return m.Stop()
	case KindPing:
		return m.Ping()
	case KindStatus:
		return m.Status()
	case KindExiting:
		return m.Exiting()
	case KindStarted:
		return m.Started()
	case KindRefused:
		return m.Refused()
	case KindExited:
		return m.Exited()
	case KindGone:
		return m.Gone()
	case KindPong:
		return m.Pong()
	case KindSignal:
		return m.Signal()
	case KindTimerLatency:
		return m.TimerLatency()
	case KindFrozen:
		return m.Frozen()
	case KindThawed:
		return Thawed{}
	case KindEnding:
		return Ending{}
	}
	return nil
}

// eachMessage has one message of each type.
func eachMessage() []any {
	return []any{
		Ready{},
		Lease{ID: -1, TTL: time.Second},
		Lease{ID: 1, TTL: time.Minute, Releasing: true},
		Entered{Key: strings.Repeat("e", 1100), Created: 1 << 61},
		Restarts{Count: 14, Failures: 15, Backoff: 16},
		fullRecord(),
		Record{Version: RecordVersion},
		Token{Value: []byte("secret")},
		Start{Key: strings.Repeat("k", 1100), Token: 1 << 62, LeaseID: -2, StopAt: 3, KillBy: 4},
		Extend{StopAt: 5, KillBy: 6},
		Stop{Grace: UntilKillBy},
		Ping{Number: 7},
		Status{Text: strings.Repeat("s", MaxText)},
		Exiting{Code: 70, Why: "why"},
		Started{PID: 8, At: 17},
		Refused{Code: 127, Why: "no such file"},
		Exited{Code: 137, Signal: 9},
		Gone{Elapsed: 10, Reason: KilledSpawner, Ordered: true},
		Gone{Elapsed: 11},
		Pong{Number: 12},
		Signal{Signal: unix.SIGTERM},
		TimerLatency{By: 13},
		Frozen{StopAt: 14},
		Thawed{},
		Ending{},
	}
}

// fullRecord is a Record in which every field has a value of its own.
func fullRecord() Record {
	return Record{
		Version: 1, Lease: Lease{ID: 2, TTL: 3, Releasing: true},
		Entered: Entered{Key: strings.Repeat("r", 1100), Created: 4},
		Job:     JobRunning, PID: 5, StartedAt: 6, StopAt: 7, KillBy: 8, Due: 9, Ordered: true,
		Serial: 10, Starts: 11, Restarts: Restarts{Count: 12, Failures: 13, Backoff: 14},
		LastExit: RecordedExit{
			Exited: Exited{Code: 15, Signal: 16}, Errno: 17, At: 18, Ran: 19, Ordered: true,
		},
		StopSignals: 20, Exited: 21, Silent: 22, Recovered: 23, Reloaded: 24,
		JobReady: JobReady{Passed: true, Notified: true}, Unhealthy: true,
	}
}

// TestRecord_HasAll: a field that the test does not fill, or that does not arrive, is noticed.
func TestRecord_HasAll(t *testing.T) {
	seen := map[int64]string{}
	var check func(name string, v reflect.Value)
	check = func(name string, v reflect.Value) {
		switch {
		case v.Kind() == reflect.Struct:
			for i := range v.NumField() {
				check(name+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case v.IsZero():
			t.Errorf("%s has no value", name)
		case v.CanInt() && v.Type() != reflect.TypeFor[JobPhase]():
			if other, twice := seen[v.Int()]; twice {
				t.Errorf("%s and %s have the same value", name, other)
			}
			seen[v.Int()] = name
		}
	}
	check("Record", reflect.ValueOf(fullRecord()))
}

func TestMessage_ArrivesWhole(t *testing.T) {
	r, w := newTestPipe(t)
	out, in := Outbox{FD: w}, Inbox{}
	sent := eachMessage()
	for _, m := range sent {
		if err := out.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	for got := 0; got < len(sent); {
		more, err := in.Fill(r)
		if err != nil || !more {
			t.Fatalf("%d of %d messages, then %v", got, len(sent), err)
		}
		for m, ok := in.Next(); ok; m, ok = in.Next() {
			if v := decode(m.Clone()); !reflect.DeepEqual(v, sent[got]) {
				t.Errorf("%#v arrived as %#v", sent[got], v)
			}
			got++
		}
	}
}

func TestMessage_LongTextIsCut(t *testing.T) {
	r, w := newTestPipe(t)
	out, in := Outbox{FD: w}, Inbox{}
	if err := out.Send(Status{Text: strings.Repeat("t", 2*MaxText)}); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Fill(r); err != nil {
		t.Fatal(err)
	}
	if m, ok := in.Next(); !ok || m.Status().Text != strings.Repeat("t", MaxText) {
		t.Errorf("%d bytes arrived, want %d", len(m.text), MaxText)
	}
}

// TestOutbox_FullPipe: nobody reads, and the sender is told at once instead of being held up.
func TestOutbox_FullPipe(t *testing.T) {
	r, w := newTestPipe(t)
	out, in := Outbox{FD: w}, Inbox{}
	sent := 0
	var err error
	for ; err == nil; err = out.Send(Ping{Number: int64(sent)}) {
		if sent++; sent > 1<<16 {
			t.Fatal("the pipe is never full")
		}
	}
	if !errors.Is(err, ErrFull) {
		t.Fatalf("%v, want %v", err, ErrFull)
	}
	for n := 1; n < sent; n++ { // all that was taken arrives, in order
		m, ok := in.Next()
		for !ok {
			if more, err := in.Fill(r); !more || err != nil {
				t.Fatalf("%d of %d messages", n, sent)
			}
			m, ok = in.Next()
		}
		if m.Ping().Number != int64(n) {
			t.Fatalf("message %d arrived as number %d", m.Ping().Number, n)
		}
	}
}

func TestOutbox_ClosedPipe(t *testing.T) {
	r, w := newTestPipe(t)
	out, in := Outbox{FD: w}, Inbox{}
	_ = unix.Close(r)
	if err := out.Send(Ready{}); !errors.Is(err, ErrClosed) {
		t.Errorf("%v, want %v", err, ErrClosed)
	}
	r, w = newTestPipe(t)
	_ = unix.Close(w)
	if _, err := in.Fill(r); !errors.Is(err, ErrClosed) {
		t.Errorf("%v, want %v", err, ErrClosed)
	}
}

// TestInbox_NoMessage: after a length that no message has, nothing can be read any more. The reader
// sees at once that no message comes any more.
func TestInbox_NoMessage(t *testing.T) {
	for _, text := range []string{"\x00\x00", "\x23\x00", "\x01\x10", "\xff\xff"} {
		r, w := newTestPipe(t)
		if _, err := unix.Write(w, []byte(text)); err != nil {
			t.Fatal(err)
		}
		in := Inbox{}
		if more, err := in.Fill(r); !more || err != nil {
			t.Fatal(more, err)
		}
		if m, ok := in.Next(); ok {
			t.Errorf("%q is a message: %+v", text, m)
		}
		if _, err := in.Fill(r); !errors.Is(err, ErrClosed) {
			t.Errorf("%q: %v, want %v", text, err, ErrClosed)
		}
	}
}

// TestMessage_AllocatesNothing: the guard sends and receives without garbage. The texts that the
// elector sends once, at a start or at its end, are excepted.
func TestMessage_AllocatesNothing(t *testing.T) {
	r, w := newTestPipe(t)
	out, in := Outbox{FD: w}, Inbox{}
	token, sum := make([]byte, 100), 0
	why := "text file busy"
	record := fullRecord()
	round := func() {
		n := int64(sum)
		_ = out.Send(Lease{ID: n, TTL: time.Duration(n)})
		_ = out.Send(Token{Value: token})
		_ = out.Send(Extend{StopAt: time.Duration(n), KillBy: 2})
		_ = out.Send(Stop{Grace: time.Duration(n)})
		_ = out.Send(Ping{Number: n})
		_ = out.Send(record)
		_ = out.Send(Restarts{Count: sum})
		_ = out.Send(Started{PID: sum})
		_ = out.Send(Refused{Code: sum, Why: why})
		_ = out.Send(Exited{Code: sum})
		_ = out.Send(Gone{Elapsed: time.Duration(n), Ordered: true})
		_ = out.Send(Pong{Number: n})
		_ = out.Send(Signal{Signal: unix.SIGTERM})
		_ = out.Send(TimerLatency{By: time.Duration(n)})
		if more, err := in.Fill(r); !more || err != nil {
			t.Fatal(more, err)
		}
		for m, ok := in.Next(); ok; m, ok = in.Next() {
			sum++
			switch m.Kind {
			case KindLease:
				sum += int(m.Lease().ID & 1)
			case KindToken:
				sum += len(m.Token().Value)
			case KindExtend:
				sum += int(m.Extend().KillBy)
			case KindStop:
				sum += int(m.Stop().Grace & 1)
			case KindPing:
				sum += int(m.Ping().Number & 1)
			}
		}
	}
	if allocs := testing.AllocsPerRun(100, round); allocs != 0 {
		t.Errorf("a round allocates %v times", allocs)
	}
}

// TestOutbox_Errors: only a reader that has gone closes the pipe. After any other error the peer
// may still run, and it must not be taken for gone.
func TestOutbox_Errors(t *testing.T) {
	out := Outbox{FD: -1}
	if err := out.Send(Ready{}); !errors.Is(err, ErrFull) {
		t.Errorf("a write that fails: %v", err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[1])
	_ = unix.Close(pipe[0])
	out.FD = pipe[1]
	if err := out.Send(Ready{}); !errors.Is(err, ErrClosed) {
		t.Errorf("no reader: %v", err)
	}
}
