//go:build linux

package recovery

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestProve: what counts as a proof, and what does not. The cgroup of the Record is a directory of
// the test's.
func TestProve(t *testing.T) {
	const empty, populated = "populated 0\nfrozen 0\n", "populated 1\nfrozen 0\n"
	for _, c := range []struct {
		what   string
		change func(r *Record, now *Place)
		events string // of the cgroup that is there now; "": there is none
		proof  string // "": none
	}{
		{"the cgroup is empty", nil, empty, "its cgroup is empty"},
		{"the cgroup is gone", nil, "", "its cgroup is empty"},
		{"a process is left", nil, populated, ""},
		{"the next daemon is in the same cgroup", func(r *Record, now *Place) {
			now.own = r.Cgroup + "/leasehold-1"
		}, populated, ""},
		{"the cgroup was removed and made again", func(r *Record, now *Place) {
			r.CgroupIno++
			now.own = r.Cgroup
		}, populated, "its cgroup is empty"},
		{"the job can leave", func(r *Record, _ *Place) { r.CanLeave = "as root" }, empty, ""},
		{"no cgroup is known", func(r *Record, _ *Place) { r.Cgroup = "" }, empty, ""},
		{"another pid namespace", func(_ *Record, now *Place) { now.PidNS++ }, "", ""},
		{"another cgroup namespace", func(_ *Record, now *Place) { now.CgroupNS++ }, "", ""},
		{"another root of cgroups", func(_ *Record, now *Place) { now.CgroupRoot++ }, "", ""},
		{"no cgroups to be seen", func(r *Record, now *Place) {
			r.Place.CgroupRoot, now.CgroupRoot = 0, 0
		}, "", ""},

		{"process 1", func(r *Record, now *Place) {
			r.Place.PID, r.CanLeave = 1, "as root"
			now.PidNS++
		}, populated, "process 1"},
		{"process 1, on another machine or after a restart", func(r *Record, now *Place) {
			r.Place.PID, r.Place.PidNS = 1, 5
			now.BootID = "another"
		}, empty, ""},

		{"the machine was started again, or is a clone", func(_ *Record, now *Place) {
			now.BootID = "another"
		}, empty, ""},
		{"no pid namespace", func(r *Record, now *Place) {
			r.Place.PidNS, now.PidNS = 0, 0
		}, empty, ""},
		{"no cgroup namespace", func(r *Record, now *Place) {
			r.Place.CgroupNS, now.CgroupNS = 0, 0
		}, empty, ""},
		{"no boot id", func(r *Record, now *Place) {
			r.Place.PID, r.Place.BootID, now.BootID = 1, "", ""
		}, "", ""},
		{"no boot id now", func(_ *Record, now *Place) { now.BootID = "" }, "", ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			r := testRecord()
			now := r.Place
			now.mount, now.own = t.TempDir(), "/system.slice/b.service"
			if c.events != "" {
				dir := filepath.Join(now.mount, r.Cgroup)
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				events := filepath.Join(dir, "cgroup.events")
				if err := os.WriteFile(events, []byte(c.events), 0o644); err != nil {
					t.Fatal(err)
				}
				r.CgroupIno = inode(dir)
			}
			if c.change != nil {
				c.change(r, &now)
			}
			proof, err := r.prove(now)
			if (err == nil) != (c.proof != "") || !strings.Contains(proof, c.proof) {
				t.Errorf("%q, %v, want %q", proof, err, c.proof)
			}
		})
	}
}

// TestWithin: a name that begins like another is not within it.
func TestWithin(t *testing.T) {
	for _, c := range []struct {
		inner, outer string
		want         bool
	}{
		{"/a/b", "/a", true},
		{"/a", "/a", true},
		{"/ab", "/a", false},
		{"/a", "/", true},
		{"/", "/a", false},
	} {
		if got := within(c.inner, c.outer); got != c.want {
			t.Errorf("%s within %s: %v", c.inner, c.outer, got)
		}
	}
}

// TestHere: this process is where it is.
func TestHere(t *testing.T) {
	p := here()
	if p.BootID == "" || p.PID != unix.Getpid() || p.PidNS == 0 || p.CgroupNS == 0 {
		t.Errorf("%+v", p)
	}
	if p != here() {
		t.Errorf("%+v, and then %+v", p, here())
	}
}
