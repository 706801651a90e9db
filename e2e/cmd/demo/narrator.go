//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"leasehold/e2e/harness"
)

// narrator tells the story. The counts of the job that it listens to follow each other on one line
// until something else is told. What a job has said before is not lost.
type narrator struct {
	mu     sync.Mutex
	story  strings.Builder
	heard  string   // the job that it listens to
	unsaid []string // lines of jobs that it does not listen to, yet
	within bool     // a line of counts that has no end yet
}

const column = 10 // for the time since the fault

// say tells something, with the time that it took unless that is 0.
func (n *narrator) say(took time.Duration, format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	after := ""
	if took != 0 {
		after = "+" + span(took)
	}
	n.endLine()
	n.write("%-*s%s\n", column, after, fmt.Sprintf(format, args...))
}

// listen turns to another job. There is none with token 0.
func (n *narrator) listen(to harness.Life) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.endLine()
	n.heard = fmt.Sprintf("job of %s, token %d", to.Candidate, to.Token)
	n.tellCounts()
}

// Write takes lines of jobs, whole ones as a pipe has them: who it is, a colon, a count.
func (n *narrator) Write(lines []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.unsaid = slices.AppendSeq(n.unsaid, strings.Lines(string(lines)))
	n.tellCounts()
	return len(lines), nil
}

func (n *narrator) tellCounts() {
	n.unsaid = slices.DeleteFunc(n.unsaid, func(line string) bool {
		job, count, _ := strings.Cut(strings.TrimSpace(line), ":")
		if job != n.heard {
			return false
		}
		if !n.within {
			n.write("%*s%s:", column, "", job)
		}
		n.within = true
		n.write("%s", count)
		return true
	})
}

func (n *narrator) endLine() {
	if n.within {
		n.write("\n")
	}
	n.within = false
}

func (n *narrator) write(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Print(text)
	n.story.WriteString(text)
}

func span(d time.Duration) string { return harness.Span(harness.Milliseconds(d)) }
