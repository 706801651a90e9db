//go:build linux

package cli

import (
	"encoding/json"
	"reflect"

	"leasehold/health"
)

// Schema is the JSON Schema of what commands print with --json, and of the event terms:
// docs/schema.json. Every field is always present. Fields may be added.
func Schema() ([]byte, error) {
	defs := map[string]any{}
	for name, of := range map[string]reflect.Type{
		"status": reflect.TypeFor[statusReport](), "list": reflect.TypeFor[listReport](),
		"history": reflect.TypeFor[historyReport](), "watch": reflect.TypeFor[watchEvent](),
		"terms": reflect.TypeFor[[]health.SeenTerm](),
	} {
		defs[name] = schemaOf(of)
	}
	text, err := json.MarshalIndent(map[string]any{
		"$schema": "https://json-schema.org/draft/2020-12/schema",
		"title":   "what leasehold's commands print with --json, by command, and the event terms",
		"$defs":   defs,
	}, "", "  ")
	return append(text, '\n'), err
}

// schemaOf makes the schema of a type. Pointers may be null.
func schemaOf(t reflect.Type) map[string]any {
	switch t.Kind() {
	case reflect.Pointer:
		s := schemaOf(t.Elem())
		s["type"] = []any{s["type"], "null"}
		return s
	case reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem())}
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Struct:
		properties, required := map[string]any{}, []string{}
		for f := range t.Fields() {
			name, s := f.Tag.Get("json"), schemaOf(f.Type)
			s["description"] = f.Tag.Get("desc")
			properties[name], required = s, append(required, name)
		}
		return map[string]any{"type": "object", "properties": properties, "required": required}
	case reflect.Float64:
		return map[string]any{"type": "number"}
	default:
		return map[string]any{"type": "integer"}
	}
}
