//go:build linux

package main

import (
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"leasehold/e2e/harness"
)

//go:embed pages
var pageFiles embed.FS

// page fills in one of the pages.
func page(name string, with any) (string, error) {
	t := template.New(name + ".tmpl").Funcs(template.FuncMap{
		"join": strings.Join, "median": median, "both": both,
		"json": func(v any) (string, error) {
			text, err := json.Marshal(v)
			return string(text), err
		},
	})
	t, err := t.ParseFS(pageFiles, "pages/"+t.Name())
	if err != nil {
		return "", err
	}
	var b strings.Builder
	err = t.Execute(&b, with)
	return b.String(), err
}

// both is median and maximum.
func both(values []float64) string {
	if len(values) < 2 {
		return median(values)
	}
	return median(values) + ", max " + most(values)
}

// publish writes the table, two pictures and the README's part. The second picture is one of the
// faults in the short table, which a page has room for.
func (r *Results) publish(root string) error {
	if r.Hooks {
		return errors.New("-docs: these trials were made with -hooks, and the pages are of " +
			"candidates without: run the table without it")
	}
	table, errTable := page("faults.md", r)
	readme, errReadme := page("README.md", r)
	all, errAll := r.picture(func(RowInfo) bool { return true })
	short, errShort := r.picture(func(row RowInfo) bool { return row.Short })
	if err := errors.Join(errTable, errReadme, errAll, errShort); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"faults.md": table, "faults.svg": all, "faults-short.svg": short,
	} {
		if err := os.WriteFile(filepath.Join(root, "docs", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return harness.Refresh(filepath.Join(root, "README.md"), map[string]string{"faults": readme})
}

// Implementations are the columns of the short table.
func (r *Results) Implementations() []harness.Implementation { return harness.Implementations }

// Cell is that of a candidate; an empty one, if there is none.
func (r Row) Cell(candidate string) Cell {
	for _, c := range r.Cells {
		if c.Candidate == candidate {
			return c
		}
	}
	return Cell{}
}

// Short is when the next job came, and for how long the old one still ran then.
func (c Cell) Short() string {
	switch {
	case len(c.samples) == 0:
		return "-"
	case len(c.Next) == 0 && len(c.Dead) == 0:
		return "not moved"
	case len(c.Next) == 0:
		return "no next job"
	}
	text := median(c.Next)
	if n := len(c.samples) - len(c.Next); n > 0 {
		text = fmt.Sprintf("not moved in %d of %d; else %s", n, len(c.samples), text)
	}
	switch {
	case c.livesOn > 0:
		text += ", **the old job runs on**"
	case len(c.Overlaps) > 0:
		text += ", **both ran for up to " + most(c.Overlaps) + "**"
		if len(c.Overlaps) < len(c.Next) {
			text += fmt.Sprintf(" in %d of %d", len(c.Overlaps), len(c.Next))
		}
	}
	return text
}
