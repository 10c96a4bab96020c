package attest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// spdx is the type of the predicate that an SBOM is.
const spdx = "https://spdx.dev/Document"

// SBOM returns the statement of that name that is the given SPDX document.
func SBOM(name string, document []byte) Statement {
	return Statement{Predicate: spdx, File: name + ".spdx.json", Body: document}
}

// Scanned reads an in-toto statement that a scanner wrote to a file of that name. It must be an SBOM: what a scanner says
// about anything else is not asked for. What it says it is about counts only if it says so.
func Scanned(file string, data []byte) (Statement, error) {
	var said struct {
		Type      string          `json:"_type"`
		Predicate string          `json:"predicateType"`
		Subject   []Subject       `json:"subject"`
		Body      json.RawMessage `json:"predicate"`
	}
	if err := json.Unmarshal(data, &said); err != nil {
		return Statement{}, fmt.Errorf("read statement: %w", err)
	}
	switch {
	case said.Type != statement01 && said.Type != statement1:
		return Statement{}, fmt.Errorf("not an in-toto statement: its type is %q", said.Type)
	case said.Predicate != spdx:
		return Statement{}, fmt.Errorf("predicate type is %q, want %s", said.Predicate, spdx)
	case len(said.Body) == 0 || string(said.Body) == "null":
		return Statement{}, errors.New("statement without a predicate")
	}
	var body bytes.Buffer
	if err := json.Compact(&body, said.Body); err != nil {
		return Statement{}, err
	}
	return Statement{Predicate: spdx, File: file, Body: body.Bytes(), Subjects: said.Subject}, nil
}
