//go:build linux

package recovery

import (
	"bytes"
	"strings"
	"testing"
)

func testRecord() *Record {
	return &Record{
		Place: Place{
			BootID: "b007", PID: 7, PidNS: 11, CgroupNS: 12, CgroupRoot: 1,
		},
		Cgroup: "/system.slice/a.service", CgroupIno: 13,
		Election: "jobs/<a> & \"b\"", Identity: "host", Lease: 0x1f,
		File: fileID{Device: 14, Inode: 15, Born: 16},
	}
}

func encoded(t testing.TB, r *Record) []byte {
	t.Helper()
	content, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func decodeRecord(content []byte) (*Record, error) {
	r := &Record{}
	return r, decode(head, content, r)
}

// TestRecord: what was written is read. A lease is written over another one.
func TestRecord(t *testing.T) {
	for _, lease := range []fixed{0, 1, 1<<63 - 1, -1 << 63} {
		r := testRecord()
		length := len(encoded(t, r))
		r.Lease = lease
		content := encoded(t, r)
		got, err := decodeRecord(content)
		if err != nil || *got != *r {
			t.Errorf("%+v, %v, want %+v", got, err, r)
		}
		if len(content) != length {
			t.Errorf("lease %x: %d bytes, want %d", lease, len(content), length)
		}
	}
}

// TestRecord_Damaged: nothing is read that was not written as a whole.
func TestRecord_Damaged(t *testing.T) {
	content := encoded(t, testRecord())
	for n := range content {
		if r, err := decodeRecord(content[:n]); err == nil {
			t.Fatalf("the first %d bytes: %+v", n, r)
		}
		flipped := bytes.Clone(content)
		flipped[n] ^= 1
		if r, err := decodeRecord(flipped); err == nil {
			t.Fatalf("byte %d flipped: %+v", n, r)
		}
	}
	for _, more := range []string{"\n", "{}", "\x00"} {
		if r, err := decodeRecord(append(bytes.Clone(content), more...)); err == nil {
			t.Errorf("with %q after it: %+v", more, r)
		}
	}
}

// TestRecord_Unwritable: what would not be read again is not written.
func TestRecord_Unwritable(t *testing.T) {
	for _, change := range []func(*Record){
		func(r *Record) { r.Cgroup = "/\xff" },
		func(r *Record) { r.Identity = "\xff" },
		func(r *Record) { r.Election = strings.Repeat("a", maxRecord) },
	} {
		r := testRecord()
		change(r)
		if _, err := r.encode(); err == nil {
			t.Errorf("%.50q %.50q %.50q: written", r.Cgroup, r.Election, r.Identity)
		}
	}
}
