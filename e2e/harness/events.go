//go:build linux

package harness

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Event is one server-sent event. Data has no newlines.
type Event struct{ ID, Data string }

// EventStream is a connection to a health endpoint's /events.
type EventStream struct {
	resp  *http.Response
	lines *bufio.Scanner
}

// Subscribe connects to the URL of an /events. lastID is the id of the last event that the client
// has seen, or "". The stream ends with ctx.
func Subscribe(ctx context.Context, url, lastID string) (*EventStream, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "text/event-stream")
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if kind := resp.Header.Get("Content-Type"); resp.StatusCode != http.StatusOK ||
		kind != "text/event-stream" {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%s: %s, %s", url, resp.Status, kind)
	}
	return &EventStream{resp, bufio.NewScanner(resp.Body)}, nil
}

// Next waits for the next status. The error is io.EOF if the stream has been closed.
func (s *EventStream) Next() (Event, error) { return s.NextOf("") }

// NextOf waits for the next event of a name. That of a status is "".
func (s *EventStream) NextOf(name string) (Event, error) {
	var e Event
	of := ""
	for s.lines.Scan() {
		field, value, _ := strings.Cut(s.lines.Text(), ": ")
		switch {
		case field == "id":
			e.ID = value
		case field == "event":
			of = value
		case field == "data":
			e.Data = value
		case field == "" && of == name && e.Data != "": // the empty line after an event
			return e, nil
		case field == "":
			e, of = Event{}, ""
		}
	}
	if err := s.lines.Err(); err != nil {
		return e, err
	}
	return e, io.EOF
}

// Close ends the stream.
func (s *EventStream) Close() { _ = s.resp.Body.Close() }
