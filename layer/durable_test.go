package layer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// repairing opens the store in dir with a list of what it repairs.
func repairing(t *testing.T, dir string) (*Store, *[]string) {
	t.Helper()
	var told []string
	s, err := Open(dir, Options{SingleID: !realRoot(), Repaired: func(what string) { told = append(told, what) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, &told
}

func TestDurable(t *testing.T) {
	s := newStore(t)
	d, err := s.PutBlob(t.Context(), "text/plain", []byte("text"))
	if err != nil {
		t.Fatal(err)
	}
	mode := func() os.FileMode {
		info, err := os.Stat(s.blobPath(d.Digest))
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode()
	}
	if mode() == onDisk {
		t.Error("a fresh blob is marked")
	}
	if err := s.Durable(t.Context(), d.Digest, digest.FromString("not here")); err != nil || mode() != onDisk {
		t.Errorf("Durable: %v, mode %v", err, mode())
	}
	// Who writes it again has to wait again.
	if err := errors.Join(os.Chmod(s.blobPath(d.Digest), 0o644), os.WriteFile(s.blobPath(d.Digest), []byte("torn"), 0o644), os.Chmod(s.blobPath(d.Digest), onDisk)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutBlob(t.Context(), "text/plain", []byte("text")); err != nil || mode() == onDisk {
		t.Errorf("PutBlob over a damaged one: %v, mode %v", err, mode())
	}
}

// A layer's blob that has reached the disk is not replaced by one that has not.
func TestDurableStays(t *testing.T) {
	s := newStore(t)
	data := foreignTar(t, "f a/b text")
	l, d, _ := promised(t, s, data)
	if err := s.obtain(t.Context(), l, need{blob: d.Digest}); err != nil {
		t.Fatal(err)
	}
	if err := s.Durable(t.Context(), d.Digest); err != nil {
		t.Fatal(err)
	}
	was, _ := os.Stat(s.blobPath(d.Digest))
	// A power cut took all else that was known of it.
	if err := os.RemoveAll(s.layerDir(l)); err != nil {
		t.Fatal(err)
	}
	again := reopen(t, s.Dir())
	_, _, fetches := promised(t, again, data)
	if _, err := again.Tree(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if now, err := os.Stat(s.blobPath(d.Digest)); err != nil || !os.SameFile(was, now) || fetches.Load() > 0 {
		t.Errorf("another blob, %v, fetched %d times", err, fetches.Load())
	}
	if list := again.storedBlobs(l); len(list) != 1 {
		t.Errorf("noted: %v", list)
	}
}

func TestPromiseStored(t *testing.T) {
	s := newStore(t)
	l, d, _ := promised(t, s, foreignTar(t, "f a/b text"))
	if _, err := s.Tree(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(s.layerDir(l)); err != nil {
		t.Fatal(err)
	}
	again := reopen(t, s.Dir())
	if again.Has(l) {
		t.Error("the layer is still known")
	}
	again.PromiseStored(t.Context(), l, d)
	if tree, err := again.Tree(t.Context(), l); err != nil {
		t.Error(err)
	} else if data, err := os.ReadFile(filepath.Join(tree, "a/b")); string(data) != "text" {
		t.Errorf("%q, %v", data, err)
	}
	again.PromiseStored(t.Context(), Layer{digest.FromString("x")}, ocispec.Descriptor{Digest: digest.FromString("y"), Size: 1})
	if again.Has(Layer{digest.FromString("x")}) {
		t.Error("a blob that is not here is promised")
	}
}

// After a power cut a file may have its size and its times and other bytes.
func TestTreeAfterPowerCut(t *testing.T) {
	for _, blob := range []bool{true, false} {
		s := newStore(t)
		l := buildLayer(t, s, Sinks{Tree: true}, []item{folder("a"), regular("a/b", "text")})
		if blob {
			if _, err := s.Blob(t.Context(), l, Compression{}, false); err != nil {
				t.Fatal(err)
			}
		}
		name := filepath.Join(s.treePath(l), "a/b")
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(name, make([]byte, 4), 0o644), os.Chtimes(name, info.ModTime(), info.ModTime())); err != nil {
			t.Fatal(err)
		}
		again, told := repairing(t, s.Dir())
		again.origin.Boot = "another"
		tree, err := again.Tree(t.Context(), l)
		if blob {
			if data, _ := os.ReadFile(filepath.Join(tree, "a/b")); err != nil || string(data) != "text" {
				t.Errorf("%q, %v", data, err)
			}
		} else if !errors.Is(err, ErrLost) || again.Has(l) {
			t.Errorf("%v, want ErrLost; has it: %t", err, again.Has(l))
		}
		if !strings.Contains(fmt.Sprint(*told), "tree of layer "+l.DiffID.String()) {
			t.Errorf("told of %v", *told)
		}
	}
}

// A blob can be made of a tree that another boot has left.
func TestBlobAfterReboot(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Tree: true}, []item{folder("a"), regular("a/b", "text")})
	again := reopen(t, s.Dir())
	again.origin.Boot = "another"
	if _, err := again.Blob(t.Context(), l, Compression{}, false); err != nil {
		t.Error(err)
	}
}
