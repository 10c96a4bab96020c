package remote

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/cache"
	"filo/cache/mounts"
)

func entryFor(content string, created, used int64) entry {
	d := digest.FromString("compressed " + content)
	return entry{
		diffID: digest.FromString(content), created: created, used: used,
		blob: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: 5},
	}
}

func TestIndexKeepsWhatItIsGiven(t *testing.T) {
	x := newIndex()
	for i := range 5 {
		x.entries[keyOf(t, fmt.Sprint(i))] = entryFor(fmt.Sprint(i/2), int64(100+i), day)
	}
	b, err := x.marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := x.marshal()
	if err != nil || !bytes.Equal(b, again) {
		t.Error("equal records give other bytes")
	}
	y, err := parseIndex(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(x.entries, y.entries, cmp.AllowUnexported(entry{})); d != "" {
		t.Errorf("the index read is not that written:\n%s", d)
	}
	if !x.contains(y) || !y.contains(x) {
		t.Error("equal indexes do not contain each other")
	}
}

// What the store needs to know of eStargz blobs survives; without it, or with nonsense for it, a record is of no use.
func TestIndexKeepsEStargz(t *testing.T) {
	x := newIndex()
	e := entryFor("seekable", 100, day)
	e.blob.Annotations = map[string]string{
		"containerd.io/snapshot/stargz/toc.digest": "sha256:t", annotationDiffID: digest.FromString("own").String(), "filo.estargz.toc.offset": "77",
	}
	x.entries[keyOf(t, "k")] = e
	b, err := x.marshal()
	if err != nil {
		t.Fatal(err)
	}
	y, err := parseIndex(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(x.entries, y.entries, cmp.AllowUnexported(entry{})); d != "" {
		t.Errorf("the index read is not that written:\n%s", d)
	}
	own := digest.FromString("own").String()
	if y, err = parseIndex(bytes.ReplaceAll(b, []byte(own), []byte("sha256:nonsense"))); err != nil || len(y.entries) != 0 {
		t.Errorf("a diff ID that is none: %v, %v", y, err)
	}
}

// Records of BuildKit, and broken ones, are passed over; an index that makes no sense is an error.
func TestParseIndexForeign(t *testing.T) {
	key, diff, blob := digest.FromString("key"), digest.FromString("diff"), digest.FromString("blob")
	layer := func(diff, blob, mediaType string, size int) string {
		return fmt.Sprintf(`{"blob":%q,"parent":-1,"annotations":{"mediaType":%q,"diffID":%q,"size":%d,"createdAt":"2026-01-01T00:00:00Z"}}`, blob, mediaType, diff, size)
	}
	good := layer(string(diff), string(blob), ocispec.MediaTypeImageLayerZstd, 7)
	record := func(at int) string {
		return fmt.Sprintf(`{"digest":%q,"layers":[{"layer":%d,"createdAt":"2026-01-02T00:00:00Z"}]}`, key, at)
	}
	doc := func(layers, records, used string) string {
		return fmt.Sprintf(`{"layers":[%s],"records":[%s],"filo":{"format":1,"used":[%s]}}`, layers, records, used)
	}
	for name, test := range map[string]struct {
		text  string
		count int
		fails bool
	}{
		"ours":               {doc(good, record(0), "1"), 1, false},
		"docker type":        {doc(layer(string(diff), string(blob), "application/vnd.docker.image.rootfs.diff.tar.gzip", 7), record(0), "1"), 1, false},
		"buildkit":           {fmt.Sprintf(`{"layers":[%s],"records":[%s]}`, good, record(0)), 0, false},
		"other format":       {fmt.Sprintf(`{"layers":[%s],"records":[%s],"filo":{"format":2,"used":[1]}}`, good, record(0)), 0, false},
		"no layer there":     {doc(good, record(1), "1"), 0, false},
		"negative layer":     {doc(good, record(-1), "1"), 0, false},
		"path for a digest":  {doc(layer(string(diff), "sha256:../../../etc/passwd", ocispec.MediaTypeImageLayer, 7), record(0), "1"), 0, false},
		"weak digest":        {doc(layer(string(diff), "md5:"+strings.Repeat("a", 32), ocispec.MediaTypeImageLayer, 7), record(0), "1"), 0, false},
		"no layer at all":    {doc(layer(string(diff), string(blob), "text/html", 7), record(0), "1"), 0, false},
		"negative size":      {doc(layer(string(diff), string(blob), ocispec.MediaTypeImageLayer, -7), record(0), "1"), 0, false},
		"record with inputs": {doc(good, fmt.Sprintf(`{"digest":%q,"layers":[{"layer":0}],"inputs":[[{"link":0}]]}`, key), "1"), 0, false},
		"too few uses":       {doc(good, record(0), ""), 0, true},
		"not JSON":           {`<html>`, 0, true},
		"empty":              {`{}`, 0, false},
	} {
		x, err := parseIndex([]byte(test.text))
		if (err != nil) != test.fails {
			t.Errorf("%s: error %v", name, err)
			continue
		}
		if err == nil && len(x.entries) != test.count {
			t.Errorf("%s: %d records, want %d", name, len(x.entries), test.count)
		}
	}
}

func FuzzParseIndex(f *testing.F) {
	x := newIndex()
	x.entries[cache.Key(digest.FromString("k"))] = entryFor("a", 1, day)
	b, err := x.marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"records":[{}],"filo":{"format":1,"used":[0]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := parseIndex(b)
		if err != nil {
			return
		}
		for k, e := range x.entries {
			if !valid(digest.Digest(k)) || !e.valid() {
				t.Errorf("record %s: %+v is not valid", k, e)
			}
		}
		if _, err := x.marshal(); err != nil {
			t.Errorf("what was read cannot be written: %v", err)
		}
	})
}

func FuzzParseInline(f *testing.F) {
	layers := []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("b"), Size: 3}}
	f.Add([]byte(fmt.Sprintf(`{"rootfs":{"diff_ids":[%q]},"moby.buildkit.cache.v0":"W10="}`, digest.FromString("d"))))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := parseInline(b, layers)
		if err != nil {
			return
		}
		for k, e := range x.entries {
			if !valid(digest.Digest(k)) || !e.valid() {
				t.Errorf("record %s: %+v is not valid", k, e)
			}
		}
	})
}

// TestParseIndexParts wants no memory to be taken for cache mounts of more parts than there may be.
func TestParseIndexParts(t *testing.T) {
	x := newIndex()
	part := mounts.Part{DiffID: digest.FromString("d"), Blob: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.FromString("b"), Size: 1}}
	x.mounts[cache.Key(digest.FromString("k"))] = mountEntry{parts: []mounts.Part{part}}
	data, err := x.marshal()
	if err != nil {
		t.Fatal(err)
	}
	if x, err := parseIndex(data); err != nil || len(x.mounts) != 1 {
		t.Fatal(x, err)
	}
	data = bytes.Replace(data, []byte(`"layers":[0]`), []byte(`"layers":[0`+strings.Repeat(",0", 4<<20)+`]`), 1)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := parseIndex(data); err == nil {
		t.Error("no error")
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 512<<20 {
		t.Errorf("%d MiB were allocated for %d", n>>20, len(data)>>20)
	}
}
