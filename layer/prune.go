package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// PruneOptions says what [Store.Prune] keeps besides what index.json reaches.
type PruneOptions struct {
	Keep   []digest.Digest // diff IDs, such as those of cache records
	Before time.Time       // what was used later stays
}

// Pruned is what [Store.Prune] did.
type Pruned struct {
	Busy   bool // other processes use the store: nothing was removed
	Bytes  int64
	Layers int // indexes and trees of that many layers
	Blobs  int
	Temps  int // leftovers of dead processes
	Mounts int // directories of RUN --mount=type=cache
}

// Prune removes layers and blobs that no image in index.json and nothing in
// o.Keep needs, and leftovers of dead processes. It must have the store for
// itself: if another process has it open, Busy is set and nothing happens. In
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
	p := &pruning{s: s, ctx: ctx, before: o.Before, layers: map[string]bool{}, blobs: map[string]bool{}}
	for _, d := range o.Keep {
		p.layers[hexOf(d)] = true
	}
	if err := p.prune(); err != nil {
		return p.done, fmt.Errorf("prune: %w", err)
	}
	return p.done, nil
}

type pruning struct {
	s      *Store
	ctx    context.Context
	before time.Time
	layers map[string]bool // to keep, by hex of the diff ID
	blobs  map[string]bool // to keep, by hex of the digest
	done   Pruned
}

func (p *pruning) prune() error {
	if err := p.markTagged(); err != nil {
		return err
	}
	p.done.Temps, p.done.Bytes = sweep(filepath.Join(p.s.dir, "tmp"))
	if err := p.sweepLayers(); err != nil {
		return err
	}
	if err := p.sweepBlobs(); err != nil {
		return err
	}
	if err := p.sweepMounts(); err != nil {
		return err
	}
	// Nobody waits for a lock now, but for those that are held in this process.
	return p.sweepLocks()
}

// markTagged keeps the images of index.json.
func (p *pruning) markTagged() error {
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
func (p *pruning) mark(d digest.Digest) error {
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

// sweepLayers removes unneeded layers. Blobs of needed ones are needed: a
// layer that filo built may have nothing else.
func (p *pruning) sweepLayers() error {
	dir := filepath.Join(p.s.dir, "layers")
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, d := range list {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		l := Layer{DiffID: digest.NewDigestFromEncoded(digest.SHA256, d.Name())}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if p.layers[d.Name()] || info.ModTime().After(p.before) {
			for _, b := range p.s.readBlobs(l) {
				p.blobs[hexOf(b.Descriptor.Digest)] = true
			}
			continue
		}
		if err := p.removeLayer(filepath.Join(dir, d.Name())); err != nil {
			return err
		}
		p.s.forget(l)
	}
	return nil
}

// removeLayer moves the directory to tmp first: a half removed layer must not
// be found.
func (p *pruning) removeLayer(dir string) error {
	size := diskUse(dir)
	trash, err := p.s.Temp("pruned-")
	if err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(trash, "layer")); err != nil {
		return err
	}
	p.done.Layers++
	p.done.Bytes += size
	return removeAll(trash)
}

func (s *Store) forget(l Layer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.indexes, l.DiffID)
	delete(s.whole, l.DiffID)
}

func (p *pruning) sweepBlobs() error {
	dir := filepath.Join(p.s.dir, "blobs", "sha256")
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, d := range list {
		info, err := d.Info()
		if err != nil {
			return err
		}
		if p.blobs[d.Name()] || info.ModTime().After(p.before) {
			continue
		}
		size := diskUse(filepath.Join(dir, d.Name()))
		if err := os.Remove(filepath.Join(dir, d.Name())); err != nil {
			return err
		}
		p.done.Blobs++
		p.done.Bytes += size
	}
	return nil
}

// sweepMounts removes the directories below mounts/ that were not used lately, with their locks.
func (p *pruning) sweepMounts() error {
	dir := filepath.Join(p.s.dir, "mounts")
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range list {
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.ModTime().After(p.before) {
			continue
		}
		at := filepath.Join(dir, d.Name())
		if d.IsDir() {
			p.done.Mounts++
			p.done.Bytes += diskUse(at)
		} else if _, err := os.Lstat(strings.TrimSuffix(at, ".lock")); err == nil {
			continue // the lock of a directory that stays
		}
		if err := removeAll(at); err != nil {
			return err
		}
	}
	return nil
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
