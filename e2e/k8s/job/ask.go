//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"

	"leasehold/internal/boottime"
)

// ask makes a connection every 10 ms, and does not wait for the one before.
func ask(url string) {
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second,
	}
	var mu sync.Mutex
	last := ""
	for ticker := time.NewTicker(10 * time.Millisecond); ; <-ticker.C {
		go func() {
			answer, err := answerOf(&client, url)
			if err != nil {
				return
			}
			now := boottime.Now()
			mu.Lock()
			defer mu.Unlock()
			if answer != last {
				fmt.Print(int64(now), " ", answer)
				last = answer
			}
		}()
	}
}

func answerOf(client *http.Client, url string) (string, error) {
	request, err := http.NewRequest(http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	request.Host = "localhost"
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	var daemon struct {
		Identity, State string
		Leader          struct{ Token int64 }
	}
	err = json.NewDecoder(response.Body).Decode(&daemon)
	return fmt.Sprintln(daemon.Identity, daemon.Leader.Token, daemon.State), err
}
