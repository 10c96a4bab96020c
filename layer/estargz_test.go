package layer

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// estargzBlob makes a layer with nothing but an eStargz blob.
func estargzBlob(t *testing.T, s *Store) (Layer, ocispec.Descriptor, []byte) {
	t.Helper()
	c := Compression{Algorithm: EStargz}
	l := buildLayer(t, s, Sinks{Blob: &c}, odd())
	d, err := s.Blob(t.Context(), l, c, true)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(s.blobPath(d.Digest))
	if err != nil {
		t.Fatal(err)
	}
	return l, d, data
}

// The blob is what its annotations say, and the library that pullers use finds the files in it.
func TestEStargz(t *testing.T) {
	s := newStore(t)
	_, d, data := estargzBlob(t, s)
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := d.Annotations[AnnotationDiffID], digest.FromBytes(plain).String(); got != want {
		t.Errorf("diff ID %s, want that of the uncompressed bytes, %s", got, want)
	}
	if got, want := d.Annotations[annotationSize], fmt.Sprint(len(plain)); got != want {
		t.Errorf("uncompressed size %s, want %s", got, want)
	}
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.VerifyTOC(digest.Digest(d.Annotations[annotationTOC])); err != nil {
		t.Error(err)
	}
	f, err := r.OpenFile("bin/su")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(f); err != nil || string(text) != "suid" {
		t.Errorf("bin/su: %q, %v", text, err)
	}
}

// The files of a layer can be read from its eStargz blob alone, under the layer's own diff ID and under that which images
// name for it.
func TestEStargzIsRead(t *testing.T) {
	s := newStore(t)
	l, d, _ := estargzBlob(t, s)
	want, err := s.View(t.Context(), []Layer{l})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []Layer{l, {DiffID: digest.Digest(d.Annotations[AnnotationDiffID])}} {
		if err := os.Remove(filepath.Join(s.layerDir(l), "index")); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		again := reopen(t, s.Dir())
		v, err := again.View(t.Context(), []Layer{l})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"bin/su", "bin/su2", "lnk", "null", "tagged"} {
			a, _ := want.Entry(name)
			b, ok := v.Entry(name)
			if !ok || !reflect.DeepEqual(a, b) {
				t.Errorf("%s of %s: %v, want %v", name, l.DiffID, b, a)
			}
		}
		if list, err := v.ReadDir("."); err != nil || slices.ContainsFunc(list, func(e os.DirEntry) bool { return e.Name() == estargz.TOCTarName }) {
			t.Errorf("%s lists the table of contents: %v, %v", l.DiffID, list, err)
		}
	}
}

// A blob from a shared cache is fetched and read like one that was made here; one of a base keeps its annotations.
func TestEStargzPromised(t *testing.T) {
	l, d, data := estargzBlob(t, newStore(t))
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	s := newStore(t)
	s.Promise(l, d, open)
	got, err := s.Blob(t.Context(), l, Compression{Algorithm: EStargz}, true)
	if err != nil || got.Digest != d.Digest || got.Annotations[AnnotationDiffID] != d.Annotations[AnnotationDiffID] {
		t.Errorf("promised: %v, %v", got, err)
	}
	plain, err := s.Blob(t.Context(), l, Compression{}, true)
	if err != nil || plain.Digest == d.Digest || plain.Annotations != nil {
		t.Errorf("gzip of it: %v, %v", plain, err)
	}
	twin := Layer{DiffID: digest.Digest(d.Annotations[AnnotationDiffID])}
	if !s.Has(twin) {
		t.Error("the layer that images name is not there")
	}

	s = newStore(t)
	d.Annotations = ManifestAnnotations(d)
	s.Promise(twin, d, open)
	if got, err = s.Blob(t.Context(), twin, Compression{Algorithm: EStargz}, true); err != nil || got.Digest != d.Digest || len(got.Annotations) != 2 {
		t.Errorf("of a base: %v, %v", got, err)
	}
	if got, err = s.Blob(t.Context(), twin, Compression{Algorithm: Zstd}, true); err != nil || got.MediaType != ocispec.MediaTypeImageLayerZstd || got.Annotations != nil {
		t.Errorf("zstd of a base: %v, %v", got, err)
	}
}

// TestEStargzWrongTwin has a promised blob say that it is one of another layer as well, before it is here and after.
func TestEStargzWrongTwin(t *testing.T) {
	l, d, data := estargzBlob(t, newStore(t))
	s := newStore(t)
	victim := buildLayer(t, s, Sinks{Tree: true}, []item{regular("a", "text")})
	honest := d
	d.Annotations = maps.Clone(d.Annotations)
	d.Annotations[AnnotationDiffID] = victim.DiffID.String()
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	s.Promise(l, d, open)
	if v, err := s.View(t.Context(), []Layer{l}); err == nil {
		t.Errorf("a lie was believed: %v", v)
	}
	honest.Annotations = ManifestAnnotations(d)
	s.Promise(Layer{estargzTwin(t, data)}, honest, open)
	r, _, err := s.OpenBlob(t.Context(), d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	_, _ = s.Blob(t.Context(), l, Compression{Algorithm: EStargz}, true)
	if got, err := s.Blob(t.Context(), victim, Compression{}, false); err != nil || got.Digest == d.Digest {
		t.Errorf("blob of another layer: %v, %v", got, err)
	}
}

// estargzTwin is the layer that images name for a blob.
func estargzTwin(t *testing.T, data []byte) digest.Digest {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	d, err := digest.FromReader(z)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// An offset that is a lie makes another layer of the blob, which is noticed.
func TestEStargzWrongOffset(t *testing.T) {
	l, d, data := estargzBlob(t, newStore(t))
	for _, offset := range []string{"", "1", "-3", "x", "100000000"} {
		s := newStore(t)
		d.Annotations[annotationOffset] = offset
		s.Promise(l, d, func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		if v, err := s.View(t.Context(), []Layer{l}); err == nil {
			t.Errorf("offset %q: %v", offset, v)
		}
	}
}
