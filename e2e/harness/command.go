//go:build linux

package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Interruptible is the context of a command: it ends with SIGINT, SIGTERM or SIGHUP.
func Interruptible() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(),
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
}

// ExitCode is 0 without an error. Else it prints the error and is 1.
func ExitCode(command string, err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", command, err)
	return 1
}

// CopyProgram copies a program, for one that no build changes and that shares no page of memory.
func CopyProgram(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

// FindEtcdAndAbout is FindEtcd, with a description of it and of this machine.
func FindEtcdAndAbout(ctx context.Context) (etcd Etcd, about About, err error) {
	if etcd, err = FindEtcd(ctx, os.Stderr); err == nil {
		about, err = AboutThisRun(ctx, etcd)
	}
	return etcd, about, err
}

// WriteJSON writes what was measured into a file.
func WriteJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// ReadJSON reads what WriteJSON wrote.
func ReadJSON[T any](path string) (*T, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	v := new(T)
	if err := json.Unmarshal(data, v); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return v, nil
}

// TableHead writes the first lines of a Markdown table, TableRow one of the others. What can't be
// written is for the writer to tell at its end.
func TableHead(w io.Writer, cells ...string) {
	TableRow(w, cells...)
	_, _ = fmt.Fprintf(w, "%s|\n", strings.Repeat("|---", len(cells)))
}

// TableRow writes the cells of a line.
func TableRow(w io.Writer, cells ...string) {
	line := "|"
	for _, c := range cells {
		if c != "" {
			c += " "
		}
		line += " " + c + "|"
	}
	_, _ = fmt.Fprintln(w, line)
}
