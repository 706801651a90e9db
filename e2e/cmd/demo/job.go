//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"leasehold/e2e/harness"
)

// job counts aloud, and holds a connection to the witness while it lives. It knows nothing of
// leasehold but the variables that it is given.
func job() error {
	started, identity := harness.Now(), os.Getenv("LEASEHOLD_IDENTITY")
	token, err := strconv.ParseInt(os.Getenv("LEASEHOLD_FENCING_TOKEN"), 10, 64)
	if err != nil {
		return fmt.Errorf("LEASEHOLD_FENCING_TOKEN: %w", err)
	}
	witness, err := net.Dial("unix", os.Getenv(harness.WitnessVariable))
	if err != nil {
		return err
	}
	err = json.NewEncoder(witness).Encode(harness.Hello{
		Candidate: identity, Token: token, Pid: os.Getpid(), Role: "job", Started: started,
	})
	if err != nil {
		return err
	}
	go func() { // the witness says nothing: this returns when it is gone
		_, _ = witness.Read(make([]byte, 1))
		os.Exit(1)
	}()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for count := 1; ; count++ {
		fmt.Printf("%s: %d\n", jobName(identity, token), count)
		<-tick.C
	}
}

// jobName begins each line of a job.
func jobName(identity string, token int64) string {
	return fmt.Sprintf("job of %s, token %d", identity, token)
}
