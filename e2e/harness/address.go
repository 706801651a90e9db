//go:build linux

package harness

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// AddressHooks are the settings with which the machine of a leader has the virtual address: those
// of docs/hooks.md. They need an interface, see AddressWatch.Add, and CAP_NET_ADMIN.
var AddressHooks = []string{
	"LEASEHOLD_PRE_START=ip address replace 192.0.2.1/32 dev virtual",
	"LEASEHOLD_POST_STOP=ip address flush dev virtual to 192.0.2.1",
}

var virtualAddress = netip.MustParseAddr("192.0.2.1")

// Stay is a time in which a machine had the virtual address.
type Stay struct {
	Machine  string
	From, To time.Duration // readings of Now; To is 0 while the machine has it
}

// AddressWatch sees when machines have the virtual address. The kernel reports each change as it
// makes it, those of all machines to one socket. So their order is certain. The times are those at
// which the watch has read the reports, a little later.
type AddressWatch struct {
	file *os.File
	over chan struct{} // closed when nothing is read any more

	mu       sync.Mutex
	machines map[uint32]string // by the index of their interface
	stays    []Stay
	err      error
}

// virtualIndexes are the indexes of interfaces that have been used. The kernel's own are smaller.
var virtualIndexes atomic.Uint32

// WatchAddress begins to watch. It sees the nodes of this program's networks.
func WatchAddress() (*AddressWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK,
		unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch addresses: %w", err)
	}
	const buffer = 4 << 20 // bytes: a report that does not fit would be lost
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer),
		// Reports from each namespace that has an id in ours: a wire to it gives it one.
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1),
		unix.Bind(fd, &unix.SockaddrNetlink{
			Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_IPV4_IFADDR - 1),
		}))
	w := &AddressWatch{
		file: os.NewFile(uintptr(fd), "netlink"), over: make(chan struct{}),
		machines: map[uint32]string{},
	}
	if err != nil {
		_ = w.file.Close()
		return nil, fmt.Errorf("watch addresses: %w", err)
	}
	go w.read()
	return w, nil
}

// Close ends the watch.
func (w *AddressWatch) Close() {
	_ = w.file.Close()
	<-w.over
}

// Add makes the interface for the address on a node, and watches it.
func (w *AddressWatch) Add(node *Node) error {
	index := 1<<20 + virtualIndexes.Add(1)
	w.mu.Lock()
	w.machines[index] = node.Name
	w.mu.Unlock()
	// A bridge without ports: not every kernel has dummy interfaces.
	err := node.Do(func() error {
		return ip(fmt.Sprintf("link add virtual index %d type bridge", index))
	})
	if err != nil {
		return fmt.Errorf("make an interface for the virtual address: %w", err)
	}
	return nil
}

// Stays are all that were seen so far, in the order of their beginnings. The error says that the
// watch may have missed some.
func (w *AddressWatch) Stays() ([]Stay, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.stays), w.err
}

// Wait waits until exactly one machine has the address, and that is this one, or another one.
func (w *AddressWatch) Wait(ctx context.Context, same bool, name string) (on string, err error) {
	err = Until(ctx, func() error {
		stays, err := w.Stays()
		if err != nil {
			return err
		}
		stays = slices.DeleteFunc(stays, func(s Stay) bool { return s.To != 0 })
		if len(stays) != 1 || (stays[0].Machine == name) != same {
			return fmt.Errorf("the address is there: %+v", stays)
		}
		on = stays[0].Machine
		return nil
	})
	return on, err
}

func (w *AddressWatch) read() {
	defer close(w.over)
	buf := make([]byte, 1<<16)
	for {
		n, err := w.file.Read(buf)
		at := Now()
		var messages []syscall.NetlinkMessage
		if err == nil {
			messages, err = syscall.ParseNetlinkMessage(buf[:n])
		}
		w.mu.Lock()
		for i := range messages {
			err = errors.Join(err, w.note(&messages[i], at))
		}
		if err != nil && !errors.Is(err, os.ErrClosed) {
			w.err = fmt.Errorf("watch addresses: %w", err)
		}
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// note takes in what the kernel reports: an address of an interface that came, or went.
func (w *AddressWatch) note(m *syscall.NetlinkMessage, at time.Duration) error {
	if m.Header.Type != unix.RTM_NEWADDR && m.Header.Type != unix.RTM_DELADDR {
		return nil
	}
	attributes, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return err
	}
	isVirtual := slices.ContainsFunc(attributes, func(a syscall.NetlinkRouteAttr) bool {
		addr, ok := netip.AddrFromSlice(a.Value)
		return a.Attr.Type == unix.IFA_LOCAL && ok && addr == virtualAddress
	})
	// struct ifaddrmsg ends with the index of the interface.
	machine, known := w.machines[binary.NativeEndian.Uint32(m.Data[4:])]
	if !isVirtual || !known {
		return nil
	}
	has := slices.IndexFunc(w.stays, func(s Stay) bool {
		return s.Machine == machine && s.To == 0
	})
	switch came := m.Header.Type == unix.RTM_NEWADDR; {
	case came && has < 0:
		w.stays = append(w.stays, Stay{Machine: machine, From: at})
	case !came && has >= 0:
		w.stays[has].To = at
	}
	return nil
}
