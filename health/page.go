package health

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed" // for the page
	"encoding/base64"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
)

//go:embed page.html
var pageHTML []byte

// page shows a browser what /events has. It is one file that asks for nothing else, and changes
// nothing.
type page struct{ policy string }

// newPage allows the page its own script and style, and requests to where it came from.
func newPage() page {
	return page{fmt.Sprintf("default-src 'none'; script-src %s; style-src %s; connect-src 'self';"+
		" base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		sourceHash("script"), sourceHash("style"))}
}

// sourceHash is the source that a policy names for the page's only element of that name.
func sourceHash(element string) string {
	_, after, _ := bytes.Cut(pageHTML, []byte("<"+element+">"))
	text, _, _ := bytes.Cut(after, []byte("</"+element+">"))
	sum := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func (p page) serve(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Security-Policy", p.policy)
	h.Set("Referrer-Policy", "no-referrer")
	write(w, http.StatusOK, "text/html; charset=utf-8", pageHTML)
}

// wantsPage reports whether the client is a browser that shows a page to a person. Others, such as
// curl, do not name text/html, or prefer JSON.
func wantsPage(r *http.Request) bool {
	var page, json float64
	for _, accepted := range strings.Split(strings.Join(r.Header.Values("Accept"), ","), ",") {
		kind, params, _ := mime.ParseMediaType(accepted)
		quality, err := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
		if err != nil {
			continue
		}
		switch kind {
		case "text/html":
			page = quality
		case "application/json":
			json = quality
		}
	}
	return page > json
}
