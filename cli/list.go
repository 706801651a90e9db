//go:build linux

package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"leasehold/config"
	"leasehold/control"
	"leasehold/health"
	"leasehold/internal/quote"
)

// The structs that follow are what commands print with --json: a contract, as statusReport is.
// docs/schema.json is made of them.

type listReport struct {
	Elections []listElection `json:"elections" desc:"those with a candidate or a hold, by name"`
	Version   string         `json:"version" desc:"of the leasehold that asks"`
}

type listElection struct {
	Election   string  `json:"election" desc:"the election's key prefix"`
	Leader     *string `json:"leader" desc:"the leader's identity"`
	Token      *int64  `json:"token" desc:"its fencing token"`
	Since      *string `json:"since" desc:"when its term began, as the history has it"`
	Candidates int     `json:"candidates" desc:"how many there are, the leader too"`
	Held       bool    `json:"held" desc:"a hold keeps everybody from becoming leader"`
}

type historyReport struct {
	Election string        `json:"election" desc:"the election's key prefix"`
	Terms    []historyTerm `json:"terms" desc:"the latest first"`
	Version  string        `json:"version" desc:"of the leasehold that asks"`
}

type historyTerm struct {
	Token    int64        `json:"token" desc:"the fencing token"`
	Identity string       `json:"identity" desc:"the leader's"`
	Started  *string      `json:"started" desc:"when the term began"`
	Ended    *string      `json:"ended" desc:"when the job had exited; null: the term goes on"`
	Why      *string      `json:"why" desc:"why it ended; lost: the leader could not say"`
	Starts   *int         `json:"starts" desc:"of the job; null while the term goes on"`
	LastExit *historyExit `json:"last_exit" desc:"of the job"`
}

type historyExit struct {
	Code   *int    `json:"code" desc:"exit code; null where a signal ended it"`
	Signal *string `json:"signal" desc:"that signal, for example SIGKILL"`
	At     *string `json:"at" desc:"when"`
}

// ListFields lists the fields of list --json, for the reference.
func ListFields() []health.Field { return health.FieldsOf[listReport]() }

// HistoryFields lists those of history --json.
func HistoryFields() []health.Field { return health.FieldsOf[historyReport]() }

// orNull is null for the zero value.
func orNull[T comparable](v T) *T {
	var none T
	if v == none {
		return nil
	}
	return &v
}

// timestamp is a time as JSON has it; null for the zero value.
func timestamp(at time.Time) *string {
	if at.IsZero() {
		return nil
	}
	text := at.UTC().Format(time.RFC3339Nano)
	return &text
}

// seconds is a time as a table shows it.
func seconds(at time.Time) string {
	if at.IsZero() {
		return "-"
	}
	return at.UTC().Format("2006-01-02 15:04:05")
}

// printed prints what a command has found, as JSON or as text.
func (p *Program) printed(c Call, report any, text string) error {
	var err error
	if c.Has("--json") {
		text, err = quote.JSON(report, "")
	}
	if err == nil {
		_, err = io.WriteString(p.Stdout, text)
	}
	if err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// list prints the elections that there are.
func (p *Program) list(c Call) error {
	return p.askFor(c, config.ForList, func(a asked) error {
		all, err := control.List(a.ctx, a.client)
		if err != nil {
			return a.failedKeys(err)
		}
		report := listReport{Elections: []listElection{}, Version: p.Version}
		rows := [][]string{{"ELECTION", "LEADER", "TOKEN", "SINCE (UTC)", "CANDIDATES", "HELD"}}
		for _, s := range all {
			e := listElection{
				Election: s.Election, Token: orNull(s.Token), Since: timestamp(s.Since),
				Candidates: s.Candidates, Held: s.Hold != nil,
			}
			leader, token, held := "-", "-", ""
			if s.Token != 0 {
				e.Leader = &s.Leader
				leader, token = quote.Word(s.Leader), strconv.FormatInt(s.Token, 10)
			}
			if s.Hold != nil {
				held = "held"
			}
			report.Elections = append(report.Elections, e)
			rows = append(rows, []string{
				quote.Word(s.Election), leader, token, seconds(s.Since),
				strconv.Itoa(s.Candidates), held,
			})
		}
		return p.printed(c, report, table(rows, 0, 1))
	})
}

// history prints who has led.
func (p *Program) history(c Call) error {
	n, err := strconv.Atoi(cmp.Or(c.Options["-n"], "20"))
	if err != nil || n < 1 {
		return &UsageError{Hint: "-n takes a number from 1 on: " + c.Command.Usage()}
	}
	return p.ask(c, func(a asked) error {
		terms, err := control.Terms(a.ctx, a.client, a.name, n)
		if err != nil {
			return a.failedKeys(err)
		}
		report := historyReport{Election: a.name, Terms: []historyTerm{}, Version: p.Version}
		rows := [][]string{{"TOKEN", "LEADER", "FROM (UTC)", "LASTED", "WHY IT ENDED", "STARTS"}}
		for _, t := range terms {
			report.Terms = append(report.Terms, newHistoryTerm(t))
			rows = append(rows, historyRow(t))
		}
		return p.printed(c, report, table(rows, 1, 4))
	})
}

func newHistoryTerm(t control.Term) historyTerm {
	h := historyTerm{
		Token: t.Token, Identity: t.Identity, Started: timestamp(t.Started),
		Ended: timestamp(t.Ended), Why: orNull(t.Why),
	}
	if !t.Ended.IsZero() && t.Why != control.Lost {
		h.Starts = &t.Starts
	}
	if e := t.LastExit; e != nil {
		h.LastExit = &historyExit{Signal: orNull(e.Signal), At: timestamp(e.At)}
		if e.Signal == "" {
			h.LastExit.Code = &e.Code
		}
	}
	return h
}

func historyRow(t control.Term) []string {
	lasted, why, starts := "-", "-", "-"
	if !t.Ended.IsZero() {
		if d := t.Ended.Sub(t.Started); d >= 0 && !t.Started.IsZero() {
			lasted = d.Round(time.Second).String()
		}
		why = t.Why
		if t.Why != control.Lost {
			starts = strconv.Itoa(t.Starts)
		}
	}
	switch e := t.LastExit; {
	case e == nil:
	case e.Signal != "":
		why += " (" + e.Signal + ")"
	default:
		why += " (" + strconv.Itoa(e.Code) + ")"
	}
	return []string{
		strconv.FormatInt(t.Token, 10), quote.Word(t.Identity), seconds(t.Started), lasted,
		why, starts,
	}
}

// failedKeys is the error of a command, which may be a *control.KeysError.
func (a asked) failedKeys(err error) error {
	var keys *control.KeysError
	if errors.As(err, &keys) {
		err = a.client.Explain(keys.Err, keys.Permission, "the prefix "+quote.Value(keys.Prefix))
	}
	return &EtcdError{a.call.Command.Name, err}
}
