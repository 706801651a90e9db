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

// What Check returns beside nil, which is yes.
var (
	// ErrNo is a no, whose reason was written.
	ErrNo = errors.New("no")
	// ErrNoAnswer: nobody answers, or not as leasehold does.
	ErrNoAnswer = errors.New("nobody answers")
)

// Checks lists what Check can ask for.
func Checks() []string { return []string{"live", "ready", "leader", "standby"} }

// Check asks the daemon that listens at listen (its LISTEN setting) and writes its answer to out.
// Nil is a yes; otherwise the error is ErrNo or, within two seconds, wraps ErrNoAnswer. what is one
// of Checks, or "" for live: whoever probes without saying for what must not have a healthy daemon
// restarted because etcd is down.
func Check(ctx context.Context, listen, what string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	yes, answer, err := ask(ctx, listen, what)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoAnswer, err)
	}
	_, _ = io.WriteString(out, answer) // The result says it too.
	if !yes {
		return ErrNo
	}
	return nil
}

func ask(ctx context.Context, listen, what string) (yes bool, answer string, err error) {
	path := map[string]string{
		"": "/livez", "live": "/livez", "ready": "/readyz",
		"leader": "/leader", "standby": "/standby",
	}[what]
	if path == "" {
		return false, "", fmt.Errorf("%q can't be asked for: %s",
			what, strings.Join(Checks(), ", "))
	}
	if listen == "off" {
		return false, "", errors.New("LEASEHOLD_LISTEN is off")
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return false, "", err
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		// An address to listen at, not one to connect to. 0.0.0.0 is IPv4 alone; :: and "" mostly
		// take both.
		if host = "127.0.0.1"; ip != nil && ip.To4() == nil {
			host = "::1"
		}
	}
	url := "http://" + net.JoinHostPort(host, port) + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false, "", err
	}
	// A client of its own: the default one would send this through the environment's HTTP_PROXY and
	// follow redirects.
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
	}
	resp, err := client.Do(req)
	if err != nil {
		return false, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	switch {
	case err != nil:
		return false, "", err
	case resp.StatusCode == http.StatusOK:
		return true, string(body), nil
	case resp.StatusCode == http.StatusServiceUnavailable:
		return false, string(body), nil
	}
	return false, "", fmt.Errorf("something else than leasehold listens at %s: %s",
		listen, resp.Status)
}
