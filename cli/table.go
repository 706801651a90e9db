//go:build linux

package cli

import (
	"strings"
	"unicode"

	"leasehold/internal/quote"
)

const (
	// tableWidth is how many columns of a terminal a table takes at most.
	tableWidth = 80
	// columnGap is between two columns, and leastColumn the least width that one is cut to.
	columnGap, leastColumn = 2, 8
	// ellipsis is at the end of a cell that was cut.
	ellipsis = '…'
)

// table lays out rows, the first of which is the head. Every cell becomes printable. If the rows
// would be too wide, cells are cut: those of the widest of the columns named, and then of all.
func table(rows [][]string, cut ...int) string {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			row[i] = quote.Printable(cell)
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], columns(row[i]))
		}
	}
	excess := columnGap*(len(widths)-1) - tableWidth
	for _, w := range widths {
		excess += w
	}
	for i := range widths {
		cut = append(cut, i) // once those that are named are as narrow as they may be
	}
	named := cut[:len(cut)-len(widths)]
	for ; excess > 0; excess-- {
		if i, ok := widest(widths, named); ok {
			widths[i]--
		} else if i, ok := widest(widths, cut); ok {
			widths[i]--
		}
	}
	var b strings.Builder
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			cell = fit(cell, widths[i])
			line.WriteString(cell + strings.Repeat(" ", widths[i]-columns(cell)+columnGap))
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// widest returns the widest of the columns that may be narrower.
func widest(widths, among []int) (column int, ok bool) {
	most := leastColumn
	for _, i := range among {
		if widths[i] > most {
			column, most, ok = i, widths[i], true
		}
	}
	return column, ok
}

// columns is how many columns a terminal needs for the text. Of the characters that are twice as
// wide, or that have no width, it takes too many rather than too few.
func columns(text string) (n int) {
	for _, r := range text {
		n++
		if r >= 0x1100 && r != ellipsis && r != unicode.ReplacementChar {
			n++
		}
	}
	return n
}

// fit cuts the text to so many columns.
func fit(text string, width int) string {
	if columns(text) <= width {
		return text
	}
	n := 1 // for the ellipsis
	for i, r := range text {
		if n += columns(string(r)); n > width {
			return text[:i] + string(ellipsis)
		}
	}
	return text
}
