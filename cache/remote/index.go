package remote

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/cache"
	"filo/cache/mounts"
	"filo/layer"
)

// What of an index is read: one is held in memory, and its author may be anybody.
const (
	maxIndex   = 32 << 20
	maxRecords = 100_000
)

// format is the version of our field in the index. An index of another one has no records for us.
const format = 1

// day is how exactly the use of a record is noted: two builds on one day write the same index.
const day = 24 * 60 * 60

// Annotations of layers, as BuildKit writes them.
const (
	annotationDiffID  = layer.AnnotationDiffID
	annotationCreated = "buildkit/createdat"
)

// entry is a record: what one key stands for.
type entry struct {
	diffID  digest.Digest
	blob    ocispec.Descriptor // OCI media type, digest, size
	created int64              // seconds since the epoch
	used    int64              // the same, whole days
}

// index is all records of a place.
type index struct {
	entries map[cache.Key]entry
	mounts  map[cache.Key]mountEntry
	missing bool // the place has none
}

func newIndex() *index {
	return &index{entries: map[cache.Key]entry{}, mounts: map[cache.Key]mountEntry{}}
}

// wire is the index as it is written.
type wire struct {
	cacheimporttypes.CacheConfig
	Filo *ours `json:"filo,omitempty"`
}

type ours struct {
	Format int         `json:"format"`
	Used   []int64     `json:"used"`
	Mounts []mountWire `json:"mounts,omitempty"`

	EStargz map[digest.Digest]map[string]string `json:"estargz,omitempty"`
}

// mountWire is a cache mount as it is written.
type mountWire struct {
	Key     cache.Key `json:"key"`
	Layers  []int     `json:"layers"` // by number; the list first
	Bytes   int64     `json:"bytes"`
	Created int64     `json:"created"`
	Used    int64     `json:"used"`
}

// parseIndex reads an index. Records that are BuildKit's, or broken, are left out.
func parseIndex(data []byte) (*index, error) {
	var w wire
	if err := json.Unmarshal(data, &w); err != nil {
		return nil, fmt.Errorf("read cache config: %w", err)
	}
	x := newIndex()
	if w.Filo == nil || w.Filo.Format != format {
		return x, nil
	}
	if len(w.Records) > maxRecords || len(w.Filo.Used) != len(w.Records) {
		return nil, errors.New("read cache config: its parts do not fit together")
	}
	for i, r := range w.Records {
		e, ok := entryOf(w.Layers, r)
		if !ok {
			continue
		}
		e.used = w.Filo.Used[i]
		e.blob.Annotations = layer.BlobAnnotations(ocispec.Descriptor{Annotations: w.Filo.EStargz[e.blob.Digest]})
		if !e.valid() {
			continue
		}
		x.add(cache.Key(r.Digest), e)
	}
	parts := 0
	for _, m := range w.Filo.Mounts {
		if parts += len(m.Layers); parts > maxRecords { // two bytes each there, a hundred in memory
			return nil, errors.New("read cache config: its cache mounts have too many parts")
		}
		if e, ok := mountOf(w.Layers, m); ok {
			x.mounts[m.Key] = e
		}
	}
	return x, nil
}

// mountOf reads a cache mount of a cache config.
func mountOf(layers []cacheimporttypes.CacheLayer, m mountWire) (mountEntry, bool) {
	e := mountEntry{bytes: m.Bytes, created: m.Created, used: m.Used}
	if !valid(digest.Digest(m.Key)) || len(m.Layers) == 0 || m.Bytes < 0 {
		return e, false
	}
	for _, i := range m.Layers {
		l, ok := layerOf(layers, i)
		if !ok {
			return e, false
		}
		e.parts = append(e.parts, mounts.Part{DiffID: l.diffID, Blob: l.blob})
	}
	return e, true
}

// entryOf reads a record of a cache config.
func entryOf(layers []cacheimporttypes.CacheLayer, r cacheimporttypes.CacheRecord) (entry, bool) {
	if len(r.Inputs) > 0 || len(r.Results) != 1 || !valid(r.Digest) {
		return entry{}, false
	}
	e, ok := layerOf(layers, r.Results[0].LayerIndex)
	e.created = r.Results[0].CreatedAt.Unix()
	return e, ok
}

// layerOf reads the layer with the number i.
func layerOf(layers []cacheimporttypes.CacheLayer, i int) (entry, bool) {
	if i < 0 || i >= len(layers) || layers[i].Annotations == nil {
		return entry{}, false
	}
	a := layers[i].Annotations
	e := entry{diffID: a.DiffID}
	e.blob = ocispec.Descriptor{MediaType: ociType(a.MediaType), Digest: layers[i].Blob, Size: a.Size}
	return e, e.valid()
}

func (e entry) valid() bool {
	own, told := e.blob.Annotations[annotationDiffID]
	return valid(e.diffID) && valid(e.blob.Digest) && e.blob.Size > 0 && e.blob.MediaType != "" && (!told || valid(digest.Digest(own)))
}

func valid(d digest.Digest) bool {
	return d.Validate() == nil && d.Algorithm() == digest.SHA256
}

// ociType returns the OCI form of a layer's media type, "" if it is not one.
func ociType(t string) string {
	for _, prefix := range []string{ocispec.MediaTypeImageLayer, dockerLayer} {
		switch kind, ok := strings.CutPrefix(t, prefix); {
		case ok && kind == "":
			return ocispec.MediaTypeImageLayer
		case ok && (kind == "+gzip" || kind == ".gzip"):
			return ocispec.MediaTypeImageLayerGzip
		case ok && (kind == "+zstd" || kind == ".zstd"):
			return ocispec.MediaTypeImageLayerZstd
		}
	}
	return ""
}

const dockerLayer = "application/vnd.docker.image.rootfs.diff.tar"

// dockerType returns Docker's form of an OCI layer's media type.
func dockerType(t string) string {
	return dockerLayer + strings.Replace(strings.TrimPrefix(t, ocispec.MediaTypeImageLayer), "+", ".", 1)
}

// add puts a record in; of two with one key the one made later stays, and the later use counts.
func (x *index) add(k cache.Key, e entry) {
	old, ok := x.entries[k]
	if ok && old.created > e.created {
		e.diffID, e.blob, e.created = old.diffID, old.blob, old.created
	}
	e.used = max(e.used, old.used)
	x.entries[k] = e
}

// merge returns x with the records of y, whose layers count where both have a key.
func (x *index) merge(y *index) *index {
	m := newIndex()
	maps.Copy(m.entries, x.entries)
	for k, e := range y.entries {
		e.used = max(e.used, x.entries[k].used)
		m.entries[k] = e
	}
	maps.Copy(m.mounts, x.mounts)
	for k, e := range y.mounts {
		e.used = max(e.used, x.mounts[k].used)
		m.mounts[k] = e
	}
	return m
}

// trim drops records that no build had use for since the given time, and all but the given number of those used last.
func (x *index) trim(since int64, most int) {
	maps.DeleteFunc(x.entries, func(_ cache.Key, e entry) bool { return e.used < since-day })
	if len(x.entries) <= most {
		return
	}
	keys := slices.SortedFunc(maps.Keys(x.entries), func(a, b cache.Key) int {
		ea, eb := x.entries[a], x.entries[b]
		return cmp.Or(cmp.Compare(eb.used, ea.used), cmp.Compare(eb.created, ea.created), cmp.Compare(a, b))
	})
	for _, k := range keys[most:] {
		delete(x.entries, k)
	}
}

// dropOlder drops records of steps that ran before the given time.
func (x *index) dropOlder(since int64) {
	maps.DeleteFunc(x.entries, func(_ cache.Key, e entry) bool { return e.created < since })
	maps.DeleteFunc(x.mounts, func(_ cache.Key, e mountEntry) bool { return e.created < since })
}

func (x *index) dropBlob(blob digest.Digest) {
	maps.DeleteFunc(x.entries, func(_ cache.Key, e entry) bool { return e.blob.Digest == blob })
	maps.DeleteFunc(x.mounts, func(_ cache.Key, e mountEntry) bool { return e.has(blob) })
}

// hasBlob reports whether a record or cache mount that was used since then has the blob.
func (x *index) hasBlob(blob digest.Digest, since int64) bool {
	for _, e := range x.entries {
		if e.blob.Digest == blob && e.used >= since {
			return true
		}
	}
	for _, e := range x.mounts {
		if e.used >= since && e.has(blob) {
			return true
		}
	}
	return false
}

// contains reports whether x has all records of y, with the same layers and not longer unused.
func (x *index) contains(y *index) bool {
	for k, e := range y.entries {
		have, ok := x.entries[k]
		if !ok || have.diffID != e.diffID || have.blob.Digest != e.blob.Digest || have.used < e.used {
			return false
		}
	}
	for k, e := range y.mounts {
		have, ok := x.mounts[k]
		if !ok || have.parts[0].Blob.Digest != e.parts[0].Blob.Digest || have.used < e.used {
			return false
		}
	}
	return true
}

// size is how many records and cache mounts there are.
func (x *index) size() int { return len(x.entries) + len(x.mounts) }

// blobs are the layers of the records and cache mounts, each once, in the order of their keys.
func (x *index) blobs() []entry {
	var out []entry
	seen := map[digest.Digest]bool{}
	add := func(e entry) {
		if !seen[e.blob.Digest] {
			seen[e.blob.Digest] = true
			out = append(out, e)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(x.entries)) {
		add(x.entries[k])
	}
	for _, k := range slices.Sorted(maps.Keys(x.mounts)) {
		m := x.mounts[k]
		for _, p := range m.parts {
			add(entry{diffID: p.DiffID, blob: p.Blob, created: m.created})
		}
	}
	return out
}

// marshal writes the index. Equal records give equal bytes.
func (x *index) marshal() ([]byte, error) {
	w := wire{Filo: &ours{Format: format, Used: []int64{}}}
	at := map[digest.Digest]int{}
	for i, e := range x.blobs() {
		at[e.blob.Digest] = i
		w.Layers = append(w.Layers, cacheimporttypes.CacheLayer{
			Blob: e.blob.Digest, ParentIndex: -1,
			Annotations: &cacheimporttypes.LayerAnnotations{
				MediaType: e.blob.MediaType, DiffID: e.diffID, Size: e.blob.Size, CreatedAt: utc(e.created),
			},
		})
		if a := layer.BlobAnnotations(e.blob); a != nil {
			if w.Filo.EStargz == nil {
				w.Filo.EStargz = map[digest.Digest]map[string]string{}
			}
			w.Filo.EStargz[e.blob.Digest] = a
		}
	}
	for _, k := range slices.Sorted(maps.Keys(x.entries)) {
		e := x.entries[k]
		w.Records = append(w.Records, cacheimporttypes.CacheRecord{
			Digest:  digest.Digest(k),
			Results: []cacheimporttypes.CacheResult{{LayerIndex: at[e.blob.Digest], CreatedAt: utc(e.created)}},
		})
		w.Filo.Used = append(w.Filo.Used, e.used)
	}
	for _, k := range slices.Sorted(maps.Keys(x.mounts)) {
		e := x.mounts[k]
		m := mountWire{Key: k, Bytes: e.bytes, Created: e.created, Used: e.used}
		for _, p := range e.parts {
			m.Layers = append(m.Layers, at[p.Blob.Digest])
		}
		w.Filo.Mounts = append(w.Filo.Mounts, m)
	}
	return json.Marshal(w)
}

func utc(seconds int64) time.Time { return time.Unix(seconds, 0).UTC() }
