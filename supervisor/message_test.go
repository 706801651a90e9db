//go:build linux

package supervisor

import (
	"strings"
	"testing"

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

func TestMessage_ArrivesWhole(t *testing.T) {
	r, w := newTestPipe(t)
	var buf [maxMessage]byte
	sent := []message{
		{kind: msgPing, a: 1},
		{kind: msgStart, a: -1, b: 1 << 62, c: 3, d: 4, text: []byte(strings.Repeat("k", 1100))},
		{kind: msgStatus, text: []byte(strings.Repeat("s", maxText))},
		{kind: msgStatus, text: []byte(strings.Repeat("t", 2*maxText))}, // cut at maxText
		{kind: msgExit, a: 70},
	}
	for _, m := range sent {
		if err := send(w, &buf, m); err != nil {
			t.Fatal(err)
		}
	}
	var in inbox
	var got []message
	for len(got) < len(sent) {
		more, err := in.fill(r)
		if err != nil || !more {
			t.Fatalf("%d of %d messages, then %v", len(got), len(sent), err)
		}
		for m, ok := in.next(); ok; m, ok = in.next() {
			i := len(got)
			want := sent[i]
			want.text = want.text[:min(len(want.text), maxText)]
			if m.kind != want.kind || m.a != want.a || m.b != want.b || m.c != want.c || m.d != want.d || string(m.text) != string(want.text) {
				t.Errorf("message %d arrived as %+v", i, m)
			}
			got = append(got, m)
		}
	}
}

// TestMessage_FullPipe: nobody reads, and the sender is told at once instead of being held up.
func TestMessage_FullPipe(t *testing.T) {
	r, w := newTestPipe(t)
	var buf [maxMessage]byte
	sent := 0
	for send(w, &buf, message{kind: msgPing, a: int64(sent)}) == nil {
		if sent++; sent > 1<<16 {
			t.Fatal("the pipe is never full")
		}
	}
	var in inbox
	for n := 0; n < sent; n++ { // all that was taken arrives, in order
		m, ok := in.next()
		for !ok {
			if more, err := in.fill(r); !more || err != nil {
				t.Fatalf("%d of %d messages", n, sent)
			}
			m, ok = in.next()
		}
		if m.a != int64(n) {
			t.Fatalf("message %d arrived as number %d", m.a, n)
		}
	}
}
