package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// PruneOptions says what [Store.Prune] removes.
type PruneOptions struct {
	Now    time.Time                   // what seems to be used later was used while the clock was wrong
	Used   map[digest.Digest]time.Time // see [Store.Items]
	Choose func(all []Item) []Item     // what is to go; what is in use stays all the same
}

// Pruned is what [Store.Prune] did.
type Pruned struct {
	Busy    bool // other processes use the store: nothing was removed
	Bytes   int64
	Removed []Item
}

// Count is how many of a kind were removed.
func (p Pruned) Count(k Kind) (n int) {
	for _, it := range p.Removed {
		if it.Kind == k {
			n++
		}
	}
	return n
}

// Prune removes what o chooses, but for what images in index.json need and the blobs of layers that stay, and leftovers of
// dead processes. It must have the store for itself: if another process has it open, Busy is set and nothing happens. In
// this process no other method may run meanwhile.
func (s *Store) Prune(ctx context.Context, o PruneOptions) (Pruned, error) {
	// Changing a lock gives the old one up first, even if the new one can't be
	// had. Only another Prune could get in between, and this process has
	// nothing unfinished.
	if err := flock(s.held, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if relock := flock(s.held, unix.LOCK_SH); relock != nil {
			return Pruned{}, fmt.Errorf("prune: %w", relock)
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			return Pruned{Busy: true}, nil
		}
		return Pruned{}, fmt.Errorf("prune: %w", err)
	}
	defer flock(s.held, unix.LOCK_SH)
	p := &pruning{s: s, ctx: ctx, gone: map[string]bool{}}
	if err := p.prune(o); err != nil {
		return p.done, fmt.Errorf("prune: %w", err)
	}
	return p.done, nil
}

type pruning struct {
	s    *Store
	ctx  context.Context
	gone map[string]bool // layers, by hex
	done Pruned
}

func (p *pruning) prune(o PruneOptions) error {
	_, p.done.Bytes = sweep(filepath.Join(p.s.dir, "tmp"))
	all, err := p.s.Items(p.ctx, o.Now, o.Used)
	if err != nil {
		return err
	}
	for _, it := range all {
		if it.Used.Equal(o.Now) {
			_ = os.Chtimes(it.path, o.Now, o.Now) // so that it ages from now on
		}
	}
	for _, it := range o.Choose(all) { // layers come before blobs
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		if err := p.remove(it); err != nil {
			return err
		}
	}
	// Nobody waits for a lock now, but for those that are held in this process.
	return p.sweepLocks()
}

// remove removes an item that nothing needs.
func (p *pruning) remove(it Item) error {
	if it.InUse || it.Kind == KindTemp {
		return nil
	}
	// A layer that filo built may have nothing else.
	if slices.ContainsFunc(it.owner, func(layer string) bool { return !p.gone[layer] }) {
		return nil
	}
	// A half removed thing must not be found, so it is moved away first.
	trash, err := p.s.Temp("pruned-")
	if err != nil {
		return err
	}
	if err := os.Rename(it.path, filepath.Join(trash, "item")); err != nil {
		return err
	}
	switch it.Kind {
	case KindLayer:
		name := filepath.Base(it.path)
		p.gone[name] = true
		p.s.forget(Layer{DiffID: digest.NewDigestFromEncoded(digest.SHA256, name)})
	case KindBlob:
		for _, spare := range p.s.spares(digest.Digest(it.ID)) {
			_ = os.Remove(spare)
		}
	case KindMount:
		_ = os.Remove(it.path + ".lock")
	}
	p.done.Bytes += it.Bytes
	p.done.Removed = append(p.done.Removed, it)
	return removeAll(trash)
}

// reached is what the images of index.json need.
type reached struct {
	s      *Store
	ctx    context.Context
	layers map[string]bool // by hex of the diff ID
	blobs  map[string]bool // by hex of the digest
}

// markTagged keeps the images of index.json.
func (p *reached) markTagged() error {
	tags, err := p.s.Names(p.ctx)
	if err != nil {
		return err
	}
	for _, d := range tags.Manifests {
		if err := p.mark(d.Digest); err != nil {
			return err
		}
	}
	return nil
}

// mark keeps a manifest, config or index and what it names. Whatever an index
// can name is looked into, as nothing but the content says what it is.
func (p *reached) mark(d digest.Digest) error {
	name := hexOf(d)
	if p.blobs[name] || name == "invalid" {
		return nil
	}
	p.blobs[name] = true
	data, err := p.s.ReadBlob(p.ctx, d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // images may be stored in part
	}
	if err != nil {
		return err
	}
	var m struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Config    *ocispec.Descriptor  `json:"config"`
		Subject   *ocispec.Descriptor  `json:"subject"`
		RootFS    ocispec.RootFS       `json:"rootfs"`
	}
	if json.Unmarshal(data, &m) != nil {
		return nil
	}
	for _, l := range m.Layers {
		p.blobs[hexOf(l.Digest)] = true
	}
	for _, l := range m.RootFS.DiffIDs {
		p.layers[hexOf(l)] = true
	}
	for _, next := range append(m.Manifests, pointed(m.Config, m.Subject)...) {
		if err := p.mark(next.Digest); err != nil {
			return err
		}
	}
	return nil
}

func pointed(list ...*ocispec.Descriptor) (some []ocispec.Descriptor) {
	for _, d := range list {
		if d != nil {
			some = append(some, *d)
		}
	}
	return some
}

func (s *Store) forget(l Layer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.indexes, l.DiffID)
	delete(s.compared, l.DiffID)
}

func (p *pruning) sweepLocks() error {
	dir := filepath.Join(p.s.dir, "locks")
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, d := range list {
		if d.Name() == rangesFile {
			continue // this process goes on to use it
		}
		f, err := os.Open(filepath.Join(dir, d.Name()))
		if err != nil {
			continue
		}
		if flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.Remove(f.Name())
		}
		f.Close()
	}
	return nil
}

// diskUse is how much removing path frees; hard links within count once.
func diskUse(path string) int64 {
	var total int64
	seen := map[uint64]bool{}
	_ = filepath.WalkDir(path, func(p string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil || st.Nlink > 1 && seen[st.Ino] {
			return nil
		}
		seen[st.Ino] = true
		total += st.Blocks * 512
		return nil
	})
	return total
}
