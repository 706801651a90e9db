//go:build linux

// Testjob is a job that behaves badly on demand. Each word of its command line adds a behaviour
// (see behaviours); without any it waits and SIGTERM ends it.
//
// Every process that executes it holds a connection to the witness named in $WITNESS while it
// lives, and inherits its parent's; a process that is only forked holds its parent's. Through the
// connection a test can say "exit N" or "signal N". All of them end when the witness does.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// behaviour is one word of the command line, with = where it takes a value.
type behaviour struct {
	word string
	when phase
	do   func(p *process, value string) error
	env  func([]string) []string // changes the environment of descendants
}

// phase is when a behaviour begins.
type phase int

const (
	atStart phase = iota + 1 // in the job's first process, before the witness hears of it
	hiding                   // in each descendant, before the witness hears of it
	greeted                  // in the job's first process, once the witness has heard of it
)

// behaviours begin in this order. Those without a phase are read at the job's end.
func behaviours() []behaviour {
	return []behaviour{
		{"ignore-term", atStart, ignoreTerm, nil},        // ignore SIGTERM
		{"slow-stop=DUR", atStart, awaitTerm, nil},       // on SIGTERM, end after DUR with code 0
		{"stop-code=N", atStart, awaitTerm, nil},         // on SIGTERM, end with code N
		{"exit=N", 0, nil, nil},                          // end at once with code N
		{"after=DUR", 0, nil, nil},                       // but only after DUR
		{"setsid", greeted, starting("setsid"), nil},     // ignores SIGTERM in a session of its own
		{"hold-pipes", greeted, starting("child"), nil},  // a grandchild holds the standard streams
		{"orphans=N", greeted, starting("parent"), nil},  // N idle ones whose parents have exited
		{"daemonize", greeted, starting("between"), nil}, // one that forked twice, with setsid
		{"run=PROGRAM", greeted, runProgram, nil},        // a child that executes it
		{"heartbeat=DUR", 0, nil, nil},                   // each process says so while it runs
		{"wipe-env", 0, nil, wipe},                       // descendants without its environment
		{"huge-env", 0, nil, fillUp},                     // descendants with 400 KiB of environment
		{"undumpable", hiding, undumpable, nil},          // descendants of which /proc shows little
		{"leave-cgroup", hiding, leaveCgroup, nil},       // if permitted: in the cgroup above
		{"fork-bomb=N", greeted, forking(forkBomb), nil}, // N chains of one process: fork, then end
		{"fill=N", greeted, forking(startFill), nil},     // N children, and one for each that exits
		{"memory=N", greeted, takeMemory, nil},           // N GiB of memory, all of it touched
		{"count=DUR", greeted, count, nil},               // a line every DUR, numbered from 1
		{"leave=N", greeted, leaveMemory, nil},           // all memory but N MiB
		{"main-gone", greeted, endMainThread, nil},       // no main thread, but others
	}
}

// role is what a descendant does that executes this program again. One that is brief ends then, and
// its parent waits for that; the others wait to be killed.
type role struct {
	brief bool
	do    func(p *process) error
}

// roleOf returns nothing to do for most.
func roleOf(name string) role {
	switch name {
	case "child":
		return role{false, func(p *process) error { return p.start("grandchild") }}
	case "between":
		return role{true, func(p *process) error { return p.start("daemon") }}
	case "parent":
		return role{true, func(p *process) error {
			n, _ := p.value("orphans")
			return forking(leaveOrphans)(p, n)
		}}
	}
	return role{false, func(*process) error { return nil }}
}

// process is this one.
type process struct {
	role    string // "job" for the job's first process
	words   []string
	witness *os.File // nil without one
	term    chan os.Signal
}

// main-gone must end the main thread and no other: only from init can the main goroutine be bound
// to it.
func init() { runtime.LockOSThread() }

func main() {
	p := &process{
		role: os.Getenv("TESTJOB_ROLE"), words: os.Args[1:], term: make(chan os.Signal, 1),
	}
	if p.role == "" {
		p.role = "job"
	}
	if err := p.run(); err != nil {
		fmt.Fprintln(os.Stderr, "testjob:", err)
		os.Exit(99)
	}
}

func (p *process) run() error {
	started, first := boottime.Now(), atStart
	if p.role != "job" {
		signal.Ignore(syscall.SIGTERM)
		first = hiding
	}
	if err := p.begin(first); err != nil {
		return err
	}
	var err error
	if p.witness, err = greet(p.role, started, p.duration("heartbeat")); err != nil {
		return fmt.Errorf("greet the witness: %w", err)
	}
	if p.witness != nil {
		if every := p.duration("heartbeat"); every > 0 {
			go sendHeartbeats(p.witness, every)
		}
		go obey(p.witness)
	}
	role := roleOf(p.role)
	if err := role.do(p); role.brief || err != nil {
		return err
	}
	if p.role == "job" {
		if err := p.begin(greeted); err != nil {
			return err
		}
	}
	p.end()
	return nil
}

// begin has the behaviours of a phase begin.
func (p *process) begin(when phase) error {
	for _, b := range behaviours() {
		if value, has := p.value(b.name()); has && b.when == when {
			if err := b.do(p, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// end waits for what ends the process, and ends it.
func (p *process) end() {
	var due <-chan time.Time
	code, exits := p.value("exit")
	if exits && p.role == "job" {
		due = time.After(p.duration("after"))
	}
	select {
	case <-due:
		os.Exit(number(code))
	case <-p.term:
	}
	time.Sleep(p.duration("slow-stop"))
	code, _ = p.value("stop-code")
	os.Exit(number(code))
}

func (b behaviour) name() string {
	name, _, _ := strings.Cut(b.word, "=")
	return name
}

// value reports whether the command line has a word, and what stands behind its =.
func (p *process) value(of string) (value string, has bool) {
	for _, w := range p.words {
		if name, value, _ := strings.Cut(w, "="); name == of {
			return value, true
		}
	}
	return "", false
}

func (p *process) duration(of string) time.Duration {
	text, _ := p.value(of)
	d, _ := time.ParseDuration(text) // 0 without one
	return d
}

// start starts a descendant that executes this program again.
func (p *process) start(role string) error {
	cmd := exec.Command("/proc/self/exe", p.words...)
	cmd.Env = append(os.Environ(), "TESTJOB_ROLE="+role)
	for _, b := range behaviours() {
		if _, has := p.value(b.name()); has && b.env != nil {
			cmd.Env = b.env(cmd.Env)
		}
	}
	if strings.HasSuffix(role, "child") { // of hold-pipes
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err := p.startHolding(cmd)
	if err == nil && roleOf(role).brief {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("start %s: %w", role, err)
	}
	return nil
}

// startHolding has the child hold our connection from its first moment on, so that there is none in
// which the witness doesn't know of it.
func (p *process) startHolding(cmd *exec.Cmd) error {
	if p.witness != nil {
		cmd.ExtraFiles = []*os.File{p.witness}
	}
	return cmd.Start()
}

func starting(role string) func(*process, string) error {
	return func(p *process, _ string) error { return p.start(role) }
}

func runProgram(p *process, path string) error {
	cmd := exec.Command(path)
	cmd.Stderr = os.Stderr
	return p.startHolding(cmd)
}

func ignoreTerm(*process, string) error {
	signal.Ignore(syscall.SIGTERM)
	return nil
}

func awaitTerm(p *process, _ string) error {
	signal.Notify(p.term, syscall.SIGTERM)
	return nil
}

// wipe leaves what the process itself needs.
func wipe(env []string) []string {
	return []string{
		env[len(env)-1], "WITNESS=" + os.Getenv("WITNESS"),
		"TESTJOB_CANDIDATE=" + candidate(), "TESTJOB_TOKEN=" + token(),
	}
}

func fillUp(env []string) []string {
	filled := []string{}
	for i := range 4 { // the kernel takes entries of up to 128 KiB
		filled = append(filled, fmt.Sprintf("FILLER%d=%s", i, strings.Repeat("x", 100<<10)))
	}
	return append(filled, env...)
}

func undumpable(*process, string) error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

func leaveCgroup(*process, string) error {
	data, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(data)) {
		path, found := strings.CutPrefix(strings.TrimSpace(line), "0::")
		above, _, inJobs := strings.Cut(path, "/leasehold-")
		if !found || !inJobs {
			continue
		}
		for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			// An ordinary user may not.
			_ = os.WriteFile(mount+above+"/cgroup.procs", []byte(strconv.Itoa(os.Getpid())), 0)
		}
	}
	return nil
}

func takeMemory(_ *process, gib string) error {
	want := int64(number(gib)) << 30
	go hoard(func(have, _ int64) bool { return have < want }, func() bool { return false })
	return nil
}

func leaveMemory(_ *process, mib string) error {
	leave := int64(number(mib)) << 20
	go hoard(func(_, untouched int64) bool { return available()-untouched > leave },
		func() bool { return available() < leave/2 }) // others want more than when it came
	return nil
}

func count(p *process, _ string) error {
	every := time.Tick(p.duration("count"))
	go func() {
		for n := 1; ; n++ {
			fmt.Printf("job of %s, token %s: %d\n", candidate(), token(), n)
			<-every
		}
	}()
	return nil
}

func endMainThread(*process, string) error {
	// Not RawSyscall: the runtime must know that this thread is away, or it would wait for it at
	// the next garbage collection.
	_, _, _ = syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	return nil
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0
	}
	return n
}
