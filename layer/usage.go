package layer

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Kind says what something in the state directory is.
type Kind string

// The kinds of things in the state directory.
const (
	KindLayer  Kind = "layer"      // entry list and unpacked tree
	KindBlob   Kind = "blob"       // layers as images hold them, manifests, configs, with what they are restored from
	KindMount  Kind = "cachemount" // contents of RUN --mount=type=cache
	KindSource Kind = "source"     // downloads, and where images came from
	KindRecord Kind = "record"     // what build steps made, digests of files, what builds did
	KindTemp   Kind = "unfinished" // of processes that run, or ended at once
)

// Item is one thing in the state directory.
type Item struct {
	Kind  Kind
	ID    string    // digest of a layer or blob, else a name that is unique among its kind
	Bytes int64     // on disk
	Used  time.Time // last
	InUse bool      // an image of index.json needs it

	path  string
	owner []string // of a blob: the layers that have it, by hex
}

// places says where the items of each kind are.
var places = [...]struct {
	kind Kind
	dir  string
}{
	{KindLayer, "layers"}, {KindBlob, "blobs/sha256"}, {KindBlob, copies}, {KindMount, "mounts"}, {KindSource, "sources/http"}, {KindSource, "sources/images"},
	{KindSource, "sources/blobs"}, {KindRecord, "steps"}, {KindRecord, "files"}, {KindRecord, "builds"}, {KindRecord, flats}, {KindTemp, "tmp"},
}

// Items lists what is in the state directory. used tells when layers were used where the store does not see it, as by
// cache records. Whatever seems to be used after now was used while the clock was wrong: it counts as used now. What other
// processes do meanwhile may or may not be listed.
func (s *Store) Items(ctx context.Context, now time.Time, used map[digest.Digest]time.Time) ([]Item, error) {
	l := &lister{s: s, ctx: ctx, now: now, used: used, owners: map[string][]string{}, latest: map[string]time.Time{}}
	var err error
	if l.needed, err = s.needed(ctx); err != nil {
		return nil, fmt.Errorf("measure store: %w", err)
	}
	for _, p := range places {
		if err := l.list(p.kind, p.dir); err != nil {
			return nil, fmt.Errorf("measure store: %w", err)
		}
	}
	return l.items, nil
}

type lister struct {
	s      *Store
	ctx    context.Context // of Items
	now    time.Time
	used   map[digest.Digest]time.Time
	needed *reached
	owners map[string][]string  // of blobs
	latest map[string]time.Time // use of layers
	items  []Item
}

func (l *lister) list(kind Kind, dir string) error {
	all, err := os.ReadDir(filepath.Join(l.s.dir, dir))
	if os.IsNotExist(err) {
		return nil
	}
	for _, d := range all {
		if l.ctx.Err() != nil {
			return context.Cause(l.ctx)
		}
		if kind == KindMount && filepath.Ext(d.Name()) == ".lock" {
			continue // goes with its directory
		}
		name := d.Name()
		if dir == copies {
			name = strings.TrimSuffix(name, paritySuffix)
			if _, err := os.Lstat(filepath.Join(l.s.dir, "blobs", "sha256", name)); err == nil {
				continue // goes with its blob
			}
		}
		info, err := d.Info()
		if err != nil {
			continue // gone meanwhile
		}
		it := Item{Kind: kind, ID: name, Used: info.ModTime(), path: filepath.Join(l.s.dir, dir, d.Name())}
		it.Bytes = diskUse(it.path)
		l.know(&it, name)
		if it.Used.After(l.now) {
			it.Used = l.now
		}
		l.items = append(l.items, it)
	}
	return err
}

// know adds what the kind of an item tells.
func (l *lister) know(it *Item, name string) {
	later := func(t time.Time) {
		if t.After(it.Used) {
			it.Used = t
		}
	}
	switch it.Kind {
	case KindLayer:
		d := digest.NewDigestFromEncoded(digest.SHA256, name)
		it.ID, it.InUse = d.String(), l.needed.layers[name]
		later(l.used[d])
		l.latest[name] = it.Used
		for _, b := range l.s.readBlobs(Layer{DiffID: d}) {
			hex := hexOf(b.Descriptor.Digest)
			l.owners[hex] = append(l.owners[hex], name)
		}
	case KindBlob: // comes after the layers
		it.ID, it.InUse = "sha256:"+name, l.needed.blobs[name]
		it.owner = l.owners[name]
		if filepath.Base(filepath.Dir(it.path)) != copies {
			for _, spare := range l.s.spares(digest.Digest(it.ID)) {
				it.Bytes += diskUse(spare)
			}
		}
		for _, layer := range it.owner {
			later(l.latest[layer])
		}
	case KindSource, KindRecord:
		it.ID = filepath.Base(filepath.Dir(it.path)) + "/" + name
	}
}

// needed marks what the images of index.json need.
func (s *Store) needed(ctx context.Context) (*reached, error) {
	r := &reached{s: s, ctx: ctx, layers: map[string]bool{}, blobs: map[string]bool{}}
	if err := r.markTagged(); err != nil {
		return nil, err
	}
	for hex := range r.layers {
		for _, b := range s.readBlobs(Layer{DiffID: digest.NewDigestFromEncoded(digest.SHA256, hex)}) {
			r.blobs[hexOf(b.Descriptor.Digest)] = true
		}
	}
	return r, nil
}

// Free returns how many bytes the file system of the state directory has left for this user.
func (s *Store) Free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("measure disk: %w", err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}
