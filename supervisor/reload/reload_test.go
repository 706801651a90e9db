//go:build linux

package reload

import (
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestResult_Arrives(t *testing.T) {
	for _, r := range []Result{
		{Refused: "no such luck"},
		{Version: "1.2", Env: []string{"A=b", "C=d\ne", "F="}},
		{Version: "", Env: []string{"A=b"}},
		{Version: "1.2", Env: []string{}},
	} {
		text := r.Encode()
		if got, err := DecodeResult(text); err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("%+v arrives as %+v, %v", r, got, err)
		}
		for n := range text { // it may have been killed while it wrote
			if got, err := DecodeResult(text[:n]); !errors.Is(err, ErrNoResult) {
				t.Errorf("%q is taken for %+v", text[:n], got)
			}
		}
	}
	for _, text := range []string{"", "\x00\x00", "a\x00b\x00\x00", refused + "\x00\x00\x00"} {
		if got, err := DecodeResult([]byte(text)); !errors.Is(err, ErrNoResult) {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
}

func TestOutcome_Arrives(t *testing.T) {
	for _, o := range []Outcome{{true, "1.2"}, {false, "no such luck"}, {true, ""}} {
		if got, ok := decodeOutcome(o.Encode()); !ok || got != o {
			t.Errorf("%+v arrives as %+v", o, got)
		}
	}
	for _, text := range []string{"", "x"} {
		if got, ok := decodeOutcome([]byte(text)); ok {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
}

// TestOutcome_RequestUnread: the guard refuses at once, and closes the connection before it has
// read the request. The refusal must not be lost.
func TestOutcome_RequestUnread(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, err := newAsker(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	a.conn = pair[0]
	defer a.close()
	want := Outcome{Text: "no such luck"}
	go func() {
		defer unix.Close(pair[1])
		asked := []unix.PollFd{{Fd: int32(pair[1]), Events: unix.POLLIN}}
		if _, err := unix.Poll(asked, -1); err != nil {
			t.Error(err)
		}
		if _, err := unix.Write(pair[1], want.Encode()); err != nil {
			t.Error(err)
		}
	}()
	if got, err := a.outcome(); err != nil || got != want {
		t.Errorf("the outcome is %+v, %v", got, err)
	}
}

func TestStartTime(t *testing.T) {
	stat := "7 (a ) b) S " + strings.Repeat("1 ", 18) + "4711 0 0"
	if got, err := startTime([]byte(stat)); err != nil || got != "4711" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := startTime([]byte("7 (a) S 1")); err == nil {
		t.Error("too few fields are taken")
	}
}

func TestSettings_Arrive(t *testing.T) {
	for _, entries := range [][]string{{"A=b", "C=d\ne", "F="}, {"A="}} {
		fd, err := newSettings(entries)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ReadSettings(fd)
		if err != nil || !slices.Equal(got, entries) {
			t.Errorf("%q arrive as %q, %v", entries, got, err)
		}
		if _, err := unix.Pwrite(fd, []byte("x"), 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("they can be changed: %v", err)
		}
		_ = unix.Close(fd)
	}
	fd, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, fd := range []int{fd, 0} {
		if got, err := ReadSettings(fd); err == nil {
			t.Errorf("%q are taken", got)
		}
	}
}
