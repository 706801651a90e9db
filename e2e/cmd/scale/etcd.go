//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// count is what etcd and this process have counted up to a moment, or between
// two.
type count struct {
	At float64 `json:"seconds"`
	// Requests are those that etcd has received, by method. A renewal is one LeaseKeepAlive; a
	// Watch is a watch that was opened; Progress are the questions whether a watch is still served.
	Requests  map[string]float64 `json:"requests"`
	Events    float64            `json:"events"`     // of watches, sent
	BytesSent float64            `json:"bytes_sent"` // by etcd to its clients
	EtcdCPU   float64            `json:"etcd_cpu_seconds"`
	CPU       float64            `json:"cpu_seconds"`         // of this process: the candidates and who measures
	Machine   float64            `json:"machine_cpu_seconds"` // of all there is, other programs too
}

// gauges are what etcd shows of itself at a moment.
type gauges struct {
	watchers, keys, resident, goroutines float64
}

// meter reads etcd's metrics.
type meter struct {
	member *harness.Member
	http   *http.Client
}

func newMeter(m *harness.Member) meter {
	// To compress its answers would cost etcd more than all that it does for a change of leader.
	return meter{m, &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableCompression: true}}}
}

// sample returns what was counted up to now.
func (m meter) sample(ctx context.Context) (count, gauges, error) {
	c := count{Requests: map[string]float64{}}
	var g gauges
	fail := func(err error) (count, gauges, error) {
		return c, g, fmt.Errorf("read the metrics of etcd: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.member.MetricsURL+"/metrics", nil)
	if err != nil {
		return fail(err)
	}
	resp, err := m.http.Do(req)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, found := strings.Cut(lines.Text(), " ")
		if !found || strings.HasPrefix(name, "#") || value == "0" {
			continue
		}
		to := map[string]*float64{
			"etcd_debugging_mvcc_events_total":          &c.Events,
			"etcd_network_client_grpc_sent_bytes_total": &c.BytesSent,
			"process_cpu_seconds_total":                 &c.EtcdCPU,
			"etcd_debugging_mvcc_watcher_total":         &g.watchers,
			"etcd_debugging_mvcc_keys_total":            &g.keys,
			"process_resident_memory_bytes":             &g.resident,
			"go_goroutines":                             &g.goroutines,
		}[name]
		method := ""
		switch {
		case to != nil:
		case strings.HasPrefix(name, `grpc_server_started_total{`):
			method = label(name, "grpc_method")
		case strings.HasPrefix(name, `grpc_server_msg_received_total{grpc_method="Watch"`):
			method = "Progress" // and one message for each watch, which is taken off below
		}
		if to == nil && method == "" {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return fail(err)
		}
		if to != nil {
			*to = v
		} else {
			c.Requests[method] = v
		}
	}
	if err := lines.Err(); err != nil {
		return fail(err)
	}
	c.Requests["Progress"] -= c.Requests["Watch"]
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return fail(err)
	}
	c.CPU = time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
	if c.Machine, err = busy(); err != nil {
		return fail(err)
	}
	c.At = harness.Now().Seconds()
	return c, g, nil
}

// label is the value of a label in a sample's name.
func label(name, of string) string {
	_, rest, _ := strings.Cut(name, of+`="`)
	value, _, _ := strings.Cut(rest, `"`)
	return value
}

// since is what was counted after before.
func (c count) since(before count) count {
	d := count{
		At: c.At - before.At, Requests: map[string]float64{}, Events: c.Events - before.Events,
		BytesSent: c.BytesSent - before.BytesSent, EtcdCPU: c.EtcdCPU - before.EtcdCPU, CPU: c.CPU - before.CPU,
		Machine: c.Machine - before.Machine,
	}
	for method, n := range c.Requests {
		if n -= before.Requests[method]; n != 0 {
			d.Requests[method] = n
		}
	}
	return d
}

// add adds up counts.
func (c *count) add(d count) {
	if c.Requests == nil {
		c.Requests = map[string]float64{}
	}
	for method, n := range d.Requests {
		c.Requests[method] += n
	}
	c.At, c.Events, c.BytesSent = c.At+d.At, c.Events+d.Events, c.BytesSent+d.BytesSent
	c.EtcdCPU, c.CPU, c.Machine = c.EtcdCPU+d.EtcdCPU, c.CPU+d.CPU, c.Machine+d.Machine
}

// busy is for how long the machine's CPUs have worked, in seconds.
func busy() (float64, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(data), "\n")
	fields := strings.Fields(first) // cpu user nice system idle iowait irq softirq steal, in hundredths
	sum := 0.0
	for i, field := range fields[:min(9, len(fields))] {
		if i == 0 || i == 4 || i == 5 {
			continue
		}
		v, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return 0, fmt.Errorf("read /proc/stat: %w", err)
		}
		sum += v
	}
	return sum / 100, nil
}

// resident is this process' resident memory in bytes.
func resident() (float64, error) {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	pages, err := strconv.ParseFloat(strings.Fields(string(data))[1], 64)
	return pages * float64(os.Getpagesize()), err
}
