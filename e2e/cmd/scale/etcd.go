//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// count is what etcd and this process have counted up to a moment, or between two.
type count struct {
	At float64 `json:"seconds"`
	// Requests are those that etcd has received, by method. A renewal is one LeaseKeepAlive; a
	// Watch is a watch that was opened; Progress are the questions whether a watch is still served.
	Requests  map[string]float64 `json:"requests"`
	Events    float64            `json:"events"`     // of watches, sent
	BytesSent float64            `json:"bytes_sent"` // by etcd to its clients
	EtcdCPU   float64            `json:"etcd_cpu_seconds"`
	CPU       float64            `json:"cpu_seconds"`         // of this process, with the candidates
	Machine   float64            `json:"machine_cpu_seconds"` // of all there is, other programs too

	// What etcd shows of itself at the moment.
	watchers, keys, resident, goroutines float64
}

// add adds what d has counted, times a factor.
func (c *count) add(d count, factor float64) {
	if c.Requests == nil {
		c.Requests = map[string]float64{}
	}
	for method, n := range d.Requests {
		c.Requests[method] += factor * n
	}
	c.At += factor * d.At
	c.Events += factor * d.Events
	c.BytesSent += factor * d.BytesSent
	c.EtcdCPU += factor * d.EtcdCPU
	c.CPU += factor * d.CPU
	c.Machine += factor * d.Machine
}

// since is what was counted after before.
func (c count) since(before count) count {
	var d count
	d.add(c, 1)
	d.add(before, -1)
	maps.DeleteFunc(d.Requests, func(_ string, n float64) bool { return n == 0 })
	return d
}

// meter reads etcd's metrics.
type meter struct {
	member *harness.Member
	http   *http.Client
}

func newMeter(m *harness.Member) meter {
	// To compress its answers would cost etcd more than all that it does for a change of leader.
	transport := &http.Transport{DisableCompression: true}
	return meter{m, &http.Client{Timeout: 10 * time.Second, Transport: transport}}
}

// sample returns what was counted up to now.
func (m meter) sample(ctx context.Context) (count, error) {
	c := count{Requests: map[string]float64{}}
	if err := m.read(ctx, &c); err != nil {
		return c, fmt.Errorf("read the metrics of etcd: %w", err)
	}
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return c, err
	}
	c.CPU = time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
	c.At = harness.Now().Seconds()
	var err error
	c.Machine, err = machineCPU()
	return c, err
}

func (m meter) read(ctx context.Context, c *count) error {
	url := m.member.MetricsURL + "/metrics"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := m.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	known := map[string]*float64{
		"etcd_debugging_mvcc_events_total":          &c.Events,
		"etcd_network_client_grpc_sent_bytes_total": &c.BytesSent,
		"process_cpu_seconds_total":                 &c.EtcdCPU,
		"etcd_debugging_mvcc_watcher_total":         &c.watchers,
		"etcd_debugging_mvcc_keys_total":            &c.keys,
		"process_resident_memory_bytes":             &c.resident,
		"go_goroutines":                             &c.goroutines,
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, text, _ := strings.Cut(lines.Text(), " ")
		value, err := strconv.ParseFloat(text, 64)
		if strings.HasPrefix(name, "#") || value == 0 && err == nil {
			continue
		}
		const started, received = "grpc_server_started_total{", "grpc_server_msg_received_total{"
		switch to := known[name]; {
		case to != nil:
			*to = value
		case strings.HasPrefix(name, started):
			_, rest, _ := strings.Cut(name, `grpc_method="`)
			method, _, _ := strings.Cut(rest, `"`)
			c.Requests[method] = value
		case strings.HasPrefix(name, received+`grpc_method="Watch"`):
			c.Requests["Progress"] += value
		default:
			continue
		}
		if err != nil {
			return err
		}
	}
	c.Requests["Progress"] -= c.Requests["Watch"] // which is one message for each watch
	return lines.Err()
}

// machineCPU is for how long the machine's CPUs have worked, in seconds.
func machineCPU() (float64, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(data), "\n")
	fields := strings.Fields(first) // cpu user nice system idle iowait irq softirq steal, in 1/100 s
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

// resident is this process's resident memory in bytes.
func resident() (float64, error) {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	pages, err := strconv.ParseFloat(strings.Fields(string(data))[1], 64)
	return pages * float64(os.Getpagesize()), err
}
