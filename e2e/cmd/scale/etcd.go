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
	CPU       float64            `json:"cpu_seconds"`         // of this process: the candidates
	Machine   float64            `json:"machine_cpu_seconds"` // of all there is, other programs too
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

// metrics are etcd's, by name and labels.
type metrics map[string]float64

// httpClient reads them. To compress the answers would cost etcd more than all that it does for a
// change of leader.
var httpClient = &http.Client{
	Timeout: time.Minute, Transport: &http.Transport{DisableCompression: true},
}

// metrics reads those of a moment.
func (t *trial) metrics(ctx context.Context) (metrics, error) {
	url := t.member.MetricsURL + "/metrics"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := httpClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("read the metrics of etcd: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	m := metrics{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, text, _ := strings.Cut(lines.Text(), " ")
		if name == "#" {
			continue
		}
		if m[name], err = strconv.ParseFloat(text, 64); err != nil {
			return nil, fmt.Errorf("read the metrics of etcd: %w", err)
		}
	}
	return m, lines.Err()
}

// sample returns what was counted up to now.
func (t *trial) sample(ctx context.Context) (count, error) {
	m, err := t.metrics(ctx)
	if err != nil {
		return count{}, err
	}
	return m.count()
}

// count is what they count, with what this process and the machine have used.
func (m metrics) count() (count, error) {
	c := count{
		At: harness.Now().Seconds(), Requests: map[string]float64{},
		Events:    m["etcd_debugging_mvcc_events_total"],
		BytesSent: m["etcd_network_client_grpc_sent_bytes_total"],
		EtcdCPU:   m["process_cpu_seconds_total"],
	}
	for name, n := range m {
		_, rest, _ := strings.Cut(name, `grpc_method="`)
		method, _, _ := strings.Cut(rest, `"`)
		switch {
		case strings.HasPrefix(name, "grpc_server_started_total{"):
			c.Requests[method] += n
		case strings.HasPrefix(name, "grpc_server_msg_received_total{") && method == "Watch":
			c.Requests["Progress"] += n
		}
	}
	c.Requests["Progress"] -= c.Requests["Watch"] // which is one message for each watch
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return c, err
	}
	c.CPU = time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
	var err error
	c.Machine, err = machineCPU()
	return c, err
}

// machineCPU is for how long the machine's CPUs have worked, in seconds.
func machineCPU() (float64, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	var cpu string
	var user, nice, system, idle, iowait, irq, softirq, steal float64 // in hundredths
	_, err = fmt.Sscan(string(stat), &cpu,
		&user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal)
	return (user + nice + system + irq + softirq + steal) / 100, err
}

// resident is this process's resident memory in bytes.
func resident() (float64, error) {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	var size, pages float64
	_, err = fmt.Sscan(string(statm), &size, &pages)
	return pages * float64(os.Getpagesize()), err
}
