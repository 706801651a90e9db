//go:build linux

// Job is what the test of Kubernetes runs in a cluster, and the witness that it runs beside it.
//
//	job witness ADDRESS   prints "start NAME TOKEN" and "end NAME TOKEN" for each job that begins
//	                      and ends to hold a connection
//	job run ADDRESS       is a job: it works only while it holds a connection to the witness at
//	                      that address
//	job dial ADDRESS      succeeds if somebody listens there
//	job live DIR          is a job that needs nobody: it keeps in DIR when it lived
//	job live-on DIR       the same, and TERM does not end it
//	job ask URL           connects to a daemon again and again, and prints each answer: the time
//	                      since the machine's boot, identity, the leader's token and its own state
//	job app DIR           is an app beside leasehold: it works while /leader says that it may
//	job app-on DIR        the same, and TERM does not end it
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	err := fmt.Errorf("wrong usage: witness ADDRESS, run ADDRESS, or live DIR")
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "witness":
			err = witness(os.Args[2])
		case "run":
			err = job(os.Args[2])
		case "dial":
			_, err = net.DialTimeout("tcp", os.Args[2], 3*time.Second)
		case "live", "live-on":
			err = live(os.Args[1], os.Args[2])
		case "app", "app-on":
			err = app(os.Args[1], os.Args[2])
		case "ask":
			ask(os.Args[2])
		case "orphan":
			err = orphan(os.Args[2])
		case "tick":
			err = tick(os.Args[2])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func witness(address string) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening", listener.Addr())
	go func() {
		<-stop
		os.Exit(0)
	}()
	var mu sync.Mutex // keeps the lines in the order of what they tell of
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer func() { _ = conn.Close() }()
			lines := bufio.NewScanner(conn)
			if !lines.Scan() {
				return
			}
			name := lines.Text()
			mu.Lock()
			fmt.Println("start", name)
			_, err := fmt.Fprintln(conn, "go on")
			mu.Unlock()
			for err == nil && lines.Scan() { // until the job's end closes it
			}
			mu.Lock()
			fmt.Println("end", name)
			mu.Unlock()
		}()
	}
}

// job lives only where the witness knows of it, and dies with it.
func job(address string) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	conn, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return err
	}
	name, token := os.Getenv("LEASEHOLD_IDENTITY"), os.Getenv("LEASEHOLD_FENCING_TOKEN")
	if _, err := fmt.Fprintln(conn, name, token); err != nil {
		return err
	}
	gone := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			fmt.Println(strings.TrimSpace(lines.Text()))
		}
		gone <- fmt.Errorf("the witness is gone: %w", lines.Err())
	}()
	select {
	case <-stop:
		return nil
	case err := <-gone:
		return err
	}
}
