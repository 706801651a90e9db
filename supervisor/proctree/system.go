//go:build linux

package proctree

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ProcHidden returns the mount option by which /proc hides the processes of others, or "".
func ProcHidden() string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	hidden := ""
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		fields, options := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || fields[4] != "/proc" || len(options) < 3 {
			continue
		}
		hidden = "" // the last mount there is the one that is seen
		for option := range strings.SplitSeq(options[2], ",") {
			if value, ok := strings.CutPrefix(option,
				"hidepid="); ok && value != "0" && value != "off" {
				hidden = option
			}
		}
	}
	return hidden
}

// HasCapability reports whether this process has the capability in effect (capget(2)).
func HasCapability(capability int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}
