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

	"leasehold/internal/quote"
)

// Check returns nil for yes, or one of these errors.
var (
	// ErrNo means no. The reason was written to out.
	ErrNo = errors.New("no")
	// ErrNoAnswer means that nobody answers, or something other than leasehold.
	ErrNoAnswer = errors.New("nobody answers")
)

// Checks lists what Check can ask for.
func Checks() []string { return []string{"live", "ready", "leader", "standby"} }

// Check asks the daemon that listens at listen (its LISTEN setting) and writes its answer to out.
// It returns nil for yes. Otherwise the error is ErrNo or, within two seconds, wraps ErrNoAnswer.
// what is one of Checks, or "" for live. That is the default, so that a probe without an argument
// does not restart a healthy daemon because etcd is down.
func Check(ctx context.Context, listen, what string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	yes, answer, err := ask(ctx, listen, what)
	if err != nil {
		return fmt.Errorf("%w: %s", ErrNoAnswer, quote.Line(err.Error()))
	}
	for line := range strings.Lines(answer) { // Whatever listens there may have sent it.
		_, _ = fmt.Fprintln(out, quote.Printable(strings.TrimSuffix(line, "\n")))
	}
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
		// One can listen on this address, but not connect to it. 0.0.0.0 is IPv4 alone. :: and ""
		// usually accept both.
		if host = "127.0.0.1"; ip != nil && ip.To4() == nil {
			host = "::1"
		}
	}
	url := "http://" + net.JoinHostPort(host, port) + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false, "", err
	}
	// The default client would use HTTP_PROXY of the environment and follow redirects.
	client := http.Client{
		// Errors quote the headers, so these must not be long.
		Transport: &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 4 << 10},
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
		listen, quote.Printable(resp.Status))
}
