package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// Storage says how a stack of layers becomes one directory for a RUN.
type Storage string

// The kinds of storage. All make the same layers, but where a process changes a file of which a layer below has several
// names: an overlay parts the name that it is changed by, the others change it under all of them, as file systems do.
const (
	StorageOverlay Storage = "overlay" // the caller mounts an overlay; the default
	StorageBtrfs   Storage = "btrfs"   // layers are merged in a subvolume of which snapshots are taken
	StorageVFS     Storage = "vfs"     // layers are merged in a directory; files are cloned where the file system can, else copied
)

// Merges says whether layers are merged in directories rather than mounted as overlays.
func (k Storage) Merges() bool { return k == StorageBtrfs || k == StorageVFS }

// BestStorage is the storage for a state directory where overlays cannot be mounted.
func BestStorage(dir string) Storage {
	var st unix.Statfs_t
	for unix.Statfs(dir, &st) != nil {
		if dir == "/" || dir == "." {
			return StorageVFS
		}
		dir = filepath.Dir(dir)
	}
	if uint32(st.Type) == unix.BTRFS_SUPER_MAGIC {
		return StorageBtrfs
	}
	return StorageVFS
}

// Use makes k the storage of steps to come; "" is StorageOverlay. No step may be under way.
// It is an error if the store's file system cannot do what k needs.
func (s *Store) Use(k Storage) error {
	if err := s.Check(k); err != nil {
		return err
	}
	s.storage = func() Storage { return k }
	return nil
}

// UseWhenNeeded is Use that asks choose, once, when the first step needs to know: a build that finds all its steps in
// the cache has no need to find out what can be mounted. choose may be called from any goroutine, until the store is
// closed, and returns what passes Check.
func (s *Store) UseWhenNeeded(choose func() Storage) { s.storage = sync.OnceValue(choose) }

// Check says why the store's file system cannot do what k needs.
func (s *Store) Check(k Storage) error {
	switch k {
	case "", StorageOverlay, StorageVFS:
		return nil
	case StorageBtrfs:
		if err := s.trySubvolume(); err != nil {
			return fmt.Errorf("storage btrfs: make a subvolume: %w (is the state directory on btrfs?)", err)
		}
		return nil
	}
	return fmt.Errorf("storage %q: not one of overlay, btrfs, vfs", k)
}

func (s *Store) trySubvolume() error {
	dir, err := s.Temp("probe-")
	if err != nil {
		return err
	}
	defer removeAll(dir)
	if err := makeSubvolume(dir, "probe"); err != nil {
		return err
	}
	return removeMerged(filepath.Join(dir, "probe"))
}

func (s *Store) merges() bool { return s.storage().Merges() }

// merged is a directory that holds the files of a chain of layers as one file system. Whoever
// has taken it from the pool has it alone; those in the pool may have readers.
type merged struct {
	dir    string  // holds "volume", maybe a subvolume: in it the directory "root" and, for a while, what is to be moved there
	layers []Layer // lowest first
	files  *known  // what lstat says of each file, nothing having run since

	readers int
}

const volume = "volume"

func (m *merged) volume() string { return filepath.Join(m.dir, volume) }

func (m *merged) root() string { return filepath.Join(m.dir, volume, "root") }

func (m *merged) remove() error {
	return errors.Join(removeMerged(m.volume()), removeAll(m.dir))
}

// pool keeps merged directories between steps: the next step of a stage goes on with that of
// the last.
type pool struct {
	mu   sync.Mutex
	idle []*merged // the one used last comes last
}

// maxIdle bounds the directories that wait for another step; a stage that is over does not say so.
const maxIdle = 6

// take returns the directory that holds most of the layers and nothing else, nil if there is
// none. Without keep it leaves the pool, with keep it stays and counts as read: give it back
// with release.
func (p *pool) take(layers []Layer, keep bool) *merged {
	p.mu.Lock()
	defer p.mu.Unlock()
	best := -1
	for i, m := range p.idle {
		if len(m.layers) > len(layers) || !slices.Equal(m.layers, layers[:len(m.layers)]) || !keep && m.readers > 0 {
			continue
		}
		if best < 0 || len(m.layers) >= len(p.idle[best].layers) {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	m := p.idle[best]
	if keep {
		m.readers++
		return m
	}
	p.idle = slices.Delete(p.idle, best, best+1)
	return m
}

// read returns the directory that holds exactly these layers, counted as read.
func (p *pool) read(layers []Layer) *merged {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.idle {
		if slices.Equal(m.layers, layers) {
			m.readers++
			return m
		}
	}
	return nil
}

func (p *pool) release(m *merged) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m.readers--
}

// give puts m into the pool and returns what has to leave it.
func (p *pool) give(m *merged) (out []*merged) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle = append(p.idle, m)
	for i := 0; len(p.idle) > maxIdle && i < len(p.idle); {
		if p.idle[i].readers > 0 {
			i++
			continue
		}
		out = append(out, p.idle[i])
		p.idle = slices.Delete(p.idle, i, i+1)
	}
	return out
}

func (s *Store) giveBack(m *merged) error {
	var errs []error
	for _, old := range s.pool.give(m) {
		errs = append(errs, old.remove())
	}
	return errors.Join(errs...)
}

// Prepare makes ready what Overlay of the same layers needs, lest their files are unpacked
// one by one meanwhile, and returns a View of what it will show. The lowest layers, as many as
// base, are those of an image that others build on as well: if they are many, Overlay and that
// View do with fewer that show the same.
func (s *Store) Prepare(ctx context.Context, layers []Layer, base int) (*View, Inspection, error) {
	if s.merges() {
		m, err := s.merge(ctx, layers)
		if err == nil {
			err = s.giveBack(m)
		}
		if err != nil {
			return nil, Inspection{}, fmt.Errorf("merge layers: %w", err)
		}
		view, err := s.View(ctx, layers)
		return view, Inspection{}, err
	}
	if err := s.shorten(ctx, layers[:base]); err != nil {
		return nil, Inspection{}, err
	}
	layers = s.fewer(layers)
	_, inspection, err := s.trees(ctx, layers) // before View, which would read blobs for their indexes alone
	if err != nil {
		return nil, Inspection{}, err
	}
	view, err := s.View(ctx, layers)
	return view, inspection, err
}

// merge returns a directory of all the layers for the caller alone, who gives it back or removes it.
func (s *Store) merge(ctx context.Context, layers []Layer) (*merged, error) {
	m, err := s.begin(layers)
	if err != nil {
		return nil, err
	}
	if err := s.extend(ctx, m, layers[len(m.layers):]); err != nil {
		return nil, errors.Join(err, m.remove())
	}
	return m, nil
}

// begin returns a directory with the first of the layers, or none.
func (s *Store) begin(layers []Layer) (*merged, error) {
	if s.storage() == StorageVFS {
		if m := s.pool.take(layers, false); m != nil {
			return m, nil
		}
	}
	dir, err := s.Temp("merged-")
	if err != nil {
		return nil, err
	}
	m := &merged{dir: dir}
	if err := s.makeVolume(m, layers); err != nil {
		return nil, errors.Join(err, m.remove())
	}
	return m, nil
}

func (s *Store) makeVolume(m *merged, layers []Layer) error {
	var err error
	if s.storage() == StorageVFS {
		err = os.Mkdir(m.volume(), 0o755)
	} else if old := s.pool.take(layers, true); old != nil {
		m.layers, m.files = slices.Clone(old.layers), old.files.clone()
		defer s.pool.release(old)
		return snapshotSubvolume(old.volume(), m.dir, volume)
	} else {
		err = makeSubvolume(m.dir, volume)
	}
	if err != nil {
		return err
	}
	return os.Mkdir(m.root(), 0o755)
}

// mergedOverlay is Overlay where nothing can be mounted: Root instead of Lower, Upper and Work.
func (s *Store) mergedOverlay(ctx context.Context, layers []Layer, points []MountPoint) (*Overlay, error) {
	view, err := s.View(ctx, layers)
	if err != nil {
		return nil, err
	}
	m, err := s.merge(ctx, layers)
	if err != nil {
		return nil, fmt.Errorf("merge layers: %w", err)
	}
	o := &Overlay{Root: m.root(), dir: m.dir, view: view, stubs: map[string]Entry{}, merged: m}
	plan := stubPlan{view: view, dirs: map[string]Entry{}, new: o.stubs}
	for _, p := range points {
		if err := plan.mountPoint(p); err != nil {
			return nil, errors.Join(fmt.Errorf("make overlay: %w", err), o.Close())
		}
	}
	if err := o.putStubs(); err != nil {
		return nil, errors.Join(fmt.Errorf("make mount points: %w", err), o.Close())
	}
	if err := m.tick(); err != nil {
		return nil, errors.Join(err, o.Close())
	}
	return o, nil
}

// closeMerged throws away what a process left in the directory, unless it became a layer.
func (o *Overlay) closeMerged() error {
	m := o.merged
	if m == nil {
		return nil
	}
	o.merged = nil
	if err := m.remove(); err != nil {
		return fmt.Errorf("remove overlay: %w", err)
	}
	return nil
}

// openMerged opens a regular file where the layers of v are merged, nil if they are nowhere or
// the layer's own tree is there. No step runs in the directory until release is called.
func (v *View) openMerged(e *Entry, layer int) (f *os.File, release func()) {
	s := v.store
	if !s.merges() || s.hasTree(v.layers[layer]) {
		return nil, nil
	}
	layers := slices.Clone(v.layers)
	slices.Reverse(layers)
	m := s.pool.read(layers)
	if m == nil {
		return nil, nil
	}
	f, err := openIn(m.root(), e)
	if err != nil {
		s.pool.release(m)
		return nil, nil
	}
	return f, func() { s.pool.release(m) }
}

// openIn opens the regular file of e in an unpacked directory.
func openIn(dir string, e *Entry) (*os.File, error) {
	root, err := rootfs.Open(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.OpenFile(e.Path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() != e.Size {
		return nil, errors.Join(err, f.Close(), errors.New("the unpacked layer does not match its index"))
	}
	return f, nil
}
