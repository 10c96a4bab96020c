package layer

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTreeInUse has steps on a tree when other processes want one that has other owners, that needs no overlay, or find it
// damaged. There is no blob: theirs is made from the one in use.
func TestTreeInUse(t *testing.T) {
	for what, open := range map[string]func(dir, tree string) (*Store, error){
		"other ids": func(dir, _ string) (*Store, error) {
			return Open(dir, Options{SingleID: realRoot()})
		},
		"plain": func(dir, _ string) (*Store, error) {
			return Open(dir, Options{SingleID: !realRoot(), Storage: StorageVFS})
		},
		"damaged": func(dir, tree string) (*Store, error) {
			err := os.Chtimes(filepath.Join(tree, "a", "b"), time.Unix(5, 0), time.Unix(5, 0))
			s, openErr := Open(dir, Options{SingleID: !realRoot()})
			return s, errors.Join(err, openErr)
		},
	} {
		t.Run(what, func(t *testing.T) {
			if what == "other ids" && !realRoot() {
				t.Skip("an ordinary user has one ID and no other owners")
			}
			s := newStore(t)
			l := buildLayer(t, s, Sinks{Tree: true}, []item{folder("a"), regular("a/b", "text"), regular("a/c", "more")})
			tree, err := s.Tree(t.Context(), l)
			if err != nil {
				t.Fatal(err)
			}
			root := openRoot(t, tree)
			for range 2 { // the second one may undo what the first one did
				other, err := open(s.Dir(), tree)
				if err != nil {
					t.Fatal(err)
				}
				if !other.Has(l) {
					t.Error("the layer is not there")
				}
				_, err = other.Tree(t.Context(), l)
				if err := errors.Join(err, other.Close()); err != nil {
					t.Fatal(err)
				}
				after := reopen(t, s.Dir())
				if _, err := after.Tree(t.Context(), l); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range []string{"a/b", "a/c"} {
				if f, err := root.OpenFile(name, unix.O_RDONLY, 0); err != nil {
					t.Errorf("a step on the tree reads %s: %v", name, err)
				} else {
					f.Close()
				}
			}
		})
	}
}

// TestTreeOfOthersDamaged wants a layer that only others have a tree of, a damaged one, to be lost, so that it is made again;
// the tree is theirs.
func TestTreeOfOthersDamaged(t *testing.T) {
	s := newStore(t)
	files := []item{folder("a"), regular("a/b", "text")}
	l := buildLayer(t, s, Sinks{Tree: true}, files)
	tree, err := s.Tree(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "a", "b"), []byte("else"), 0o644); err != nil {
		t.Fatal(err)
	}
	other := openWith(t, s.Dir(), StorageVFS)
	if _, err := other.Tree(t.Context(), l); !errors.Is(err, ErrLost) {
		t.Errorf("Tree: %v, want ErrLost", err)
	}
	if other.Has(l) {
		t.Error("a lost layer is there")
	}
	if again := buildLayer(t, other, Sinks{Tree: true}, files); again != l || !other.Has(l) {
		t.Errorf("made again: %v, there: %v", again, other.Has(l))
	}
	if _, err := os.Lstat(filepath.Join(tree, "a", "b")); err != nil {
		t.Error(err)
	}
}
