package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// wrongs are what can happen to a file.
var wrongs = map[string]func(path string) error{
	"flipped": func(path string) error {
		data, err := os.ReadFile(path)
		return errors.Join(err, os.Remove(path), os.WriteFile(path, flip(data, len(data)/2), 0o644))
	},
	"flipped, and no time tells": func(path string) error {
		info, err := os.Stat(path)
		data, readErr := os.ReadFile(path)
		err = errors.Join(err, readErr, os.Remove(path), os.WriteFile(path, flip(data, len(data)/2), 0o644))
		return errors.Join(err, os.Chtimes(path, info.ModTime(), info.ModTime()), os.Chmod(path, info.Mode()))
	},
	"cut": func(path string) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return shorten(path, info.Size()/2)
	},
	"empty": func(path string) error { return shorten(path, 0) },
	"gone":  os.Remove,
}

// shorten cuts a file that nobody may write to.
func shorten(path string, size int64) error {
	return errors.Join(os.Chmod(path, 0o644), os.Truncate(path, size))
}

// TestKeptTwice damages manifests and the like, and their second copies: one of both is enough.
func TestKeptTwice(t *testing.T) {
	for what, wrong := range wrongs {
		s := newStore(t)
		d, err := s.PutBlob(t.Context(), "text/plain", []byte("a manifest"))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Keep(t.Context(), []digest.Digest{d.Digest, digest.FromString("not here")}, nil); err != nil {
			t.Fatal(err)
		}
		whole := func(path string) bool {
			data, err := os.ReadFile(path)
			info, statErr := os.Stat(path)
			return errors.Join(err, statErr) == nil && string(data) == "a manifest" && info.Mode().Perm() == onDisk
		}
		blob, second := s.blobPath(d.Digest), s.copyPath(d.Digest)
		if !whole(blob) || !whole(second) {
			t.Fatal("not kept twice, or not on the disk")
		}
		for read, how := range map[string]func(s *Store) ([]byte, error){
			"ReadBlob": func(s *Store) ([]byte, error) { return s.ReadBlob(t.Context(), d.Digest) },
			"OpenBlob": func(s *Store) ([]byte, error) {
				r, _, err := s.OpenBlob(t.Context(), d.Digest)
				if err != nil {
					return nil, err
				}
				defer r.Close()
				data, err := io.ReadAll(r)
				if errors.Is(err, ErrDamaged) { // who opens it again gets the right one
					return s.ReadBlob(t.Context(), d.Digest)
				}
				return data, err
			},
		} {
			if err := wrong(blob); err != nil {
				t.Fatal(err)
			}
			again, told := repairing(t, s.Dir())
			data, err := how(again)
			if err != nil || string(data) != "a manifest" || !whole(blob) {
				t.Errorf("%s, %s: %q, %v; mended: %t", what, read, data, err, whole(blob))
			}
			if !slices.Equal(*told, []string{"blob " + d.Digest.String()}) {
				t.Errorf("%s, %s: told %q", what, read, *told)
			}
		}
		if err := wrong(second); err != nil {
			t.Fatal(err)
		}
		again, told := repairing(t, s.Dir())
		if err := again.Keep(t.Context(), []digest.Digest{d.Digest}, nil); err != nil || !whole(second) || len(*told) != 1 && what != "gone" {
			t.Errorf("%s copy: %v, told %q", what, err, *told)
		}
		if err := errors.Join(wrong(blob), wrong(second)); err != nil {
			t.Fatal(err)
		}
		if data, err := again.ReadBlob(t.Context(), d.Digest); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("both %s: %q, %v, want fs.ErrNotExist", what, data, err)
		}
	}
}

// What is kept already is not written again.
func TestKeepSame(t *testing.T) {
	s := newStore(t)
	d, err := s.PutBlob(t.Context(), "text/plain", []byte("a manifest"))
	if err != nil {
		t.Fatal(err)
	}
	var was os.FileInfo
	for range 2 {
		if err := s.Keep(t.Context(), []digest.Digest{d.Digest}, nil); err != nil {
			t.Fatal(err)
		}
		now, err := os.Stat(s.copyPath(d.Digest))
		if err != nil || was != nil && !os.SameFile(was, now) {
			t.Errorf("written again: %v", err)
		}
		was = now
	}
}

// TestRemake damages blobs that filo compressed: they come out the same from another blob of their layer or from the tree,
// even one that another boot has left or that other IDs would be needed for.
func TestRemake(t *testing.T) {
	for what, wrong := range wrongs {
		for _, c := range []Compression{{Level: 6}, {Level: 1}, {Algorithm: Zstd}, {Algorithm: Uncompressed}, {Algorithm: EStargz}} {
			for _, from := range []Sinks{{Tree: true}, {Blob: &Compression{Level: 9}}} {
				s := newStore(t)
				l := buildLayer(t, s, from, odd())
				d, err := s.Blob(t.Context(), l, c, true)
				if err != nil {
					t.Fatal(err)
				}
				good, err := os.ReadFile(s.blobPath(d.Digest))
				if err != nil {
					t.Fatal(err)
				}
				for how, ask := range map[string]func(context.Context, *Store) (io.ReadCloser, error){
					"OpenBlob": func(ctx context.Context, s *Store) (io.ReadCloser, error) {
						r, _, err := s.OpenBlob(ctx, d.Digest)
						return r, err
					},
					"Stream": func(ctx context.Context, s *Store) (io.ReadCloser, error) { return s.Stream(ctx, d.Digest) },
				} {
					if err := wrong(s.blobPath(d.Digest)); err != nil {
						t.Fatal(err)
					}
					again, told := repairing(t, s.Dir())
					again.origin.Boot, again.origin.IDs = "another", "others"
					if err := again.Ensure(t.Context(), d.Digest); err != nil {
						t.Errorf("%s %v, Ensure: %v", what, c, err)
					}
					data, err := readTwice(t.Context(), again, ask)
					if err != nil || string(data) != string(good) {
						t.Errorf("%s %v, %s: %d bytes, %v, want %d", what, c, how, len(data), err, len(good))
					}
					if !slices.Contains(*told, "blob "+d.Digest.String()) {
						t.Errorf("%s %v, %s: told %q", what, c, how, *told)
					}
				}
			}
		}
	}
}

// readTwice reads a blob, and once more if it was damaged.
func readTwice(ctx context.Context, s *Store, ask func(context.Context, *Store) (io.ReadCloser, error)) (data []byte, err error) {
	for range 2 {
		r, err := ask(ctx, s)
		if err != nil {
			return nil, err
		}
		data, err = io.ReadAll(r)
		r.Close()
		if !errors.Is(err, ErrDamaged) {
			return data, err
		}
	}
	return nil, ErrDamaged
}

// A damaged blob of a local image that is built on does not matter, whatever the new image is to be compressed with.
func TestRemakeForAnother(t *testing.T) {
	for what, wrong := range wrongs {
		s := newStore(t)
		l := buildLayer(t, s, Sinks{Tree: true}, odd())
		d, err := s.Blob(t.Context(), l, Compression{}, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := wrong(s.blobPath(d.Digest)); err != nil {
			t.Fatal(err)
		}
		again := reopen(t, s.Dir())
		again.origin.Boot = "another" // so that no mark counts
		again.PromiseStored(t.Context(), l, d)
		for _, c := range []Compression{{Algorithm: Zstd}, {}} {
			got, err := again.Blob(t.Context(), l, c, true)
			if err == nil {
				err = again.Ensure(t.Context(), got.Digest)
			}
			if err != nil {
				t.Errorf("%s, then %v: %v", what, c, err)
			}
		}
	}
}

// What cannot be had is an error that says so, and the tree of another blob is not taken for it.
func TestRemakeNothing(t *testing.T) {
	s := newStore(t)
	c := Compression{}
	l := buildLayer(t, s, Sinks{Blob: &c}, odd())
	d, err := s.Blob(t.Context(), l, c, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(s.blobPath(d.Digest)), os.Remove(s.parityPath(d.Digest))); err != nil {
		t.Fatal(err)
	}
	if err := s.Ensure(t.Context(), d.Digest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Ensure: %v, want fs.ErrNotExist", err)
	}
}

// A copy that cannot be put in its place is read all the same.
func TestRestoreNowhere(t *testing.T) {
	s := newStore(t)
	d, err := s.PutBlob(t.Context(), "text/plain", []byte("a manifest"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Keep(t.Context(), []digest.Digest{d.Digest}, nil); err != nil {
		t.Fatal(err)
	}
	if err := wrongs["flipped"](s.blobPath(d.Digest)); err != nil {
		t.Fatal(err)
	}
	s.tmp = fmt.Sprint(s.tmp, "-not-here")
	defer func() { s.tmp = s.tmp[:len(s.tmp)-len("-not-here")] }()
	if data, err := s.ReadBlob(t.Context(), d.Digest); err != nil || string(data) != "a manifest" {
		t.Errorf("%q, %v", data, err)
	}
}

func digestsOf(list ...ocispec.Descriptor) (all []digest.Digest) {
	for _, d := range list {
		all = append(all, d.Digest)
	}
	return all
}

// What a blob is restored from goes with it, and counts with it.
func TestPruneSpares(t *testing.T) {
	s := newStore(t)
	c := Compression{}
	l := buildLayer(t, s, Sinks{Blob: &c}, odd())
	layerBlob, err := s.Blob(t.Context(), l, c, true)
	if err != nil {
		t.Fatal(err)
	}
	config, err := s.PutBlob(t.Context(), "text/plain", []byte("a config"))
	if err == nil {
		err = s.Keep(t.Context(), digestsOf(config), digestsOf(layerBlob))
	}
	orphan := s.copyPath(digest.FromString("gone"))
	if err := errors.Join(err, os.WriteFile(orphan, []byte("gone"), 0o644)); err != nil {
		t.Fatal(err)
	}
	all, err := s.Items(t.Context(), time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int64{}
	for _, it := range all {
		if it.Kind == KindBlob {
			counts[it.ID] += it.Bytes
		}
	}
	want := map[string]int64{
		config.Digest.String():             diskUse(s.blobPath(config.Digest)) + diskUse(s.copyPath(config.Digest)),
		layerBlob.Digest.String():          diskUse(s.blobPath(layerBlob.Digest)) + diskUse(s.parityPath(layerBlob.Digest)),
		digest.FromString("gone").String(): diskUse(orphan),
	}
	if !maps.Equal(counts, want) || len(counts) != 3 {
		t.Errorf("counted %v, want %v", counts, want)
	}
	if _, err := s.Prune(t.Context(), PruneOptions{Now: time.Now(), Choose: func(all []Item) []Item { return all }}); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(s.inDir(copies)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
