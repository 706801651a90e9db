//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ClusterConfig says which etcd to run.
type ClusterConfig struct {
	Etcd  Etcd
	Size  int      // members; 0 is one
	Flags []string // more flags for every member
	TLS   *Certs   // serve clients over TLS and ask for their certificates
	// Network has each member on a node of its own. nil: all on 127.0.0.1.
	Network *Network
}

// Cluster is an etcd cluster of real server processes. It does not sync to disk: what it keeps
// survives a SIGKILL of a member, not a crash of the machine.
type Cluster struct {
	Members []*Member
	// Auth is "user:password" for Etcdctl, once auth is enabled.
	Auth string

	cfg ClusterConfig
	dir string
}

// Member is one etcd server. Its ports and data stay the same over restarts.
type Member struct {
	*Child    // nil before Start
	Name      string
	ClientURL string
	// MetricsURL serves /metrics and /health without TLS and without auth.
	MetricsURL string
	Node       *Node // nil on 127.0.0.1

	server  string // the program
	peerURL string
	cluster *Cluster
	flags   []string
}

// errMemberEnded says that a member has ended by itself.
var errMemberEnded = errors.New("it has ended by itself")

// StartCluster starts a cluster and waits until it serves.
func StartCluster(ctx context.Context, cfg ClusterConfig) (*Cluster, error) {
	for attempt := 1; ; attempt++ {
		dir, err := TempDir("leasehold-etcd-")
		if err != nil {
			return nil, err
		}
		c := &Cluster{cfg: cfg, dir: dir}
		if err = c.start(ctx); err == nil {
			return c, nil
		}
		c.Close()
		// Somebody else may have taken a port that was free just before.
		if attempt == 3 || !errors.Is(err, errMemberEnded) {
			return nil, fmt.Errorf("start etcd: %w", err)
		}
	}
}

func (c *Cluster) start(ctx context.Context) error {
	var initial []string
	for i := range max(1, c.cfg.Size) {
		m, err := c.newMember("m" + strconv.Itoa(i+1))
		if err != nil {
			return err
		}
		initial = append(initial, m.Name+"="+m.peerURL)
	}
	if c.cfg.TLS != nil && c.cfg.Network != nil {
		if err := c.cfg.TLS.IssueServer(c.Nodes()...); err != nil {
			return err
		}
	}
	for _, m := range c.Members {
		m.flags = append([]string{
			"--name", m.Name,
			"--data-dir", filepath.Join(c.dir, m.Name),
			"--listen-client-urls", m.ClientURL, "--advertise-client-urls", m.ClientURL,
			"--listen-peer-urls", m.peerURL, "--initial-advertise-peer-urls", m.peerURL,
			"--listen-metrics-urls", m.MetricsURL,
			"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", c.dir,
			"--unsafe-no-fsync", "--log-level", "info", "--log-outputs", "stderr",
			"--logger", "zap", "--pre-vote", // the defaults since 3.5
		}, c.cfg.Flags...)
		if c.cfg.TLS != nil {
			m.flags = append(m.flags, "--client-cert-auth", "--trusted-ca-file", c.cfg.TLS.CAFile,
				"--cert-file", c.cfg.TLS.ServerCertFile, "--key-file", c.cfg.TLS.ServerKeyFile)
		}
		if err := m.Start(); err != nil {
			return err
		}
	}
	return c.WaitHealthy(ctx)
}

// newMember adds a member with its addresses.
func (c *Cluster) newMember(name string) (m *Member, err error) {
	m = &Member{Name: name, server: c.cfg.Etcd.Server, cluster: c}
	c.Members = append(c.Members, m)
	if c.cfg.Network != nil {
		if m.Node, err = c.cfg.Network.Node(name); err != nil {
			return nil, err
		}
	}
	client := "http"
	if c.cfg.TLS != nil {
		client = "https"
	}
	for _, u := range []struct {
		url          *string
		scheme, port string
	}{
		{&m.ClientURL, client, "2379"},
		{&m.peerURL, "http", "2380"},
		{&m.MetricsURL, "http", "2381"},
	} {
		addr := ""
		if m.Node != nil {
			addr = net.JoinHostPort(m.Node.Addr, u.port)
		} else if addr, err = FreeAddr(); err != nil {
			return nil, err
		}
		*u.url = u.scheme + "://" + addr
	}
	return m, nil
}

// Close kills every member and removes its data.
func (c *Cluster) Close() {
	for _, m := range c.Members {
		m.Kill()
		if m.Node != nil {
			m.Node.Close()
		}
	}
	_ = os.RemoveAll(c.dir) // in the temporary directory; nothing depends on it
}

// Endpoints are the client URLs of all members.
func (c *Cluster) Endpoints() []string {
	var urls []string
	for _, m := range c.Members {
		urls = append(urls, m.ClientURL)
	}
	return urls
}

// Nodes are the nodes of the given members; without any, of all.
func (c *Cluster) Nodes(members ...*Member) []*Node {
	if len(members) == 0 {
		members = c.Members
	}
	var nodes []*Node
	for _, m := range members {
		nodes = append(nodes, m.Node)
	}
	return nodes
}

// Except are all members but the given one.
func (c *Cluster) Except(m *Member) []*Member {
	return slices.DeleteFunc(slices.Clone(c.Members), func(o *Member) bool { return o == m })
}

// WaitHealthy waits until every running member serves and has a leader.
func (c *Cluster) WaitHealthy(ctx context.Context) error {
	for _, m := range c.Members {
		if m.Running() {
			if err := m.WaitHealthy(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// Leader waits for a member that leads, by its own account. A paused member is not asked for long.
func (c *Cluster) Leader(ctx context.Context) (*Member, error) { return leading(ctx, c.Members) }

// Successor waits until another member than the given one leads.
func (c *Cluster) Successor(ctx context.Context, of *Member) (*Member, error) {
	return leading(ctx, c.Except(of))
}

func leading(ctx context.Context, among []*Member) (leader *Member, err error) {
	err = Until(ctx, func() error {
		i := slices.IndexFunc(among, func(m *Member) bool { return m.Leads(ctx) })
		if i < 0 {
			return errors.New("no member of etcd leads")
		}
		leader = among[i]
		return nil
	})
	return leader, err
}

// MoveLeader makes a member the leader, and waits until it is.
func (c *Cluster) MoveLeader(ctx context.Context, to *Member) error {
	from, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	client, err := c.NewClient(from.ClientURL) // only the leader can
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	status, err := client.Status(ctx, to.ClientURL)
	if err == nil && from != to {
		_, err = client.MoveLeader(ctx, status.Header.MemberId)
	}
	if err != nil {
		return fmt.Errorf("move etcd's leadership to %s: %w", to.Name, err)
	}
	_, err = leading(ctx, []*Member{to})
	return err
}

// EtcdctlCommand is Etcdctl for commands that stay, such as elect and lock.
func (c *Cluster) EtcdctlCommand(endpoints []string, args ...string) *exec.Cmd {
	flags := []string{"--endpoints", strings.Join(endpoints, ",")}
	if c.Auth != "" {
		flags = append(flags, "--user", c.Auth)
	}
	if t := c.cfg.TLS; t != nil {
		flags = append(flags,
			"--cacert", t.CAFile, "--cert", t.ClientCertFile, "--key", t.ClientKeyFile)
	}
	return exec.Command(c.cfg.Etcd.Ctl, append(flags, args...)...)
}

// Etcdctl runs etcdctl against all members and returns its standard output.
func (c *Cluster) Etcdctl(ctx context.Context, args ...string) (string, error) {
	whole := c.EtcdctlCommand(c.Endpoints(), args...)
	cmd := exec.CommandContext(ctx, whole.Path, whole.Args[1:]...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("etcdctl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), err
}

// EnableAuth turns auth on with a user root and a user for candidates, who may do anything under
// the given election prefix. Etcdctl is root from then on.
func (c *Cluster) EnableAuth(ctx context.Context, user, password, election string) error {
	for _, args := range [][]string{
		{"user", "add", "root:root-secret"},
		{"user", "grant-role", "root", "root"},
		{"role", "add", CandidateRole},
		{"role", "grant-permission", "--prefix", CandidateRole, "readwrite", election},
		{"user", "add", user + ":" + password},
		{"user", "grant-role", user, CandidateRole},
		{"auth", "enable"},
	} {
		_, err := c.Etcdctl(ctx, args...)
		if err != nil && !strings.Contains(err.Error(), "role name already exists") {
			return err
		}
	}
	c.Auth = "root:root-secret"
	return nil
}

// Authentications is how often a password was checked so far.
func (c *Cluster) Authentications(ctx context.Context) (float64, error) {
	sum := 0.0
	for _, m := range c.Members {
		n, err := m.Metric(ctx,
			`grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"`)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// Leases lists the ids of all leases, as etcdctl prints them.
func (c *Cluster) Leases(ctx context.Context) ([]string, error) {
	out, err := c.Etcdctl(ctx, "lease", "list")
	isLease := func(word string) bool { return len(word) == 16 } // the rest is "found N leases"
	return slices.DeleteFunc(strings.Fields(out), func(w string) bool { return !isLease(w) }), err
}

// Start starts a member that does not run. It does not wait until it serves.
func (m *Member) Start() error {
	// It logs into a file: a busy program that reads a pipe too late would make etcd wait.
	log, err := os.OpenFile(m.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start etcd member %s: %w", m.Name, err)
	}
	defer func() { _ = log.Close() }() // the member has its own
	cmd := exec.Command(m.server, m.flags...)
	cmd.Stdout, cmd.Stderr = log, log
	// Variables that configure etcd would overrule nothing but confuse it.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "ETCD_")
	})
	c, err := StartChild("etcd member "+m.Name, m.Node, cmd)
	if err != nil {
		return err
	}
	m.Child = c
	return nil
}

// Flags are those that it is started with.
func (m *Member) Flags() []string { return slices.Clone(m.flags) }

// Stop asks the member to end and waits until it has. A leader hands its leadership over first.
func (m *Member) Stop(ctx context.Context) error {
	if !m.Running() {
		return nil
	}
	err := m.Signal(syscall.SIGTERM)
	if err == nil {
		_, err = m.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("stop etcd member %s: %w", m.Name, err)
	}
	return nil
}

// Pause stops the member's process: its connections stay, nothing answers.
func (m *Member) Pause() error {
	if err := m.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return WaitStopped(m.Pid())
}

// Continue ends a pause.
func (m *Member) Continue() error { return m.Signal(syscall.SIGCONT) }

// Restart stops the member and starts it again with the same data and ports.
func (m *Member) Restart(ctx context.Context) error {
	if err := m.Stop(ctx); err != nil {
		return err
	}
	if err := m.Start(); err != nil {
		return err
	}
	return m.WaitHealthy(ctx)
}

// Upgrade is Restart with another etcd.
func (m *Member) Upgrade(ctx context.Context, server string) error {
	m.server = server
	return m.Restart(ctx)
}

// WaitVersion waits until all members know of each other that they are of that version, such as
// "3.5.0". Only then may one of them be upgraded to the next version.
func (c *Cluster) WaitVersion(ctx context.Context, version string) error {
	return Until(ctx, func() error {
		for _, m := range c.Members {
			_, body, err := Get(ctx, memberTimeout, m.ClientURL+"/version")
			if err != nil {
				return fmt.Errorf("ask etcd member %s for its version: %w", m.Name, err)
			}
			if !strings.Contains(body, fmt.Sprintf(`"etcdcluster":%q`, version)) {
				return fmt.Errorf("etcd member %s: %s, want cluster version %s",
					m.Name, body, version)
			}
		}
		return nil
	})
}

// Log is what the member has written so far, or why that can't be read.
func (m *Member) Log() string {
	text, err := os.ReadFile(m.logFile())
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (m *Member) logFile() string { return filepath.Join(m.cluster.dir, m.Name+".log") }

// WaitHealthy waits until the member serves and knows a leader.
func (m *Member) WaitHealthy(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	return Until(ctx, func() error {
		if !m.Running() {
			cancel(errMemberEnded)
			return fmt.Errorf("etcd member %s:\n%s", m.Name, m.Log())
		}
		code, _, err := Get(ctx, memberTimeout, m.MetricsURL+"/health")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("it is not healthy: %d", code)
		}
		if err != nil {
			return fmt.Errorf("ask etcd member %s: %w", m.Name, err)
		}
		return nil
	})
}

// Metric adds up the samples of the member whose name and labels begin as given, for example
// `grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"`.
func (m *Member) Metric(ctx context.Context, prefix string) (float64, error) {
	return readMetric(ctx, memberTimeout, m.MetricsURL, prefix)
}

// Leads reports whether the member leads etcd, by its own account.
func (m *Member) Leads(ctx context.Context) bool {
	v, err := m.Metric(ctx, "etcd_server_is_leader")
	return err == nil && v == 1
}

// memberTimeout is how long a member is asked: one that is paused accepts connections and never
// answers.
const memberTimeout = time.Second

// Get asks an HTTP server once, on a connection of its own.
func Get(ctx context.Context, within time.Duration, url string) (code int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	client := http.Client{Timeout: within, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data), err
}

// readMetric adds up the samples that begin with prefix, of those that a server shows.
func readMetric(
	ctx context.Context, within time.Duration, url, prefix string,
) (sum float64, err error) {
	text, err := getMetrics(ctx, within, url)
	if err != nil {
		return 0, err
	}
	return addSamples(text, prefix)
}

// getMetrics gets what a server shows in Prometheus' text format.
func getMetrics(ctx context.Context, within time.Duration, url string) (text string, err error) {
	code, text, err := Get(ctx, within, url+"/metrics")
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("status %d", code)
	}
	if err != nil {
		return "", fmt.Errorf("read the metrics of %s: %w", url, err)
	}
	return text, nil
}

// addSamples adds up the samples whose name begins as what does, and that have its labels.
func addSamples(text, what string) (sum float64, err error) {
	found := false
	name, labels, _ := strings.Cut(strings.TrimSuffix(what, "}"), "{")
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, name) || !strings.Contains(line, labels) {
			continue
		}
		number := strings.TrimSpace(line[strings.LastIndexByte(line, ' ')+1:])
		value, err := strconv.ParseFloat(number, 64)
		if err != nil {
			return 0, fmt.Errorf("read sample %q: %w", line, err)
		}
		sum, found = sum+value, true
	}
	if !found {
		return 0, fmt.Errorf("no sample %s", what)
	}
	return sum, nil
}
