package cache

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), t.TempDir(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestKeyNext(t *testing.T) {
	type op struct {
		A string
		B string `json:",omitempty"`
	}
	key := func(before Key, o any, inputs ...digest.Digest) Key {
		t.Helper()
		k, err := before.Next(o, inputs...)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	base := key("", op{A: "x"}, "sha256:1", "sha256:2")
	if again := key("", op{A: "x"}, "sha256:1", "sha256:2"); again != base {
		t.Errorf("equal inputs give %s and %s", base, again)
	}
	for name, other := range map[string]Key{
		"op":            key("", op{A: "y"}, "sha256:1", "sha256:2"),
		"field":         key("", op{A: "x", B: "z"}, "sha256:1", "sha256:2"),
		"order":         key("", op{A: "x"}, "sha256:2", "sha256:1"),
		"fewer inputs":  key("", op{A: "x"}, "sha256:1"),
		"joined inputs": key("", op{A: "x"}, "sha256:1sha256:2"),
		"chain":         key(base, op{A: "x"}, "sha256:1", "sha256:2"),
	} {
		if other == base {
			t.Errorf("another %s gives the same key", name)
		}
	}
}

func TestGetPut(t *testing.T) {
	s := open(t)
	k, err := Key("").Next("op")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(k); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Get of nothing: %v, want fs.ErrNotExist", err)
	}
	want := Record{Layer: digest.FromString("layer"), Created: 7}
	if err := s.Put(k, want); err != nil {
		t.Fatal(err)
	}
	got, err := s.Get(k)
	if err != nil || got.Layer != want.Layer || got.Created != want.Created {
		t.Fatalf("Get: %+v, %v, want %+v", got, err, want)
	}
	if err := s.Remove(k); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(k); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Get after Remove: %v, want fs.ErrNotExist", err)
	}
}

// Every damage of a record is a miss that says so, never a hit with another layer.
func TestDamagedRecord(t *testing.T) {
	s := open(t)
	k, err := Key("").Next("op")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(k, Record{Layer: digest.FromString("layer"), Created: 7}); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(s.path(k))
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		damaged := append([]byte(nil), whole...)
		damaged[i] ^= 1
		if err := os.WriteFile(s.path(k), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := s.Get(k); err == nil && r.Layer != digest.FromString("layer") {
			t.Errorf("byte %d flipped: Get gives %+v", i, r)
		}
		if err := os.WriteFile(s.path(k), whole[:i], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(k); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut to %d bytes: %v, want ErrDamaged", i, err)
		}
	}
}

func TestLayers(t *testing.T) {
	s := open(t)
	want := digest.FromString("layer")
	k, err := Key("").Next("op")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(k, Record{Layer: want}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "steps", "torn"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	var got []digest.Digest
	err = s.Layers(func(_ Key, d digest.Digest, _ time.Time) bool {
		got = append(got, d)
		return true
	})
	if err != nil || len(got) != 1 || got[0] != want {
		t.Errorf("Layers: %v, %v, want only %s", got, err, want)
	}
}
