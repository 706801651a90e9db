//go:build linux

package ipc

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

// received puts the text into a pipe, in pieces, and returns the messages that arrive. Each is
// decoded, except those of a kind that we do not know.
func received(t *testing.T, text []byte, piece int) (all []any) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	var in Inbox
	take := func() (more bool, err error) {
		more, err = in.Fill(p[0])
		for m, ok := in.Next(); ok; m, ok = in.Next() {
			if v := decode(m.Clone()); v != nil {
				all = append(all, v)
			}
		}
		return more, err
	}
	for more := true; len(text) > 0 && more; text = text[min(piece, len(text)):] {
		if _, err := unix.Write(p[1], text[:min(piece, len(text))]); err != nil {
			t.Fatal(err)
		}
		more, _ = take()
	}
	_ = unix.Close(p[1])
	for range 1 << 16 {
		if _, err := take(); errors.Is(err, ErrClosed) {
			return all
		}
	}
	t.Fatal("the inbox never ends")
	return nil
}

// FuzzInbox: whatever comes from a pipe, the same messages arrive however it was cut into pieces. A
// message that was sent again arrives as it was. A length that no message has ends the inbox.
func FuzzInbox(f *testing.F) {
	var stream []byte
	for _, m := range eachMessage() {
		var out Outbox
		one := out.buf[:out.encode(m)]
		f.Add(bytes.Clone(one), 7)
		stream = append(stream, one...)
	}
	f.Add(stream, 4000)
	f.Add([]byte("\x00\x00 no message has this length"), 1)
	f.Add([]byte("\xff\xff"), 1)
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		text = text[:min(len(text), 1<<15)]
		whole := received(t, text, 4*maxMessage)
		// The smallest pieces are not too many for a second.
		pieces := received(t, text, max(1, len(text)/256, piece&(maxMessage-1)))
		if !reflect.DeepEqual(pieces, whole) {
			t.Errorf("in pieces of %d: %#v, want %#v", piece, pieces, whole)
		}
		for _, m := range whole {
			var out Outbox
			sent := out.buf[:out.encode(m)]
			if again := received(t, sent, len(sent)); len(again) != 1 ||
				!reflect.DeepEqual(again[0], m) {
				t.Errorf("%#v arrives as %#v", m, again)
			}
			gone, ok := m.(Gone)
			if ok && (gone.Reason.Label() == "" || gone.Reason.String() == "") {
				t.Errorf("%#v has no name", gone.Reason)
			}
		}
	})
}

// FuzzSpawnerMessage: all 16 bytes count, in both directions.
func FuzzSpawnerMessage(f *testing.F) {
	f.Add(SpawnerStart, int32(1), int32(0), int32(0))
	f.Add(SpawnerExited, int32(7), int32(0x7f), int32(1))
	f.Fuzz(func(t *testing.T, kind, serial, value, extra int32) {
		sent := SpawnerMessage{kind, serial, value, extra}
		var got SpawnerMessage
		if n := copy(got.Bytes(), sent.Bytes()); n != SpawnerMessageLen || got != sent {
			t.Errorf("%d bytes: %+v, want %+v", n, got, sent)
		}
	})
}
