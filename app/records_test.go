//go:build linux

package app

import (
	"os"
	"testing"
)

func TestURL(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for listen, want := range map[string]string{
		"off": "", "127.0.0.1:4040": "", "localhost:4040": "", "[::1]:4040": "",
		":4040": "http://" + name + ":4040", "0.0.0.0:4040": "http://" + name + ":4040",
		"[::]:4040": "http://" + name + ":4040", "10.0.0.7:80": "http://10.0.0.7:80",
		"[2001:db8::1]:80": "http://[2001:db8::1]:80", "host:80": "http://host:80",
	} {
		if got := url(listen); got != want {
			t.Errorf("listening at %s: %q, want %q", listen, got, want)
		}
	}
}
