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
	return procHidden(string(mounts))
}

// procHidden is ProcHidden for a process whose mountinfo has this text.
func procHidden(mounts string) string {
	hidden := ""
	for m := range eachMount(mounts) {
		if m.point != "/proc" {
			continue
		}
		hidden = "" // the last mount there is the one that is seen
		for option := range strings.SplitSeq(m.options, ",") {
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
