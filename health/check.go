package health

import (
	"context"
	"errors"
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
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	code, answer, err := ask(ctx, listen, what)
	if err != nil {
		code, answer = exitNoAnswer, fmt.Sprintf("nobody answers: %v\n", err)
	}
	_, _ = io.WriteString(out, answer) // The exit code says it too.
	return code
}

func ask(ctx context.Context, listen, what string) (code int, answer string, err error) {
	path := map[string]string{"": "/livez", "live": "/livez", "ready": "/readyz", "leader": "/leader", "standby": "/standby"}[what]
	if path == "" {
		return 0, "", fmt.Errorf("%q can't be asked for: %s", what, strings.Join(Checks(), ", "))
	}
	if listen == "off" {
		return 0, "", errors.New("LEASEHOLD_LISTEN is off")
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return 0, "", err
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		// An address to listen at, not one to connect to. 0.0.0.0 is loopback's IPv4 side; :: and "" mostly take both.
		if host = "127.0.0.1"; ip != nil && ip.To4() == nil {
			host = "::1"
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, nil)
	if err != nil {
		return 0, "", err
	}
	// A client of its own: the default one would send this through the environment's HTTP_PROXY and follow redirects.
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	switch {
	case err != nil:
		return 0, "", err
	case resp.StatusCode == http.StatusOK:
		return exitYes, string(body), nil
	case resp.StatusCode == http.StatusServiceUnavailable:
		return exitNo, string(body), nil
	}
	return 0, "", fmt.Errorf("something else than leasehold listens at %s: %s", listen, resp.Status)
}
