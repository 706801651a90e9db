//go:build linux

// Package store is a storage in etcd that fencing tokens guard, and the record of what its clients
// asked and were answered: tools/histories judges that. docs/fencing.md explains the guard.
package store

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/internal/boottime"
)

// LogVariable names the environment variable in which the writer finds the record.
const LogVariable = "STORE_LOG"

// registers is how many there are. The check of each costs the square of its operations.
const registers = 4

// requestTimeout is after how long a client gives up. Then nobody knows whether it has written.
const requestTimeout = time.Second

// Kinds of operations. Those of the lock are not asked for: the soak knows of them.
const (
	Write   = "write"   // by a guard
	Read    = "read"    // by anybody
	Acquire = "acquire" // a term's job starts
	Release = "release" // nothing of it is left
	Take    = "take"    // a fault or an operator may end a term under its job
)

// Answers to a write.
const (
	Accepted = "accepted"
	Refused  = "refused"
)

// Operation is a line of the record. What a client asks is written down twice, before the request
// leaves and after its answer: the client may be killed in between. Times are boottime.Now.
type Operation struct {
	Client   string        `json:"client"`
	N        int           `json:"n"` // of the client's own count
	Kind     string        `json:"kind"`
	Register string        `json:"register,omitempty"`
	Token    int64         `json:"token,omitempty"`
	Value    string        `json:"value,omitempty"` // written or read; "": nothing was written yet
	Call     time.Duration `json:"call"`
	Return   time.Duration `json:"return,omitempty"` // 0: no answer
	Answer   string        `json:"answer,omitempty"`
	Why      string        `json:"why,omitempty"` // for people
}

// Log is a record that several processes write at once.
type Log struct{ file *os.File }

// OpenLog makes the record, or goes on with it. Any user may write to it.
func OpenLog(path string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o666)
	return &Log{f}, err
}

// Add writes a line. It begins with the line feed: what a killed process has not written to its end
// then spoils no other line.
func (l *Log) Add(o Operation) error {
	line, err := json.Marshal(o)
	if err == nil {
		_, err = l.file.Write(append([]byte{'\n'}, line...))
	}
	if err != nil {
		return fmt.Errorf("record an operation: %w", err)
	}
	return nil
}

// Close closes the record.
func (l *Log) Close() error { return l.file.Close() }

// Guard is what etcd checks: a write is accepted while the leader's key has this create revision.
type Guard struct {
	Key   string
	Token int64
}

// Client asks for one operation at a time.
type Client struct {
	Name string
	Etcd *clientv3.Client
	Log  *Log
	// Unguarded writes whatever the token is, to show that such a storage is found guilty.
	Unguarded bool
	n         int
}

// Write writes a value of its own to one of the registers. It returns an error only if the record
// can't be written.
func (c *Client) Write(ctx context.Context, g Guard) error {
	o := c.call(Write)
	o.Token, o.Value = g.Token, fmt.Sprintf("%s #%d", c.Name, o.N)
	return c.ask(ctx, o, func(ctx context.Context, o *Operation) error {
		txn := c.Etcd.Txn(ctx)
		if !c.Unguarded {
			txn = txn.If(clientv3.Compare(clientv3.CreateRevision(g.Key), "=", g.Token))
		}
		resp, err := txn.Then(clientv3.OpPut(o.Register, o.Value)).Commit()
		if err == nil && resp.Succeeded {
			o.Answer = Accepted
		} else {
			o.Answer = Refused
		}
		return err
	})
}

// Read reads one of the registers.
func (c *Client) Read(ctx context.Context) error {
	return c.ask(ctx, c.call(Read), func(ctx context.Context, o *Operation) error {
		resp, err := c.Etcd.Get(ctx, o.Register)
		if err == nil && len(resp.Kvs) > 0 {
			o.Value = string(resp.Kvs[0].Value)
		}
		return err
	})
}

func (c *Client) call(kind string) Operation {
	c.n++
	register := fmt.Sprintf("store/%d", rand.IntN(registers))
	return Operation{Client: c.Name, N: c.n, Kind: kind, Register: register}
}

// ask writes down o, and o again when it is answered.
func (c *Client) ask(
	ctx context.Context, o Operation, request func(context.Context, *Operation) error,
) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	o.Call = boottime.Now()
	if err := c.Log.Add(o); err != nil {
		return err
	}
	if err := request(ctx, &o); err != nil {
		return nil // it stays open
	}
	o.Return = boottime.Now()
	return c.Log.Add(o)
}
