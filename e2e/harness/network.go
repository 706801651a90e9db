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

// EnterNetwork executes the running program again in a network namespace of its own, so that
// networks can be made in it that nobody else sees and that end with it. It needs root. There it
// returns true at once; here it returns the exit code of the program there, which gets the signals
// that come here, and whose temporary files are removed however it ends.
func EnterNetwork() (inside bool, code int) {
	if os.Getenv(NetworkVariable) != "" {
		return true, 0
	}
	temporary, err := TempDir("lh-") // short: sockets are made below it
	if err != nil {
		return false, ExitCode(os.Args[0], err)
	}
	defer func() { _ = os.RemoveAll(temporary) }() // in the temporary directory
	// Those of a terminal reach both, as one process group.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), NetworkVariable+"=1", "TMPDIR="+temporary)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		err = fmt.Errorf("make a network namespace (this needs root): %w", err)
		return false, ExitCode(os.Args[0], err)
	}
	go func() {
		for s := range signals {
			if s != syscall.SIGINT {
				_ = cmd.Process.Signal(s) // it may have ended
			}
		}
	}()
	_ = cmd.Wait() // what it ended with is in cmd.ProcessState
	signal.Stop(signals)
	close(signals)
	return false, exitCode(cmd.ProcessState)
}

// Network is a bridge in this program's network namespace. Each Node has a namespace of its own
// with a wire to it, so that what passes between two of them can be cut packet by packet, one way
// or both, while every connection stays. Nothing of it has a name outside of this program: it is
// gone when the program is, however that ends.
type Network struct {
	// Host is the address of this program itself, which no cut touches.
	Host string

	index int64

	mu     sync.Mutex
	count  int // of nodes
	losses []*Loss
}

// Node is one machine on a Network. nil is where this program runs.
type Node struct {
	Name string
	Addr string // IPv4

	network   *Network
	namespace *os.File
	wire      string // our end's name
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
		return nil, errors.New("make a network: " +
			"this program is not in a network namespace of its own")
	}
	k := networks.Add(1)
	n := &Network{Host: fmt.Sprintf("10.%d.0.1", k), index: k}
	// A bridge without an address of its own takes the lowest of its ports'. It would change as
	// nodes come and go, and the others would go on sending to the old one until their ARP entries
	// expire.
	err := ip("link set lo up",
		fmt.Sprintf("link add %s address 02:00:00:00:00:%02x type bridge", n.bridge(), k),
		fmt.Sprintf("addr add %s/16 dev %s", n.Host, n.bridge()),
		fmt.Sprintf("link set %s up", n.bridge()))
	if err != nil {
		n.Close()
		return nil, fmt.Errorf("make a network: %w", err)
	}
	return n, nil
}

func (n *Network) bridge() string { return fmt.Sprintf("lh%d", n.index) }

// Close ends the network. The nodes are closed by whoever made them.
func (n *Network) Close() {
	_ = n.Recover()                     // there may be no table
	_ = ip("link delete " + n.bridge()) // there may be no bridge
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
	err = ip(
		fmt.Sprintf("link add %s type veth peer name eth0 netns /proc/%d/fd/%d",
			node.wire, os.Getpid(), node.namespace.Fd()),
		fmt.Sprintf("link set %s master %s up", node.wire, n.bridge()))
	if err == nil {
		err = node.Do(func() error {
			return ip("link set lo up", "addr add "+addr+"/16 dev eth0", "link set eth0 up")
		})
	}
	if err != nil {
		node.Close()
		return nil, fmt.Errorf("make a node: %w", err)
	}
	return node, nil
}

// Close cuts the node off for good. Its namespace is gone when the last process in it has ended,
// and no witness listens there.
func (node *Node) Close() {
	node.network.mu.Lock()
	for _, l := range node.network.losses {
		l.links = slices.DeleteFunc(l.links, func(k Link) bool {
			return k.From == node || k.To == node
		})
	}
	node.network.mu.Unlock()
	_ = ip("link delete " + node.wire) // it may not exist
	_ = node.namespace.Close()
}

// Do calls f on a thread that is in the node's namespace. What f starts is there too.
func (node *Node) Do(f func() error) error {
	if node == nil {
		return f()
	}
	return elsewhere(func() error {
		if err := unix.Setns(int(node.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the namespace of node %s: %w", node.Name, err)
		}
		return f()
	})
}

func newNamespace() (made *os.File, err error) {
	err = elsewhere(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		made, err = os.Open(ownNamespace)
		return err
	})
	return made, err
}

const ownNamespace = "/proc/thread-self/ns/net"

// elsewhere calls f, which may leave its thread in another namespace, on a thread of its own.
func elsewhere(f func() error) error {
	runtime.LockOSThread()
	here, err := os.Open(ownNamespace)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() { // also where f ends the goroutine
		if err := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); err != nil {
			// The thread must not end either: what it forked would end with it.
			panic(fmt.Sprintf("e2e: a thread can't go back to its namespace: %v", err))
		}
		_ = here.Close()
		runtime.UnlockOSThread()
	}()
	return f()
}

// Loss is packets being dropped on some links, until End.
type Loss struct {
	network *Network
	percent int
	links   []Link
}

// Cut drops every packet on these links, on all from the same moment on.
func (n *Network) Cut(links ...Link) (*Loss, error) { return n.Lose(100, links...) }

// Lose drops so many of a hundred packets on these links. Losses may overlap: on each link the
// worst of them counts.
func (n *Network) Lose(percent int, links ...Link) (*Loss, error) {
	l := &Loss{n, percent, links}
	return l, n.change(func() { n.losses = append(n.losses, l) })
}

// End ends the loss. Others on the same links go on.
func (l *Loss) End() error {
	n := l.network
	return n.change(func() {
		n.losses = slices.DeleteFunc(n.losses, func(o *Loss) bool { return o == l })
	})
}

// Recover ends all losses.
func (n *Network) Recover() error { return n.change(func() { n.losses = nil }) }

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

// change changes the losses, and has the kernel replace all rules of this network at once.
func (n *Network) change(f func()) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	var rules []string
	for link, percent := range n.worst() {
		chance := fmt.Sprintf("numgen random mod 100 < %d", percent)
		if percent == 100 {
			chance = "" // not every kernel that can drop packets can draw lots
		}
		rules = append(rules, fmt.Sprintf("iifname %s oifname %s %s counter drop",
			link.From.wire, link.To.wire, chance))
	}
	table := "bridge " + n.bridge()
	script := fmt.Sprintf("table %s {}\ndelete table %s\n", table, table)
	if len(rules) > 0 {
		script += fmt.Sprintf(
			"table %s {\nchain forward {\ntype filter hook forward priority 0;\n%s\n}\n}\n",
			table, strings.Join(rules, "\n"))
	}
	if err := feed(script, "nft", "-f", "-"); err != nil {
		return fmt.Errorf("set rules by nft (Debian's package nftables): %w", err)
	}
	return nil
}

// ip carries out commands of ip(8), until one fails.
func ip(commands ...string) error {
	return feed(strings.Join(commands, "\n"), "ip", "-batch", "-")
}

// feed runs a program that reads what it is to do.
func feed(script, program string, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s\n%s", program, err, bytes.TrimSpace(out), script)
	}
	return nil
}
