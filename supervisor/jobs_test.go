//go:build linux

package supervisor_test

import (
	"fmt"
	"os"
	"os/exec"
	ossignal "os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	if len(os.Args) > 2 && os.Args[1] == "job" {
		runtime.LockOSThread() // the main goroutine, to the main thread: see threads
	}
}

// jobMain is a job, or one of its descendants.
func jobMain(behaviour string) {
	again := func(behaviour string, setsid bool) {
		cmd := exec.Command("/proc/self/exe", "job", behaviour)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: setsid}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	switch behaviour {
	case "daemonize":
		again("child-of-daemonize", true)
	case "daemonize-threads":
		again("child-of-daemonize-threads", true)
	case "child-of-daemonize", "child-of-daemonize-threads":
		if behaviour == "child-of-daemonize" {
			again("stubborn", true)
		} else {
			again("threads", true)
		}
		os.Exit(0)
	case "stubborn":
		ossignal.Ignore(unix.SIGTERM, unix.SIGHUP, unix.SIGINT)
	case "counts":
		stops := make(chan os.Signal, 10)
		ossignal.Notify(stops, unix.SIGTERM)
		test := dialTest("job counts")
		for range stops {
			fmt.Fprintln(test, "stop signal")
		}
	case "sudo":
		cmd := exec.Command(os.Getenv("TEST_SETUID"), "job", "escape")
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	case "escape": // as sudo does, and from the cgroup: who may, may write there
		_ = syscall.Setuid(0)
		_ = os.WriteFile(os.Getenv("TEST_OUTSIDE"), []byte(strconv.Itoa(os.Getpid())), 0)
		dialTest(fmt.Sprintf("job escape as-%d", os.Geteuid()))
		select {}
	case "exit-5":
		os.Exit(5)
	case "leave-behind":
		again("stubborn", true)
		// Its child has said hello by then, or is killed earlier: both are fine.
		time.Sleep(200 * time.Millisecond)
		os.Exit(0)
	case "storm":
		// Some hundred processes at any time, all of them short-lived and replaced at once. It says
		// hello first: once they run, the deadline may come before it has the processor again.
		ossignal.Ignore(unix.SIGTERM)
		dialTest("job " + behaviour)
		for range 50 {
			go func() {
				for {
					_ = exec.Command("/bin/sh", "-c",
						"trap '' TERM; (setsid sleep 0.1 &) ; sleep 0.05").Run()
				}
			}()
		}
		select {}
	case "threads":
		// The main thread goes, the others stay: the state in /proc reads Z and the process lives.
		ossignal.Ignore(unix.SIGTERM)
		go func() {
			stat := fmt.Sprintf("/proc/self/task/%d/stat", os.Getpid())
			for {
				if text, _ := os.ReadFile(stat); strings.Contains(string(text), ") Z ") {
					break
				}
				time.Sleep(time.Millisecond)
			}
			dialTest("job threads")
			select {}
		}()
		_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
	}
	dialTest("job " + behaviour)
	select {}
}
