//go:build linux

// Testjob is a job that misbehaves on demand. Each word of its command line
// adds a behaviour; without any it waits and dies of SIGTERM.
//
//	ignore-term    ignore SIGTERM
//	slow-stop=DUR  on SIGTERM, end after DUR with code 0
//	stop-code=N    on SIGTERM, end with code N
//	exit=N         end at once with code N
//	after=DUR      but only after DUR
//	setsid         have a child in a session of its own that ignores SIGTERM
//	hold-pipes     have a grandchild that keeps the standard streams open
//	daemonize      have a descendant that forked twice and called setsid
//	wipe-env       the job's descendants have none of its environment
//	huge-env       they have an environment of 400 KiB
//	undumpable     /proc shows other processes of their user little of them
//	leave-cgroup   they leave the job's cgroup for the one above it, where that is permitted
//	main-gone      end the main thread while other threads run on
//	storm=N        N chains of processes, each of which forks and ends at once
//	fill=N         fork up to N children, and another for each that dies
//	orphans=N      have N idle descendants whose parents have exited
//	memory=N       have N GiB of memory, all of it touched
//	leave=N        have so much memory that N MiB are left for all others
//
// Every process that executes it holds a connection to the witness named in
// $WITNESS while it lives, and inherits its parent's; a process that is only
// forked holds its parent's. Through the connection a test can say "exit N" or
// "signal N". All of them end when the witness does.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// main-gone must end the main thread and no other: only from init can the main
// goroutine be bound to it.
func init() { runtime.LockOSThread() }

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testjob:", err)
		os.Exit(99)
	}
}

func run(words []string) error {
	started := now()
	role := os.Getenv("TESTJOB_ROLE")
	if role == "" {
		role = "job"
	}
	terminate := make(chan os.Signal, 1)
	if value(words, "slow-stop=") != "" || value(words, "stop-code=") != "" {
		signal.Notify(terminate, syscall.SIGTERM)
	}
	if role != "job" {
		hide(words)
	}
	if slices.Contains(words, "ignore-term") || role != "job" {
		signal.Ignore(syscall.SIGTERM)
	}
	witness, err := greet(role, started)
	if err != nil {
		return fmt.Errorf("greet the witness: %w", err)
	}
	if witness != nil {
		go obey(witness)
	}
	if err := spawn(role, words, witness); err != nil {
		return err
	}
	if role == "between" {
		return nil // a descendant of ours is the daemon
	}
	if role == "parent" {
		return orphan(number(value(words, "orphans=")), witness)
	}
	if role == "job" {
		if err := misbehave(words, witness); err != nil {
			return err
		}
	}
	var due <-chan time.Time
	if code := value(words, "exit="); code != "" && role == "job" {
		d, _ := time.ParseDuration(value(words, "after=")) // without one it is 0
		due = time.After(d)
	}
	select {
	case <-due:
		os.Exit(number(value(words, "exit=")))
	case <-terminate:
	}
	if d, err := time.ParseDuration(value(words, "slow-stop=")); err == nil {
		time.Sleep(d)
	}
	os.Exit(number(value(words, "stop-code=")))
	return nil
}

// spawn starts the descendants that execute this program again.
func spawn(role string, words []string, witness *net.UnixConn) error {
	has := func(word string) bool { return slices.Contains(words, word) }
	switch role {
	case "job":
		if has("setsid") {
			if _, err := start("setsid", words, witness, false); err != nil {
				return err
			}
		}
		if has("hold-pipes") {
			if _, err := start("child", words, witness, true); err != nil {
				return err
			}
		}
		if value(words, "orphans=") != "" {
			parent, err := start("parent", words, witness, false)
			if err != nil {
				return err
			}
			if err := parent.Wait(); err != nil {
				return fmt.Errorf("leave orphans: %w", err)
			}
		}
		if has("daemonize") {
			between, err := start("between", words, witness, false)
			if err != nil {
				return err
			}
			return between.Wait()
		}
	case "child":
		_, err := start("grandchild", words, witness, true)
		return err
	case "between":
		_, err := start("daemon", words, witness, false)
		return err
	}
	return nil
}

func start(role string, words []string, witness *net.UnixConn, pipes bool) (*exec.Cmd, error) {
	cmd := exec.Command("/proc/self/exe", words...)
	cmd.Env = append(os.Environ(), "TESTJOB_ROLE="+role)
	if slices.Contains(words, "wipe-env") {
		cmd.Env = []string{"TESTJOB_ROLE=" + role, "WITNESS=" + os.Getenv("WITNESS"),
			"TESTJOB_CANDIDATE=" + candidate(), "TESTJOB_TOKEN=" + token()}
	}
	if slices.Contains(words, "huge-env") {
		for i := range 4 { // the kernel takes entries of up to 128 KiB
			cmd.Env = append([]string{fmt.Sprintf("FILLER%d=%s", i, strings.Repeat("x", 100<<10))}, cmd.Env...)
		}
	}
	if pipes {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if witness != nil {
		// The child holds our connection from its first moment on, so that
		// there is none in which the witness doesn't know of it.
		file, err := witness.File()
		if err != nil {
			return nil, err
		}
		defer func() { _ = file.Close() }()
		cmd.ExtraFiles = []*os.File{file}
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	return cmd, nil
}

// hide takes this process from where those may look who search for the job.
func hide(words []string) {
	if slices.Contains(words, "undumpable") {
		_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	}
	if !slices.Contains(words, "leave-cgroup") {
		return
	}
	data, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(data)) {
		path, found := strings.CutPrefix(strings.TrimSpace(line), "0::")
		above, _, inJobs := strings.Cut(path, "/leasehold-")
		if !found || !inJobs {
			continue
		}
		for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			_ = os.WriteFile(mount+above+"/cgroup.procs", []byte(strconv.Itoa(os.Getpid())), 0)
		}
	}
}

// descriptor is that of the connection to the witness, or -1.
func descriptor(witness *net.UnixConn) (fd int, err error) {
	if witness == nil {
		return -1, nil
	}
	raw, err := witness.SyscallConn()
	if err != nil {
		return -1, err
	}
	return fd, raw.Control(func(u uintptr) { fd = int(u) })
}

func misbehave(words []string, witness *net.UnixConn) error {
	fd, err := descriptor(witness)
	if err != nil {
		return err
	}
	if n := number(value(words, "storm=")); n > 0 {
		storm(n, fd)
	}
	if n := number(value(words, "fill=")); n > 0 {
		go fill(n, fd)
	}
	if n := number(value(words, "memory=")); n > 0 {
		go hoard(func(have, _ int64) bool { return have < int64(n)<<30 }, func() bool { return false })
	}
	if n := number(value(words, "leave=")); n > 0 {
		go hoard(func(_, untouched int64) bool { return available()-untouched > int64(n)<<20 },
			func() bool { return available() < int64(n)<<20/2 }) // others want more than when it came
	}
	if slices.Contains(words, "main-gone") {
		// Not RawSyscall: the runtime must know that this thread is away, or
		// it would wait for it at the next garbage collection.
		_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	}
	return nil
}

func value(words []string, prefix string) string {
	for _, w := range words {
		if v, found := strings.CutPrefix(w, prefix); found {
			return v
		}
	}
	return ""
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0
	}
	return n
}

func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

func candidate() string { return os.Getenv("LEASEHOLD_IDENTITY") + os.Getenv("TESTJOB_CANDIDATE") }

// token is the fencing token, or what etcdctl lock has in its place.
func token() string {
	return os.Getenv("LEASEHOLD_FENCING_TOKEN") + os.Getenv("TESTJOB_TOKEN") + os.Getenv("ETCD_LOCK_REV")
}

// greet returns nil without a witness to greet.
func greet(role string, started time.Duration) (*net.UnixConn, error) {
	addr := os.Getenv("WITNESS")
	if addr == "" {
		return nil, nil
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: addr, Net: "unix"})
	if err != nil {
		return nil, err
	}
	hello := map[string]any{
		"candidate": candidate(), "token": number(token()), "pid": os.Getpid(), "role": role, "started": started, "forked": forked(),
		"args": os.Args, "env": os.Environ(), "status": status(), "descriptors": descriptors(),
	}
	return conn, json.NewEncoder(conn).Encode(hello)
}

// forked is when this process was forked, rounded down to the kernel's hundredths
// of a second.
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

// obey carries out what the test says, and ends the process with the witness:
// nothing of a job outlives its test.
func obey(witness *net.UnixConn) {
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
