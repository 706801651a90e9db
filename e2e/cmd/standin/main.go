//go:build linux

// Standin takes the place of a leasehold binary that an upgrade has put there, and does in one role
// what a test wants. In all others it becomes the real one. The files "real" and "mode" beside it
// say which one that is, and what it does.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(filepath.Dir(self), name))
		if err != nil {
			panic(err)
		}
		return strings.TrimSpace(string(text))
	}
	role := ""
	if len(os.Args) > 1 {
		role = os.Args[1]
	}
	switch mode := read("mode"); {
	case strings.HasPrefix(mode, "squats "):
		squat(strings.TrimPrefix(mode, "squats "))
	case mode == "sleeps",
		mode == "check hangs" && role == "check-reload",
		mode == "elector hangs" && role == "elector":
		time.Sleep(time.Hour)
	case mode == "check crashes" && role == "check-reload",
		mode == "elector crashes" && role == "elector":
		panic("as the test wants it")
	case mode == "other protocol" && role == "check-reload":
		os.Args[2] = "99"
	}
	panic(syscall.Exec(read("real"), os.Args, os.Environ()))
}

// squat listens at an address, and says what it hears.
func squat(address string) {
	l, err := net.Listen("unixpacket", address)
	if err != nil {
		panic(err)
	}
	fmt.Println("listens")
	for {
		conn, err := l.Accept()
		if err != nil {
			panic(err)
		}
		if text, err := io.ReadAll(conn); len(text) > 0 {
			fmt.Printf("heard %q, %v\n", text, err)
		}
	}
}
