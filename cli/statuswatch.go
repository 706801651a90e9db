//go:build linux

package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/election"
	"leasehold/internal/quote"
)

// statusInterval is how often status --watch asks.
const statusInterval = time.Second

// statusWatch prints the election again and again.
type statusWatch struct {
	asked
	*Program
	terminal *os.File // nil: standard output is none
	report   election.Report
	printed  string    // the last report, without what the clock changes
	lostAt   time.Time // when etcd did not answer for the first time; zero: it does
}

// watchStatus shows the election until it is interrupted: on a terminal every second in the same
// place, elsewhere when more has changed than the time that is left of the lease.
func (p *Program) watchStatus(a asked) error {
	w := &statusWatch{asked: a, Program: p}
	if file, ok := p.Stdout.(*os.File); ok && !a.call.Has("--json") {
		if _, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS); err == nil {
			w.terminal = file
		}
	}
	return p.untilInterrupted(a.ctx, w.run)
}

func (w *statusWatch) run(ctx context.Context) error {
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	for first := true; ; first = false {
		report, err := w.query(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			w.report, w.lostAt = report, time.Time{}
			err = w.show()
		case first || !election.MayPass(err):
			return &EtcdError{w.call.Command.Name, err}
		default:
			err = w.lost(err)
		}
		if err != nil {
			return &printError{err}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// query asks etcd once.
func (a asked) query(ctx context.Context) (election.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return a.client.Query(ctx)
}

// show prints what etcd has answered.
func (w *statusWatch) show() error {
	if w.terminal != nil {
		return w.draw("")
	}
	timeless := w.report
	timeless.LeaseLeft = 0
	same, err := w.text(timeless)
	if err != nil || same == w.printed {
		return err
	}
	text, err := w.text(w.report)
	if err == nil && w.printed != "" && !w.call.Has("--json") {
		text = "\n" + text
	}
	w.printed = same
	if err == nil {
		_, err = io.WriteString(w.Stdout, text)
	}
	return err
}

func (w *statusWatch) text(r election.Report) (string, error) {
	if w.call.Has("--json") {
		return quote.JSON(reportJSON(w.name, w.Version, r), "")
	}
	return reportText(w.name, r), nil
}

// lost says, once, that etcd does not answer any more. A terminal goes on to show what it showed.
func (w *statusWatch) lost(cause error) error {
	first := w.lostAt.IsZero()
	if first {
		w.lostAt = time.Now()
	}
	switch {
	case w.terminal != nil:
		return w.draw(fmt.Sprintf("\nNo answer of etcd since %s UTC: %s\n",
			seconds(w.lostAt), quote.Line(cause.Error())))
	case first:
		_, _ = fmt.Fprintf(w.Stderr, "leasehold: status: %v; it goes on when etcd answers\n", cause)
	}
	return nil
}

// draw shows the report from the top of the terminal on, as far as that has lines.
func (w *statusWatch) draw(note string) error {
	lines := strings.SplitAfter(reportText(w.name, w.report)+note, "\n")
	if size, err := unix.IoctlGetWinsize(int(w.terminal.Fd()), unix.TIOCGWINSZ); err == nil &&
		size.Row > 0 && size.Col > 0 {
		if len(lines) > int(size.Row) {
			lines = append(lines[:size.Row-1], string(ellipsis))
		}
		for i, line := range lines {
			if text, whole := strings.CutSuffix(line, "\n"); whole {
				lines[i] = fit(text, int(size.Col)) + "\n"
			}
		}
	}
	const top, restOfLine, rest = "\x1b[H", "\x1b[K", "\x1b[J"
	text := strings.ReplaceAll(strings.Join(lines, ""), "\n", restOfLine+"\n")
	_, err := io.WriteString(w.terminal, top+text+rest)
	return err
}
