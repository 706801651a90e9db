//go:build linux

package proctree

import (
	"iter"
	"strings"
)

// mount is a line of mountinfo, as far as we need it.
type mount struct {
	root    string // the part of the file system that is mounted
	point   string // where
	fsType  string
	options string // of the file system, separated by commas
}

// eachMount reads the text of /proc/self/mountinfo (proc_pid_mountinfo(5)). A line is
//
//	42 32 0:37 ROOT POINT options… - TYPE SOURCE OPTIONS
//
// with one space between two fields. SOURCE may be empty. Fields may hold any white space except
// those that mountEscapes undoes.
func eachMount(mounts string) iter.Seq[mount] {
	return func(yield func(mount) bool) {
		for line := range strings.Lines(mounts) {
			before, after, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
			fields, more := strings.Split(before, " "), strings.Split(after, " ")
			if len(fields) < 5 || len(more) < 3 {
				continue
			}
			if !yield(mount{
				root: mountEscapes.Replace(fields[3]), point: mountEscapes.Replace(fields[4]),
				fsType: more[0], options: more[2],
			}) {
				return
			}
		}
	}
}

// mountEscapes undoes the escapes of root and point.
var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
