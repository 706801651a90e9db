//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// listenFd is the elector's descriptor of the health endpoint's socket, unless LEASEHOLD_LISTEN is
// off.
const listenFd = 7

// bind binds the health endpoint's address. ctx bounds how long a name may take to be resolved.
func bind(ctx context.Context, address string) (net.Listener, error) {
	var config net.ListenConfig
	// To shut a socket down ends its listening (see inherited). With MPTCP it does not in all
	// kernels.
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w: the health endpoint can't be bound,"+
			" choose another address, or off: %w", errListen, err)
	}
	return l, nil
}

// bindInGuard returns what binds the address in the guard, or nil if the endpoint is off. The
// descriptor is a copy of Go's own, so that the runtime's poller does not know it.
func bindInGuard(address string, signals <-chan os.Signal) func() (fd int, err error) {
	if address == "off" {
		return nil
	}
	return func() (int, error) {
		l, err := bindUnlessStopped(address, signals)
		if err != nil {
			return -1, err
		}
		defer func() { _ = l.Close() }()
		raw, err := l.(*net.TCPListener).SyscallConn()
		if err != nil {
			return -1, fmt.Errorf("%w: keep the endpoint's socket: %w", errSystem, err)
		}
		fd := -1
		refused := raw.Control(func(own uintptr) {
			fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3)
		})
		if err = errors.Join(refused, err); err != nil {
			return -1, fmt.Errorf("%w: keep the endpoint's socket: %w", errSystem, err)
		}
		return fd, nil
	}
}

// bindUnlessStopped binds the address. A name may take long to be resolved: a stop request ends
// that. The guard's loop, which takes the signals otherwise, does not run yet.
func bindUnlessStopped(address string, signals <-chan os.Signal) (net.Listener, error) {
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	var l net.Listener
	var err error
	bound := make(chan struct{})
	go func() {
		l, err = bind(ctx, address)
		close(bound)
	}()
	for {
		select {
		case s := <-signals:
			if s == unix.SIGTERM || s == unix.SIGINT {
				stop(errPlannedStop)
			}
			continue
		case <-bound:
		}
		if stopped := context.Cause(ctx); stopped != nil {
			if l != nil {
				_ = l.Close()
			}
			return nil, stopped
		}
		return l, err
	}
}

// inherit takes the socket over that the guard has bound.
func inherit(string) (net.Listener, error) {
	file := os.NewFile(listenFd, "listener")
	defer func() { _ = file.Close() }()
	return inheritFile(file)
}

func inheritFile(file *os.File) (net.Listener, error) {
	// The elector before this one may have ended the listening, and may have been killed then.
	const backlog = 1<<16 - 1 // the kernel takes net.core.somaxconn if that is less
	if err := unix.Listen(int(file.Fd()), backlog); err != nil {
		return nil, fmt.Errorf("listen on the health endpoint's socket: %w", err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("take over the health endpoint's socket: %w", err)
	}
	return inherited{l.(*net.TCPListener)}, nil
}

// inherited is a socket that the guard holds as well.
type inherited struct{ *net.TCPListener }

// Close ends the listening, also on the guard's copy. Otherwise clients would wait for an answer
// until the guard exits, and with a guard that can't be killed for ever.
func (l inherited) Close() error {
	if raw, err := l.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RD) })
	}
	return l.TCPListener.Close()
}
