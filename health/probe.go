package health

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"leasehold/internal/quote"
)

// Probe returns what asks a URL, as kubelet's probes do. It returns nil for a status from 200 to
// 399, else why not. It follows no redirect, uses no proxy, and does not check the certificate: it
// asks whether something works, and sends no secret.
func Probe(address string, timeout time.Duration) func(ctx context.Context) error {
	client := http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			// Without these a connection outlives its request, and the next one adds another.
			DialContext:         (&net.Dialer{Timeout: timeout}).DialContext,
			TLSHandshakeTimeout: timeout, ResponseHeaderTimeout: timeout,
			DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
	}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			return err
		}
		req.Header.Set("User-Agent", "leasehold")
		resp, err := client.Do(req)
		if err != nil {
			if asked := (*url.Error)(nil); errors.As(err, &asked) {
				err = asked.Err // without the URL, which may have a secret in it
			}
			return errors.New(quote.Line(err.Error())) // it may quote the answer
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode >= 200 && resp.StatusCode < 400 {
			return nil
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return fmt.Errorf("%s: %s", quote.Printable(resp.Status),
			quote.Printable(strings.TrimSpace(string(body))))
	}
}
