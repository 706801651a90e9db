//go:build linux

package config

import (
	"cmp"
	"reflect"
	"regexp"
	"strings"

	"github.com/kelseyhightower/envconfig"
)

// A Variable is one field of Config.
type Variable struct {
	Name    string // without the prefix
	Default string // the default, as it would be written; "" for none
	Shown   string // the default, as help shows it
	Desc    string
	Field   reflect.Value
}

// Variables lists the fields of c with the names that envconfig knows them by.
func (c *Config) Variables() []Variable {
	return appendVariables(nil, "", reflect.ValueOf(c).Elem())
}

// words has the rule of envconfig's split_words: CAFile is CA_FILE, DialTimeout is DIAL_TIMEOUT.
var words = regexp.MustCompile(`([a-z])([A-Z])|([A-Z])([A-Z][a-z])`)

func appendVariables(list []Variable, prefix string, group reflect.Value) []Variable {
	for i := range group.NumField() {
		field, tags := group.Type().Field(i), group.Type().Field(i).Tag
		name := prefix + strings.ToUpper(words.ReplaceAllString(field.Name, "$1${3}_$2$4"))
		if tags.Get("desc") == "" {
			list = appendVariables(list, name+"_", group.Field(i))
			continue
		}
		list = append(list, Variable{
			Name:    name,
			Default: tags.Get("default"),
			Shown:   cmp.Or(tags.Get("default"), tags.Get("shown")),
			Desc:    tags.Get("desc"),
			Field:   group.Field(i),
		})
	}
	return list
}

// reset gives the variable its default. envconfig gives it only to variables that are not set at
// all, and manifests and unit files set variables to nothing to unset them.
func (v Variable) reset() {
	v.Field.SetZero()
	if v.Default == "" {
		return
	}
	switch into := v.Field.Addr().Interface().(type) {
	case envconfig.Decoder:
		_ = into.Decode(v.Default) // It keeps its own error.
	case *[]string:
		*into = []string{v.Default}
	default:
		v.Field.SetString(v.Default)
	}
}
