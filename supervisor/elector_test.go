//go:build linux

package supervisor_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	ossignal "os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor"
	"leasehold/supervisor/ipc"
)

// dialTest connects to the test and says who is there. The connection stays open for the life of
// the process.
func dialTest(hello string) net.Conn {
	c, err := net.Dial("unix", os.Getenv("TEST_SOCKET"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "reach the test:", err)
		os.Exit(3)
	}
	fmt.Fprintf(c, "%s %d\n", hello, os.Getpid())
	return c
}

// testElector obeys the test: "lead STOP-AT KILL-BY" (durations from now), "extend STOP-AT
// KILL-BY", "end planned|contact|lost", "again", "release", "exit CODE". One that takes the place
// of another tells what it has learned, and takes over the job if that lives.
type testElector struct {
	*supervisor.Supervisor
	test  net.Conn
	lease int64
	term  context.Context
	end   context.CancelCauseFunc
}

// The causes of a term's end.
var testCauses = map[string]error{
	"planned": errors.New("planned"), "contact": errors.New("contact"), "lost": errors.New("lost"),
}

func electorMain(args []string) int {
	ossignal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	guard, _ := strconv.Atoi(args[0])
	spawner, _ := strconv.Atoi(args[1])
	cgroupDir := ""
	if len(args) > 2 {
		cgroupDir = args[2]
	}
	test, ttl := dialTest("elector"), fromEnv("TEST_TTL", testTTL)
	s, err := supervisor.Connect(supervisor.Config{
		In: 3, Out: 4, SpawnerSock: 5, SpawnerPidfd: 6, Guard: guard, Spawner: spawner,
		CgroupDir: cgroupDir, TTL: ttl, MaxPing: ttl,
		Margin:  func() time.Duration { return testMargin },
		Restart: supervisor.RestartNever,
		Signal:  func(s unix.Signal) { fmt.Fprintf(test, "signal %d\n", s) },
		Running: func() bool { return true }, Changed: func() {},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		fmt.Fprintln(test, "connect", err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan struct{})
	go func() {
		fmt.Fprintf(test, "run %v\n", s.Run(ctx))
		close(done)
	}()
	e := &testElector{Supervisor: s, test: test}
	e.lease, _ = strconv.ParseInt(os.Getenv("TEST_LEASE"), 10, 64)
	e.begin()
	if s.Record().Lease.ID == 0 {
		e.Lease(e.lease, ttl)
		e.Entered("election/abc", 7)
	} else {
		e.adopt()
	}
	e.Ready()
	fmt.Fprintln(test, "ready")
	defer func() { e.end(nil) }()
	lines := bufio.NewScanner(test)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if f[0] == "exit" {
			cancel()
			<-done
			e.Lease(0, 0)
			code, _ := strconv.Atoi(f[1])
			e.Exit(code, "test")
			return code
		}
		e.obey(f)
	}
	return 1
}

// adopt takes the place of another elector.
func (e *testElector) adopt() {
	r := e.Record()
	fmt.Fprintf(e.test, "adopted job=%d pid=%d ordered=%v lease=%d releasing=%v key=%s created=%d "+
		"starts=%d exit=%d signals=%d exited=%d silent=%d ended=%v\n",
		r.Job, r.PID, r.Ordered, r.Lease.ID, r.Lease.Releasing, r.Entered.Key, r.Entered.Created,
		r.Starts, r.LastExit.Code, r.StopSignals, r.Exited, r.Silent, e.Ended())
	if r.Job != ipc.JobIdle {
		go e.lead(e.term, supervisor.Term{Adopted: true})
	}
}

func (e *testElector) begin() {
	e.term, e.end = context.WithCancelCause(context.Background())
}

func (e *testElector) obey(f []string) {
	moment := func(i int) time.Duration {
		d, err := time.ParseDuration(f[i])
		if err != nil {
			panic(err)
		}
		return boottime.Now() + d
	}
	switch f[0] {
	case "lead":
		go e.lead(e.term, supervisor.Term{StopAt: moment(1), KillBy: moment(2)})
	case "again":
		e.end(nil)
		e.begin()
	case "extend":
		e.Extend(moment(1), moment(2))
		fmt.Fprintln(e.test, "extended")
	case "release":
		fmt.Fprintln(e.test, "releasing", e.Releasing(e.lease))
	case "end":
		e.end(testCauses[f[1]])
	}
}

func (e *testElector) lead(ctx context.Context, t supervisor.Term) {
	t.Key, t.Token, t.LeaseID = "election/abc", 7, e.lease
	err := e.Supervise(ctx, t, func(cause error) time.Duration {
		switch {
		case errors.Is(cause, testCauses["planned"]):
			return 10 * time.Second
		case errors.Is(cause, testCauses["contact"]):
			return -1
		}
		return 0
	})
	fmt.Fprintf(e.test, "led %v\n", err)
}
