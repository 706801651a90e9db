//go:build linux

package app

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBindInGuard: the descriptor is that of a socket that listens, and that no child gets.
func TestBindInGuard(t *testing.T) {
	if bindInGuard("off", nil) != nil {
		t.Error("off: something is to be bound")
	}
	fd, err := bindInGuard("localhost:0", nil)()
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	defer file.Close()
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listening != 1 {
		t.Errorf("SO_ACCEPTCONN: %d, %v", listening, err)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = bindInGuard(l.Addr().String(), nil)()
	if !errors.Is(err, errListen) || !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("the same address again: %v", err)
	}
}

// TestBindInGuard_StopWhileANameIsResolved: a stop request does not wait for the name server.
func TestBindInGuard_StopWhileANameIsResolved(t *testing.T) {
	asked := make(chan struct{}, 16)
	previous := net.DefaultResolver
	defer func() { net.DefaultResolver = previous }()
	net.DefaultResolver = &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			asked <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		},
	}
	signals := make(chan os.Signal)
	go func() {
		<-asked
		signals <- unix.SIGUSR1
		signals <- unix.SIGTERM
	}()
	began := time.Now()
	fd, err := bindInGuard("name.example:80", signals)()
	if fd != -1 || !errors.Is(err, errPlannedStop) {
		t.Errorf("%d, %v", fd, err)
	}
	if took := time.Since(began); took > 4*time.Second { // resolv.conf's default is 5 s
		t.Errorf("the stop took %v", took)
	}
}

// TestInherited_CloseEndsTheGuardsCopy: who asks a daemon that ends is refused, and the address is
// free, although the guard still has the socket.
func TestInherited_CloseEndsTheGuardsCopy(t *testing.T) {
	own, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	file, err := own.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	copied, err := net.FileListener(file)
	if err = errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(inherited{copied.(*net.TCPListener)}) }()
	address := own.Addr().String()
	resp, err := http.Get("http://" + address)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if err := server.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", address); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect: %v", err)
	}
	next, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_ = next.Close()
}

// TestInherit_Again: an elector may end the listening, and be killed then. The next one listens
// again.
func TestInherit_Again(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// A port that the kernel has chosen is chosen anew. A port of LISTEN is not.
	_ = l.Close()
	if l, err = net.Listen("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 2 {
		file, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		next, err := inheritFile(file)
		_ = file.Close()
		if err != nil {
			t.Fatal(err)
		}
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := next.Accept(); err != nil {
			t.Fatal(err)
		}
		_ = client.Close()
		if err := next.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
