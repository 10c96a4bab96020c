package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/tonistiigi/go-csvvalue"

	"filo/builder"
)

// secretLimit is the size of a secret that BuildKit accepts.
const secretLimit = 500 << 10

// secrets reads --secret. A file that a secret names must be there; an environment variable may be missing, which is
// a missing secret for whoever asks.
func secrets(specs []string, env lookup) (map[string]builder.Secret, error) {
	out := map[string]builder.Secret{}
	for _, spec := range specs {
		id, s, err := parseSecret(spec, env)
		if err != nil {
			return nil, fmt.Errorf("--secret %q: %w", spec, err)
		}
		if s != nil {
			out[id] = s
		}
	}
	return out, nil
}

// parseSecret reads one --secret: id=NAME with src=PATH, env=VARIABLE, or neither: then the environment variable of
// that name, else the file.
func parseSecret(spec string, env lookup) (id string, s builder.Secret, err error) {
	fields, err := csvvalue.Fields(spec, nil)
	if err != nil {
		return "", nil, err
	}
	var kind, path, variable string
	for _, f := range fields {
		key, value, ok := strings.Cut(f, "=")
		switch key = strings.ToLower(key); {
		case !ok:
			return "", nil, fmt.Errorf("%q is not KEY=VALUE", f)
		case key == "id":
			id = value
		case key == "type" && (value == "file" || value == "env"):
			kind = value
		case key == "type":
			return "", nil, fmt.Errorf("type %q: must be file or env", value)
		case key == "src", key == "source":
			path = value
		case key == "env":
			variable = value
		default:
			return "", nil, fmt.Errorf("unknown key %q: must be id, src, env or type", key)
		}
	}
	if id == "" {
		return "", nil, fmt.Errorf("no id")
	}
	if kind == "env" && variable == "" {
		variable, path = path, ""
	}
	if path == "" && variable == "" {
		if _, ok := env(id); kind == "env" || kind == "" && ok {
			variable = id
		} else {
			path = id
		}
	}
	if variable != "" {
		s, err := envSecret(variable, env)
		return id, s, err
	}
	s, err = fileSecret(path)
	return id, s, err
}

func envSecret(name string, env lookup) (builder.Secret, error) {
	v, ok := env(name)
	if !ok {
		return nil, nil
	}
	if len(v) > secretLimit {
		return nil, fmt.Errorf("environment variable %s: over %d bytes", name, secretLimit)
	}
	return func() ([]byte, error) { return []byte(v), nil }, nil
}

func fileSecret(path string) (builder.Secret, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("is a directory")}
	}
	if fi.Size() > secretLimit {
		return nil, fmt.Errorf("%s: over %d bytes", path, secretLimit)
	}
	return func() ([]byte, error) { return readSecret(path) }, nil
}

// readSecret reads a secret whose size is known only now: a pipe has none.
func readSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, secretLimit+1))
	if err == nil && len(b) > secretLimit {
		err = fmt.Errorf("%s: over %d bytes", path, secretLimit)
	}
	return b, err
}
