package attest

import (
	"strings"
	"testing"
)

func TestScanned(t *testing.T) {
	const good = `{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://spdx.dev/Document", "predicate":{"SPDXID": "q"}}`
	s, err := Scanned("sbom.spdx.json", []byte(good))
	if err != nil || s.File != "sbom.spdx.json" || string(s.Body) != `{"SPDXID":"q"}` || s.Subjects != nil {
		t.Errorf("Scanned = %+v, %v", s, err)
	}
	own := strings.Replace(good, `"predicate":`, `"subject":[{"name":"x","digest":{"sha256":"00"}}],"predicate":`, 1)
	s, err = Scanned("x.json", []byte(own))
	if err != nil || len(s.Subjects) != 1 {
		t.Errorf("Scanned = %+v, %v", s, err)
	}
	data, err := s.Marshal([]Subject{{Name: "y"}})
	if err != nil || !strings.Contains(string(data), `"subject":[{"name":"x",`) {
		t.Errorf("Marshal = %s, %v", data, err)
	}
	for _, bad := range []string{
		"", "{", good + "x", "[]", "null", "{}",
		strings.Replace(good, "Statement/v0.1", "Letter", 1),
		strings.Replace(good, "https://spdx.dev/Document", provenance1, 1),
		strings.Replace(good, `{"SPDXID": "q"}`, "null", 1),
	} {
		if s, err := Scanned("x.json", []byte(bad)); err == nil {
			t.Errorf("Scanned(%q) = %+v", bad, s)
		}
	}
}

// FuzzScanned: whatever a scanner writes, it is an error or a statement that can be written.
func FuzzScanned(f *testing.F) {
	f.Add([]byte(`{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://spdx.dev/Document","predicate":{},"subject":[]}`))
	f.Add([]byte(`{"predicate":"\ud800"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Scanned("x.json", data)
		if err != nil {
			return
		}
		out, err := s.Marshal(nil)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Scanned("x.json", out); err != nil || string(again.Body) != string(s.Body) {
			t.Fatalf("%s: %v, %s", out, err, again.Body)
		}
	})
}
