//go:build linux

package cli

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode"

	"leasehold/control"
	"leasehold/internal/quote"
)

// TestWatchLine: whatever names and reasons hold, a line fits a terminal, and says what counts.
func TestWatchLine(t *testing.T) {
	long, lines := strings.Repeat("ü\x1b[2J", 99), strings.Repeat("\n", 64)
	for _, name := range []string{"b", "", long, lines} {
		asked := &control.Switchover{To: name, By: name, Why: name}
		for want, e := range map[string]control.Event{
			"leads, token 1234":     {Kind: control.LeaderEvent, What: control.Leads, Token: 1234},
			"nobody leads":          {Kind: control.LeaderEvent, What: control.Nobody},
			"joined, candidates: 7": {Kind: control.CandidatesEvent, What: control.Joined},
			"left, candidates: 7":   {Kind: control.CandidatesEvent, What: control.Left},
			"held by": {
				Kind: control.HoldEvent, What: control.Held,
				Hold: &control.Hold{By: name, Reason: name, Stop: true},
			},
			"released": {Kind: control.HoldEvent, What: control.Released},
			"asked by": {
				Kind: control.SwitchoverEvent, What: control.Asked, Switchover: asked,
			},
			"refused:": {
				Kind: control.SwitchoverEvent, What: string(control.Refused), Switchover: asked,
			},
			"it goes on here": {Kind: control.CompactedEvent, What: control.Resumed},
		} {
			e.Revision, e.Identity, e.Candidates = 123456789, name, 7
			line, ok := strings.CutSuffix(watchLine(e), "\n")
			if !ok || columns(line) > tableWidth || !strings.Contains(line, want) ||
				strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%q of %d columns, want %q", line, columns(line), want)
			}
			text, err := quote.JSON(newWatchEvent(e), "")
			var back watchEvent
			if err != nil || json.Unmarshal([]byte(text), &back) != nil ||
				strings.Count(text, "\n") != 1 {
				t.Errorf("%q, %v", text, err)
			}
			if e.Token != 0 && *back.Identity != name {
				t.Errorf("%q is read as %q", name, *back.Identity)
			}
		}
	}
}
