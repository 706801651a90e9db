//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"leasehold/internal/boottime"
)

// ask makes a connection every 10 ms, does not wait for the one before, and prints each answer.
func ask(url string) {
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second,
	}
	for ticker := time.NewTicker(10 * time.Millisecond); ; <-ticker.C {
		go func() {
			if answer, err := answerOf(&client, url); err == nil {
				fmt.Println(int64(boottime.Now()), answer)
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
	return fmt.Sprintf("%s %d %s", daemon.Identity, daemon.Leader.Token, daemon.State), err
}
