//go:build linux

package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// NetworkVariable marks a program that runs in a network namespace of its own.
const NetworkVariable = "E2E_INSIDE_NETWORK"

// EnterNetwork executes the running program again in a network namespace of
// its own, so that networks can be made in it that nobody else sees and that
// end with it. It needs root. There it returns true at once; here it returns
// the exit code of the program there, which gets the signals that come here.
func EnterNetwork() (inside bool, code int) {
	if os.Getenv(NetworkVariable) != "" {
		return true, 0
	}
	// Those of a terminal reach both, as one process group.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	// PDEATHSIG comes when the thread ends that forked.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), NetworkVariable+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: make a network namespace (this needs root): %v\n", os.Args[0], err)
		return false, 1
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // what it ended with is in cmd.ProcessState
	}()
	for {
		select {
		case s := <-signals:
			if s != syscall.SIGINT {
				_ = cmd.Process.Signal(s) // it may have ended
			}
		case <-ended:
			return false, (&process{cmd: cmd}).code()
		}
	}
}

// Network is a bridge in this program's network namespace. Each Node has a
// namespace of its own with a wire to it, so that what passes between two of
// them can be cut packet by packet, one way or both, while every connection
// stays. Nothing of it has a name outside of this program: it is gone when the
// program is, however that ends.
type Network struct {
	// Host is the address of this program itself, which no cut touches.
	Host string

	index int64

	mu     sync.Mutex
	count  int // of nodes
	losses []*Loss
}

// Node is one machine on a Network.
type Node struct {
	Name string
	Addr string // IPv4

	network   *Network
	namespace *os.File
	wire      string // our end's name
	closing   []func()
}

// Link is one direction between two nodes.
type Link struct{ From, To *Node }

// Links lists the links from each of some nodes to each of others.
func Links(from, to []*Node) []Link {
	var links []Link
	for _, a := range from {
		for _, b := range to {
			links = append(links, Link{a, b})
		}
	}
	return links
}

// LinksBetween lists the links between a node and others, in both directions.
func LinksBetween(a *Node, others ...*Node) []Link {
	return append(Links([]*Node{a}, others), Links(others, []*Node{a})...)
}

var networks atomic.Int64 // keeps their addresses apart

// NewNetwork makes a network. The program must have gone through EnterNetwork.
func NewNetwork() (*Network, error) {
	if os.Getenv(NetworkVariable) == "" {
		return nil, errors.New("make a network: this program is not in a network namespace of its own")
	}
	k := networks.Add(1)
	n := &Network{Host: fmt.Sprintf("10.%d.0.1", k), index: k}
	err := errors.Join(
		ip("link", "set", "lo", "up"),
		// A bridge without an address of its own takes the lowest of its ports'. It would change as nodes come and go, and
		// the others would go on sending to the old one until their ARP entries expire.
		ip("link", "add", n.bridge(), "address", fmt.Sprintf("02:00:00:00:00:%02x", k), "type", "bridge"),
		ip("addr", "add", n.Host+"/16", "dev", n.bridge()),
		ip("link", "set", n.bridge(), "up"),
	)
	if err != nil {
		n.Close()
		return nil, fmt.Errorf("make a network: %w", err)
	}
	return n, nil
}

func (n *Network) bridge() string { return fmt.Sprintf("lh%d", n.index) }

// Close ends the network. The nodes are closed by whoever made them.
func (n *Network) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.losses = nil
	_ = n.load()                         // there may be no table
	_ = ip("link", "delete", n.bridge()) // there may be no bridge
}

// Node makes a node with an address of its own.
func (n *Network) Node(name string) (*Node, error) {
	n.mu.Lock()
	n.count++
	id := n.count
	n.mu.Unlock()
	// No address comes twice: who knew the last holder must not take the next one for it.
	addr := fmt.Sprintf("10.%d.%d.%d", n.index, 1+id/250, 1+id%250)
	node := &Node{Name: name, network: n, wire: fmt.Sprintf("lh%dn%d", n.index, id), Addr: addr}
	var err error
	if node.namespace, err = newNamespace(); err != nil {
		return nil, fmt.Errorf("make a node: %w", err)
	}
	err = errors.Join(
		ip("link", "add", node.wire, "type", "veth", "peer", "name", "eth0",
			"netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), node.namespace.Fd())),
		ip("link", "set", node.wire, "master", n.bridge(), "up"),
		node.Do(func() error {
			return errors.Join(
				ip("link", "set", "lo", "up"),
				ip("addr", "add", node.Addr+"/16", "dev", "eth0"),
				ip("link", "set", "eth0", "up"),
			)
		}),
	)
	if err != nil {
		node.Close()
		return nil, fmt.Errorf("make a node: %w", err)
	}
	return node, nil
}

// Close cuts the node off for good. Its namespace is gone when the last
// process in it has ended.
func (node *Node) Close() {
	node.network.mu.Lock()
	for _, l := range node.network.losses {
		l.links = slices.DeleteFunc(l.links, func(k Link) bool { return k.From == node || k.To == node })
	}
	node.network.mu.Unlock()
	for _, f := range node.closing {
		f()
	}
	_ = ip("link", "delete", node.wire) // it may not exist
	_ = node.namespace.Close()
}

// Do calls f on a thread that is in the node's namespace. What f starts is
// there too.
func (node *Node) Do(f func() error) error {
	runtime.LockOSThread()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() { _ = here.Close() }()
	if err := unix.Setns(int(node.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the namespace of node %s: %w", node.Name, err)
	}
	err = f()
	if back := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread must not end either: what it forked would end with it.
		panic(fmt.Sprintf("e2e: a thread can't leave the namespace of node %s: %v", node.Name, back))
	}
	runtime.UnlockOSThread()
	return err
}

func newNamespace() (*os.File, error) {
	runtime.LockOSThread()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	defer func() { _ = here.Close() }()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	made, err := os.Open("/proc/thread-self/ns/net")
	if back := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); back != nil {
		panic(fmt.Sprintf("e2e: a thread can't leave the namespace that it made: %v", back))
	}
	runtime.UnlockOSThread()
	return made, err
}

// Loss is packets being dropped on some links, until End.
type Loss struct {
	network *Network
	percent int
	links   []Link
}

// Cut drops every packet on these links, on all from the same moment on.
func (n *Network) Cut(links ...Link) (*Loss, error) { return n.Lose(100, links...) }

// Lose drops so many of a hundred packets on these links. Losses may overlap: on
// each link the worst of them counts.
func (n *Network) Lose(percent int, links ...Link) (*Loss, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &Loss{n, percent, links}
	n.losses = append(n.losses, l)
	return l, n.load()
}

// End ends the loss. Others on the same links go on.
func (l *Loss) End() error {
	l.network.mu.Lock()
	defer l.network.mu.Unlock()
	l.network.losses = slices.DeleteFunc(l.network.losses, func(o *Loss) bool { return o == l })
	return l.network.load()
}

// Recover ends all losses.
func (n *Network) Recover() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.losses = nil
	return n.load()
}

// Lossy reports whether packets between a node and one of the others are dropped.
func (n *Network) Lossy(node *Node, others ...*Node) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for link := range n.worst() {
		if link.From == node && slices.Contains(others, link.To) ||
			link.To == node && slices.Contains(others, link.From) {
			return true
		}
	}
	return false
}

// worst is the percentage of packets that each link loses.
func (n *Network) worst() map[Link]int {
	worst := map[Link]int{}
	for _, l := range n.losses {
		for _, link := range l.links {
			worst[link] = max(worst[link], l.percent)
		}
	}
	return worst
}

var droppedPattern = regexp.MustCompile(`counter packets (\d+) `)

// Dropped is how many packets were dropped since the last loss began or ended.
func (n *Network) Dropped(ctx context.Context) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	out, err := exec.CommandContext(ctx, "nft", "list", "table", "bridge", n.bridge()).Output()
	if err != nil {
		return 0, fmt.Errorf("ask nft for what was dropped: %w", err)
	}
	sum := 0
	for _, m := range droppedPattern.FindAllSubmatch(out, -1) {
		packets, err := strconv.Atoi(string(m[1]))
		if err != nil {
			return 0, err
		}
		sum += packets
	}
	return sum, nil
}

// load has the kernel replace all rules of this network at once.
func (n *Network) load() error {
	var rules []string
	for link, percent := range n.worst() {
		rule := "counter drop"
		if percent < 100 {
			rule = fmt.Sprintf("numgen random mod 100 < %d counter drop", percent)
		}
		rules = append(rules,
			fmt.Sprintf("iifname %s oifname %s %s", link.From.wire, link.To.wire, rule))
	}
	slices.Sort(rules)
	table := "bridge " + n.bridge()
	script := fmt.Sprintf("table %s {}\ndelete table %s\n", table, table)
	if len(rules) > 0 {
		script += fmt.Sprintf(
			"table %s {\nchain forward {\ntype filter hook forward priority 0;\n%s\n}\n}\n",
			table, strings.Join(rules, "\n"))
	}
	cmd := exec.CommandContext(context.Background(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("set rules by nft (Debian's package nftables): %w: %s",
			err, bytes.TrimSpace(out))
	}
	return nil
}

func ip(args ...string) error {
	cmd := exec.CommandContext(context.Background(), "ip", args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
