//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"leasehold/e2e/harness"
)

// table is a file of tab-separated columns, which its first line names.
type table struct {
	path    string
	columns []string
	rows    []row
}

type row struct {
	table *table
	cells []string
}

func (c *checker) load() (err error) {
	c.configs, err = readTable(filepath.Join(c.dir, "configs.tsv"),
		"name", "model", "options", "states", "MB", "seconds", "ci")
	if err == nil {
		c.switches, err = readTable(filepath.Join(c.dir, "switches.tsv"),
			"switch", "model", "step", "turns off", "breaks", "options", "seconds")
	}
	return err
}

// readTable reads a table that must have these columns.
func readTable(path string, columns ...string) (*table, error) {
	all, err := lines(path)
	if err != nil {
		return nil, err
	}
	t := &table{path: path, columns: columns}
	for i, line := range all {
		cells := strings.Split(line, "\t")
		switch {
		case i == 0 && !slices.Equal(cells, columns):
			return nil, fmt.Errorf("%s: the columns are %q, want %q", path, cells, columns)
		case len(cells) != len(columns):
			return nil, fmt.Errorf("%s:%d: %d columns, want %d",
				path, i+1, len(cells), len(columns))
		case i > 0:
			t.rows = append(t.rows, row{t, cells})
		}
	}
	if len(t.rows) == 0 {
		return nil, fmt.Errorf("%s has no rows", path)
	}
	return t, nil
}

func (r row) name() string { return r.cells[0] }

func (r row) cell(column string) *string { return &r.cells[slices.Index(r.table.columns, column)] }

func (r row) get(column string) string { return *r.cell(column) }

func (r row) set(column, value string) { *r.cell(column) = value }

func (r row) number(column string) float64 {
	n, _ := strconv.ParseFloat(r.get(column), 64) // of a switch that is new there is none
	return n
}

func (t *table) write() error {
	all := []string{strings.Join(t.columns, "\t")}
	for _, r := range t.rows {
		all = append(all, strings.Join(r.cells, "\t"))
	}
	return os.WriteFile(t.path, []byte(text(all)), 0o644)
}

// text and lines are each other's reverse.
func text(lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}

func lines(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil || len(data) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n"), nil
}

// publish draws the pictures, and writes the tables of README.md.
func (c *checker) publish() error {
	pages, err := c.pages()
	if err != nil {
		return err
	}
	for path, text := range pages.files {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return harness.Refresh(filepath.Join(c.dir, "README.md"), pages.sections)
}

// pages is what follows from what is kept.
type pages struct {
	files    map[string]string // by path
	sections map[string]string // of README.md
}

func (c *checker) pages() (pages, error) {
	p := pages{files: map[string]string{}}
	var configs, switches strings.Builder
	configs.WriteString("| | options | states | MB | seconds | CI |\n|---|---|---|---|---|---|\n")
	for _, r := range c.configs.rows {
		options := r.get("options")
		if options != "" {
			options = "`" + options + "`"
		}
		fmt.Fprintf(&configs, "| %s (`%s`) | %s | %s | %s | %s | %s |\n", r.name(), r.get("model"),
			options, r.get("states"), r.get("MB"), r.get("seconds"), r.get("ci"))
	}
	switches.WriteString("| switch | model | step | what is turned off | what breaks | " +
		"time line | seconds |\n|---|---|---|---|---|---|---|\n")
	for _, r := range c.switches.rows {
		events, err := c.readTrace(r)
		if err != nil {
			return p, err
		}
		picture, err := draw(r, events)
		if err != nil {
			return p, err
		}
		p.files[c.kept(r, ".svg")] = picture
		ticks := fmt.Sprintf("%d ticks", events[len(events)-1].tick)
		if ticks == "1 ticks" {
			ticks = "1 tick"
		}
		length := fmt.Sprintf("[%d steps, %s](traces/%s.svg)", len(events), ticks, c.key(r))
		fmt.Fprintf(&switches, "| `%s` | `%s` | %s | %s | %s | %s | %s |\n", r.name(),
			r.get("model"), r.get("step"), r.get("turns off"), r.get("breaks"), length,
			r.get("seconds"))
	}
	p.sections = map[string]string{"configs": configs.String(), "switches": switches.String()}
	return p, nil
}
