//go:build linux

package proctree

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzStat: a process gives itself a name, and no name changes what its stat shows beside it. A
// text that the kernel does not write makes no crash.
func FuzzStat(f *testing.F) {
	f.Add([]byte("sh"), byte('S'), 1, 0, 1, 12345)
	f.Add([]byte("x) R 1 (y"), byte('Z'), 4711, 0x4, 3, 0)
	f.Add([]byte("a b\n) "), byte('X'), 0, 0x00200044, 0, 1<<40)
	f.Add([]byte("1 (sh) S 1 1 1 0 -1 4194560"), byte('D'), 2, 0, 1, 7)
	f.Fuzz(func(t *testing.T, name []byte, state byte, ppid, flags, threads, started int) {
		parseStat(name)
		numbers := []*int{&ppid, &flags, &threads, &started}
		for _, n := range numbers {
			*n = max(*n, -(*n + 1)) // none of these is ever negative
		}
		state = 'A' + state%('Z'-'A'+1)
		text := fmt.Appendf(nil,
			"4711 (%s) %c %d 4711 4711 34816 -1 %d 100 0 0 0 1 2 0 0 20 0 %d 0 %d 1000 200\n",
			name, state, ppid, flags, threads, started)
		want := process{
			ppid: ppid, alive: state != 'Z' && state != 'X' || threads > 1,
			exiting: flags&0x4 != 0, kernel: flags&0x00200000 != 0, started: started,
		}
		if got := parseStat(text); got != want {
			t.Errorf("%q: %+v, want %+v", text, got, want)
		}
		for i := range text {
			parseStat(text[:i])
		}
	})
}

// FuzzChildren: the numbers of a list of children are the same wherever a read ends.
func FuzzChildren(f *testing.F) {
	f.Add([]byte(""))
	f.Add([]byte("1 22 333 "))
	f.Add([]byte(strings.Repeat("4194303 ", 300)))
	f.Add([]byte("1 x2,3"))
	fd, err := unix.MemfdCreate("children", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = unix.Close(fd) })
	var s Scanner
	f.Fuzz(func(t *testing.T, text []byte) {
		var want []int
		noDigit := func(r rune) bool { return r < '0' || r > '9' }
		for word := range bytes.FieldsFuncSeq(text, noDigit) {
			n, _ := parseInt(word)
			want = append(want, n)
		}
		// The kernel writes a space after each number. One without is not whole.
		if n := len(text); n > 0 && text[n-1] >= '0' && text[n-1] <= '9' {
			want = want[:len(want)-1]
		}
		if err := unix.Ftruncate(fd, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pwrite(fd, text, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
			t.Fatal(err)
		}
		var got []int
		s.eachListed(fd, func(_ *Scanner, v int) { got = append(got, v) })
		if !slices.Equal(got, want) || s.broken {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	})
}

// escapeMount is what the kernel does to a path in mountinfo (show_mountinfo of fs/proc_namespace.c
// calls mangle).
var escapeMount = strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)

// FuzzMounts: whoever may mount chooses names. No name hides that /proc hides processes, or leads
// to another cgroup. A text that the kernel does not write makes no crash.
func FuzzMounts(f *testing.F) {
	f.Add("/a/b", "/", "/sys/fs/cgroup", "cgroup2", "rw,nsdelegate", "hidepid=2")
	f.Add("/foo/bar", "/foo", "/mnt/a b", "", "rw", "hidepid=invisible")
	f.Add("/foobar", "/foo", "/proc", "x\ty", "hidepid=1", "hidepid=off")
	f.Add("/x/../y", "/x", "/mnt/a\rb\u0085", `\`, "rw", "rw,hidepid=0,hidepid=ptraceable")
	f.Fuzz(func(t *testing.T, path, root, point, source, options, hiding string) {
		_, _ = findCgroup(path, point)
		procHidden(source)
		// What the kernel never shows: a NUL, a path that does not begin with a slash or is not
		// clean, a newline in the name of a cgroup, and a space in options.
		path, root = strings.ReplaceAll(path, "\n", ""), strings.ReplaceAll(root, "\n", "")
		for _, p := range []*string{&path, &root, &point} {
			*p = filepath.Clean("/" + strings.ReplaceAll(*p, "\x00", ""))
		}
		source = escapeMount.Replace(strings.ReplaceAll(source, "\x00", ""))
		for _, o := range []*string{&options, &hiding} {
			*o = strings.Join(strings.FieldsFunc(*o, func(r rune) bool {
				return r == ' ' || r == '\n' || r == 0
			}), "")
		}
		mounts := fmt.Sprintf("42 32 0:37 %s %s rw,nosuid shared:9 master:1 - cgroup2 %s %s\n"+
			"43 32 0:38 / /proc rw - proc %[3]s %[5]s\n",
			escapeMount.Replace(root), escapeMount.Replace(point), source, options, hiding)

		dir, err := findCgroup("12:pids:/x\n0::"+path+"\n", mounts)
		want, within := "", root == "/" || path == root || strings.HasPrefix(path, root+"/")
		if within {
			want = filepath.Join(point, strings.TrimPrefix(path, strings.TrimSuffix(root, "/")))
		}
		if dir != want || (err == nil) != within {
			t.Errorf("%s in %q: %q, %v; want %q", path, mounts, dir, err, want)
		}

		want = ""
		for _, option := range strings.Split(hiding, ",") {
			value, ok := strings.CutPrefix(option, "hidepid=")
			if ok && value != "0" && value != "off" {
				want = option
			}
		}
		if got := procHidden(mounts); got != want {
			t.Errorf("%q hides by %q, want %q", mounts, got, want)
		}
	})
}
