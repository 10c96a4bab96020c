package layer

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// named makes a store with an image, which need not be there, under each of these names.
func named(t *testing.T, names ...string) *Store {
	t.Helper()
	s := newStore(t)
	for _, n := range names {
		err := s.ChangeNames(t.Context(), func(idx *ocispec.Index) error {
			idx.Manifests = append(idx.Manifests, ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(n), Size: 7, Annotations: map[string]string{"name": n},
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// namesOf lists the images of a store, by name, if each is what it should be.
func namesOf(t *testing.T, s *Store) (names string) {
	t.Helper()
	idx, err := s.Names(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range idx.Manifests {
		n := d.Annotations["name"]
		if d.Digest == digest.FromString(n) && d.Size == 7 && d.MediaType == ocispec.MediaTypeImageManifest {
			names += n
		}
	}
	return names
}

// TestNamesDamaged flips bits of index.json and of its copy, and cuts them short: no name is lost, and all is as
// before once it was read.
func TestNamesDamaged(t *testing.T) {
	s := named(t, "a", "b")
	for _, name := range []string{indexJSON, indexCopy} {
		path := s.inDir(name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		try := func(what string, n int, bad []byte) {
			t.Helper()
			if err := errors.Join(os.Remove(path), os.WriteFile(path, bad, 0o644)); err != nil {
				t.Fatal(err)
			}
			s, told := repairing(t, s.Dir())
			if got := namesOf(t, s); got != "ab" {
				t.Fatalf("%s %s %d: names %q", name, what, n, got)
			}
			if now, err := os.ReadFile(path); err != nil || string(now) != string(good) || len(*told) != 1 || (*told)[0] != name {
				t.Fatalf("%s %s %d: told %q, %v, now it is %q", name, what, n, *told, err, now)
			}
			s.Close()
		}
		for i := 0; i < len(good); i += 5 {
			try("flipped at", i, flip(good, i))
		}
		for _, n := range []int{0, 1, len(good) / 2} {
			try("cut to", n, good[:n])
			try("zeros", n, append(append([]byte{}, good[:n]...), make([]byte, len(good)-n)...))
		}
	}
}

func TestNamesGone(t *testing.T) {
	for _, name := range []string{indexJSON, indexCopy} {
		s := named(t, "a")
		if err := os.Remove(s.inDir(name)); err != nil {
			t.Fatal(err)
		}
		if got := namesOf(t, reopen(t, s.Dir())); got != "a" {
			t.Errorf("without %s: %q", name, got)
		}
	}
}

// A power cut leaves an empty index.json of a store that nobody has used yet; what is worse is kept.
func TestNamesLost(t *testing.T) {
	for text, kept := range map[string]bool{"": false, "\x00\x00": false, `{"manifests":[{"dig`: true} {
		s := newStore(t)
		if err := os.WriteFile(s.inDir(indexJSON), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		s, told := repairing(t, s.Dir())
		if got := namesOf(t, s); got != "" || len(*told) != 1 {
			t.Errorf("%q: names %q, told %q", text, got, *told)
		}
		if data, err := os.ReadFile(filepath.Join(s.Dir(), "index.json.damaged")); (err == nil) != kept || kept && string(data) != text {
			t.Errorf("%q: kept %q, %v", text, data, err)
		}
	}
}

// What another tool wrote counts.
func TestNamesOfOthers(t *testing.T) {
	s := named(t, "a", "b")
	err := os.WriteFile(s.inDir(indexJSON), []byte(`{"schemaVersion":2,"manifests":[{"mediaType":"`+ocispec.MediaTypeImageManifest+`","size":7,"digest":"`+
		digest.FromString("b").String()+`","annotations":{"name":"b"}}]}`), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	s, told := repairing(t, s.Dir())
	if got := namesOf(t, s); got != "b" || len(*told) > 0 {
		t.Errorf("names %q, told %q", got, *told)
	}
}

// What does not change is not written.
func TestNamesSame(t *testing.T) {
	s := named(t, "a")
	was, _ := os.Stat(s.inDir(indexJSON))
	if err := s.ChangeNames(t.Context(), func(*ocispec.Index) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if now, _ := os.Stat(s.inDir(indexJSON)); !os.SameFile(was, now) {
		t.Error("index.json was written again")
	}
}
