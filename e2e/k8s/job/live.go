//go:build linux

package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"leasehold/internal/boottime"
)

// live is a job of two processes: its own, and one that has a session of its own and whose parent
// has exited, so that nothing but its descent says whose it is.
func live(mode, dir string) error {
	if mode == "live-on" {
		signal.Ignore(syscall.SIGTERM)
	}
	go eat()
	name := filepath.Join(dir, fmt.Sprintf("%s %s %d", os.Getenv("LEASEHOLD_IDENTITY"),
		os.Getenv("LEASEHOLD_FENCING_TOKEN"), boottime.Now()))
	if err := exec.Command("/proc/self/exe", "orphan", name+" orphan").Run(); err != nil {
		return fmt.Errorf("start the second process: %w", err)
	}
	return tick(name + " first")
}

// eat takes a gigabyte of memory at SIGUSR1, which is more than the limit.
func eat() {
	hungry := make(chan os.Signal, 1)
	signal.Notify(hungry, syscall.SIGUSR1)
	<-hungry
	var eaten [1024][]byte
	for i := range eaten {
		eaten[i] = bytes.Repeat([]byte{1}, 1<<20)
	}
	runtime.KeepAlive(&eaten)
}

// orphan starts a process in a session of its own, and leaves it alone.
func orphan(path string) error {
	child := exec.Command("/proc/self/exe", "tick", path)
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return child.Start()
}

// tick writes every millisecond how long ago the machine was started, in nanoseconds. It ends with
// whoever kills it.
func tick(path string) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	for ticker := time.NewTicker(time.Millisecond); ; <-ticker.C {
		if err := sign(file); err != nil {
			return err
		}
	}
}

// app works in steps of a millisecond. It asks every 100 ms whether it may, and takes no answer
// within a second for a no. So it ends its work 1.1 s after the request before at the latest, and
// LEASEHOLD_LOSS_GRACE is 3 s. Each time that it may again is a life.
func app(mode, dir string) error {
	if mode == "app-on" {
		signal.Ignore(syscall.SIGTERM)
	}
	go eat()
	var may atomic.Bool
	go func() {
		client := http.Client{Timeout: time.Second}
		for ticker := time.NewTicker(100 * time.Millisecond); ; <-ticker.C {
			response, err := client.Get("http://127.0.0.1:4040/leader")
			if err == nil {
				err = response.Body.Close()
			}
			may.Store(err == nil && response.StatusCode == http.StatusOK)
		}
	}()
	var file *os.File
	for ticker := time.NewTicker(time.Millisecond); ; <-ticker.C {
		switch {
		case !may.Load():
			if file != nil {
				_ = file.Close()
				file = nil
			}
			continue
		case file == nil:
			name := fmt.Sprintf("%s - %d app", os.Getenv("POD_NAME"), boottime.Now())
			var err error
			if file, err = os.Create(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		if err := sign(file); err != nil {
			return err
		}
	}
}

// sign writes over what the file says until when its job has lived.
func sign(file *os.File) error {
	_, err := file.WriteAt(fmt.Appendf(nil, "%020d\n", boottime.Now()), 0)
	return err
}
