package health

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// Exit codes of Check.
const (
	exitYes      = 0
	exitNo       = 1
	exitNoAnswer = 69
)

// Checks lists what Check can ask for.
func Checks() []string { return []string{"live", "ready", "leader", "standby"} }

// Check asks the daemon that listens at listen (its LISTEN setting), writes its answer to out, and returns an exit code: 0 for
// yes, 1 for no, 69 if nobody answers within two seconds. what is one of Checks, or "" for live: whoever probes without saying
// for what must not have a healthy daemon restarted because etcd is down.
func Check(ctx context.Context, listen, what string, out io.Writer) int {
	path := map[string]string{"": "/livez", "live": "/livez", "ready": "/readyz", "leader": "/leader", "standby": "/standby"}[what]
	if path == "" {
		fmt.Fprintf(out, "check can't ask for %q: %s\n", what, strings.Join(Checks(), ", "))
		return exitNoAnswer
	}
	if listen == "off" {
		fmt.Fprintln(out, "nobody answers: LEASEHOLD_LISTEN is off")
		return exitNoAnswer
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		fmt.Fprintf(out, "nobody can be asked: %v\n", err)
		return exitNoAnswer
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		// An address to listen at, not one to connect to. 0.0.0.0 is loopback's IPv4 side; :: and "" mostly take both.
		if host = "127.0.0.1"; ip != nil && ip.To4() == nil {
			host = "::1"
		}
	}

	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, nil)
	if err != nil {
		fmt.Fprintf(out, "nobody can be asked: %v\n", err)
		return exitNoAnswer
	}
	// A client of its own: the default one would send this through the environment's HTTP_PROXY and follow redirects.
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		fmt.Fprintf(out, "nobody answers: %v\n", err)
		return exitNoAnswer
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK, http.StatusServiceUnavailable:
		_, _ = io.Copy(out, io.LimitReader(resp.Body, 4<<10))
	default:
		fmt.Fprintf(out, "something else than leasehold answers at %s: %s\n", listen, resp.Status)
		return exitNoAnswer
	}
	if resp.StatusCode != http.StatusOK {
		return exitNo
	}
	return exitYes
}
