//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

func candidate() string { return os.Getenv("LEASEHOLD_IDENTITY") + os.Getenv("TESTJOB_CANDIDATE") }

// token is the fencing token, or what etcdctl lock has in its place.
func token() string {
	return os.Getenv("LEASEHOLD_FENCING_TOKEN") + os.Getenv("TESTJOB_TOKEN") +
		os.Getenv("ETCD_LOCK_REV")
}

// hello is what the witness reads. This program does not import it from there: it must be small,
// for it is copied into images and machines.
type hello struct {
	Candidate   string            `json:"candidate"`
	Token       int               `json:"token"`
	Pid         int               `json:"pid"`
	Role        string            `json:"role"`
	Started     time.Duration     `json:"started"`
	Forked      time.Duration     `json:"forked"`
	Heartbeat   time.Duration     `json:"heartbeat"`
	Args        []string          `json:"args"`
	Env         []string          `json:"env"`
	Status      map[string]string `json:"status"`
	Descriptors map[string]string `json:"descriptors"`
}

// greet returns nil without a witness to greet.
func greet(role string, started, heartbeat time.Duration) (*os.File, error) {
	addr := os.Getenv("WITNESS")
	if addr == "" {
		return nil, nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: addr}); err != nil {
		return nil, err
	}
	conn := os.NewFile(uintptr(fd), addr)
	return conn, json.NewEncoder(conn).Encode(hello{
		Candidate: candidate(), Token: number(token()), Pid: os.Getpid(), Role: role,
		Started: started, Forked: forked(), Heartbeat: heartbeat,
		Args: os.Args, Env: os.Environ(), Status: status(), Descriptors: descriptors(),
	})
}

// sendHeartbeats tells the witness again and again what this process's clock shows, as a line.
func sendHeartbeats(witness *os.File, every time.Duration) {
	var line []byte
	for range time.Tick(every) {
		line = append(strconv.AppendInt(line[:0], int64(boottime.Now()), 10), '\n')
		if _, err := witness.Write(line); err != nil {
			return
		}
	}
}

// forked is when this process was forked, rounded down to the kernel's hundredths of a second.
func forked() time.Duration {
	data, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return 0
	}
	// The name, in parentheses, may hold anything; the start is field 22.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 20 {
		return 0
	}
	return time.Duration(number(fields[19])) * 10 * time.Millisecond
}

func status() map[string]string {
	data, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return nil
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if name, v, found := strings.Cut(line, ":"); found {
			fields[name] = strings.TrimSpace(v)
		}
	}
	return fields
}

func descriptors() map[string]string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	open := map[string]string{}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open[e.Name()] = target
		}
	}
	return open
}

// obey carries out what the test says, and ends the process with the witness: nothing of a job
// outlives its test.
func obey(witness *os.File) {
	lines := bufio.NewScanner(witness)
	for lines.Scan() {
		verb, arg, _ := strings.Cut(lines.Text(), " ")
		switch verb {
		case "exit":
			os.Exit(number(arg))
		case "signal":
			signal.Reset(syscall.Signal(number(arg)))
			_ = syscall.Kill(os.Getpid(), syscall.Signal(number(arg)))
		}
	}
	os.Exit(98)
}
