//go:build linux

package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// narrator writes the story. The jobs' lines are folded: the counts of one job follow each other on
// one line until something else is told. A job is heard once it has been introduced; what it said
// before is not lost.
type narrator struct {
	out io.Writer

	mu     sync.Mutex
	heard  string              // the job that is listened to
	early  map[string][]string // the counts of jobs that are not, yet
	within bool                // a line of counts that has no end yet
}

const column = 10 // for the time since the fault

// say tells something, with the time that it took.
func (n *narrator) say(after, format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if after != "" {
		after = "+" + after
	}
	n.finish()
	n.write("%-*s%s\n", column, after, fmt.Sprintf(format, args...))
}

// listen turns to a job, or with "" to none.
func (n *narrator) listen(who string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.finish()
	n.heard = who
	for _, count := range n.early[who] {
		n.count(count)
	}
	n.early = nil
}

// job takes a line of a job: who it is, a colon, a count.
func (n *narrator) job(line string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	who, count, _ := strings.Cut(line, ": ")
	if who == n.heard {
		n.count(count)
		return
	}
	if n.early == nil {
		n.early = map[string][]string{}
	}
	n.early[who] = append(n.early[who], count)
}

func (n *narrator) count(count string) {
	if !n.within {
		n.write("%*s%s:", column, "", n.heard)
		n.within = true
	}
	n.write(" %s", count)
}

func (n *narrator) finish() {
	if n.within {
		n.write("\n")
		n.within = false
	}
}

// write drops what can't be written: the story has no other place to go.
func (n *narrator) write(format string, args ...any) {
	_, _ = fmt.Fprintf(n.out, format, args...)
}

// jobLines is the standard output of a daemon, which is its job's.
type jobLines struct {
	to   *narrator
	rest []byte
}

func (l *jobLines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, whole := bytes.Cut(l.rest, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		l.to.job(string(line))
		l.rest = rest
	}
}

// ago writes a duration as one would say it.
func ago(d time.Duration) string {
	if d < 100*time.Millisecond {
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}
