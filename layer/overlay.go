package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// MountPoint is a path that must exist in an [Overlay] because something gets mounted there.
type MountPoint struct {
	Path string // absolute or relative to the root; symbolic links are followed inside the root
	Dir  bool   // a directory, else a file
}

// Overlay is what an overlay mount is made of: unpacked layers below a fresh upper directory.
// The caller mounts it, and closes it.
type Overlay struct {
	Lower []string // highest first, never empty
	Upper string
	Work  string
	Root  string // with other storage than overlay, instead of all these: a directory with the files of all layers, to be changed in place
	Gone  func() // set by who mounts it: waits until it is not mounted any more

	Trees Inspection // of Lower

	dir    string
	kept   bool // the upper became a layer
	view   *View
	stubs  map[string]Entry // what the top lower has that no layer has
	merged *merged          // of which Root is; nil after Snapshot
}

// Overlay unpacks the layers, lowest first, that are not unpacked yet, side by side, and
// makes an upper directory for them. It does not wait until those that are unpacked have been
// inspected. Mount points that the layers lack are put in an extra
// top lower directory, so that they never show up in the upper. No layers are fine.
func (s *Store) Overlay(ctx context.Context, layers []Layer, points []MountPoint) (*Overlay, error) {
	if s.merges() {
		return s.mergedOverlay(ctx, layers, points)
	}
	layers = s.fewer(layers)
	trees, inspection, err := s.trees(ctx, layers)
	if err != nil {
		return nil, err
	}
	view, err := s.View(ctx, layers)
	if err != nil {
		return nil, err
	}
	dir, err := s.Temp("overlay-")
	if err != nil {
		return nil, err
	}
	o := &Overlay{
		Lower: trees, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), Trees: inspection,
		dir: dir, view: view, stubs: map[string]Entry{},
	}
	if err := s.fill(o, points); err != nil {
		return nil, errors.Join(fmt.Errorf("make overlay: %w", err), o.Close())
	}
	return o, nil
}

// Close throws the upper directory away, unless it became a layer. That may go on after it returns, until the store is
// closed. It may be called again.
//
// Of an upper that became a layer a few empty directories are left. They go with the store: ext4 does not use an inode
// again soon after it was freed, but looks at it each time it needs one, which made half of what a short step writes.
func (o *Overlay) Close() error {
	if o.Root != "" {
		return o.closeMerged()
	}
	if !o.kept {
		o.view.store.discard(o.dir)
	}
	return nil
}

// trees returns the directories of the unpacked layers, highest first.
func (s *Store) trees(ctx context.Context, layers []Layer) ([]string, Inspection, error) {
	trees := make([]string, len(layers))
	found := make([]*comparison, len(layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, l := range layers {
		trees[len(layers)-1-i] = s.treePath(l)
		if s.comparison(l) == wholeTree { // as most are but in the first step
			continue
		}
		g.Go(func() error {
			if found[i] = s.inspect(l); found[i] != nil && !found[i].failed() {
				return nil
			}
			found[i] = nil
			_, err := s.Tree(ctx, l)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, Inspection{}, err
	}
	return once(trees), newInspection(layers, found), nil
}

// once keeps the first of equal trees. The kernel refuses to mount one twice (ELOOP), and
// a layer repeated higher up, as empty ones are, leaves nothing of the lower one to see.
func once(trees []string) []string {
	seen := map[string]bool{}
	return slices.DeleteFunc(trees, func(tree string) bool {
		again := seen[tree]
		seen[tree] = true
		return again
	})
}

// fill makes what Overlay promises below o.dir.
func (s *Store) fill(o *Overlay, points []MountPoint) error {
	plan := stubPlan{view: o.view, dirs: map[string]Entry{}, new: o.stubs}
	for _, p := range points {
		if err := plan.mountPoint(p); err != nil {
			return err
		}
	}
	plan.impliedDirs()
	if len(plan.dirs) > 0 || len(o.Lower) == 0 {
		stub, err := s.stub(&plan)
		if err != nil {
			return err
		}
		o.Lower = slices.Insert(o.Lower, 0, stub)
	}
	root, err := rootfs.Open(o.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range []string{"upper", "work"} {
		if err := root.Mkdir(name, 0o755); err != nil {
			return err
		}
	}
	return dress(root, "upper", plan.root(), s.single)
}

// stub returns the directory of what plan has to hold, the same one for all overlays with the same plan, which those
// of one stage mostly have.
func (s *Store) stub(plan *stubPlan) (string, error) {
	key := plan.String()
	s.mu.Lock()
	dir, ok := s.stubs[key]
	s.mu.Unlock()
	if ok {
		return dir, nil
	}
	dir, err := s.Temp("stub-")
	if err != nil {
		return "", err
	}
	root, err := rootfs.Open(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	if err := plan.write(root, s.single); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stubs[key] = dir
	return dir, nil
}

// stubPlan collects what the stub lower has to hold.
type stubPlan struct {
	view *View
	dirs map[string]Entry // all of it by path, parents included, but for the root
	new  map[string]Entry // those that no layer has
}

// mountPoint adds p and the directories it needs, unless the layers have it.
func (s *stubPlan) mountPoint(p MountPoint) error {
	name, err := s.view.Resolve(p.Path, true)
	if err != nil {
		return err
	}
	if _, _, ok := s.view.lookup(name); ok {
		return nil
	}
	if _, ok := s.new[name]; ok {
		return nil
	}
	if err := s.parents(name, p.Path); err != nil {
		return err
	}
	e := Entry{Path: name, Type: Dir, Mode: 0o755}
	if !p.Dir {
		e = Entry{Path: name, Type: Regular, Mode: 0o644, Digest: emptyDigest}
	}
	s.new[name], s.dirs[name] = e, e
	return nil
}

// emptyDigest is the digest of no bytes.
const emptyDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// parents adds the ancestors of name: copies of those that are there, so that the merged
// directory keeps its attributes, and new ones.
func (s *stubPlan) parents(name, asked string) error {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if e, ok := s.dirs[dir]; ok {
			if e.Type != Dir {
				return fmt.Errorf("mount point %s: /%s is a mount point for a file", asked, dir)
			}
			continue
		}
		e, _, ok := s.view.lookup(dir)
		if ok && e.Type != Dir {
			return fmt.Errorf("mount point %s: /%s is no directory", asked, dir)
		}
		if !ok {
			e = Entry{Path: dir, Type: Dir, Mode: 0o755}
			s.new[dir] = e
		}
		s.dirs[dir] = e
	}
	return nil
}

// impliedDirs adds every directory that the highest layer showing it only implies while a
// lower one describes it: its tree, made without knowledge of the others, has other
// attributes than the merged directory must have.
func (s *stubPlan) impliedDirs() {
	for i, x := range s.view.indexes[:max(0, len(s.view.indexes)-1)] {
		for _, dir := range x.impliedDirs() {
			e, in, ok := s.view.lookup(dir)
			if !ok || e.Type != Dir || in <= i || s.shownAbove(dir, i) {
				continue
			}
			if _, known := s.dirs[dir]; known {
				continue
			}
			// Only a mount point inside a file makes this fail, and a directory is none.
			if s.parents(dir, dir) == nil {
				s.dirs[dir] = e
			}
		}
	}
}

// shownAbove says whether a layer above layer i has dir: that one decides then.
func (s *stubPlan) shownAbove(dir string, i int) bool {
	showing := s.view.showing(dir)
	return len(showing) > 0 && showing[0] < i
}

func (s *stubPlan) root() Entry {
	e, _, _ := s.view.lookup(".")
	return e
}

// names are the planned paths in canonical order.
func (s *stubPlan) names() []string { return slices.SortedFunc(maps.Keys(s.dirs), comparePaths) }

// String is the whole plan as text.
func (s *stubPlan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%+v\n", s.root())
	for _, name := range s.names() {
		fmt.Fprintf(&b, "%q %+v\n", name, s.dirs[name])
	}
	return b.String()
}

// write makes the planned files in root.
func (s *stubPlan) write(root *rootfs.Root, single bool) error {
	names := s.names()
	for _, name := range names {
		var err error
		if s.dirs[name].Type == Dir {
			err = root.Mkdir(name, 0o755)
		} else {
			err = root.Mknod(name, unix.S_IFREG|0o644, 0, 0)
		}
		if err != nil {
			return err
		}
	}
	// Children first, for times; the mode of a parent could keep an ordinary user out as well.
	for _, name := range slices.Backward(names) {
		if err := dress(root, name, s.dirs[name], single); err != nil {
			return err
		}
	}
	return dress(root, ".", s.root(), single)
}

// dress gives the file at p the attributes of e.
func dress(root *rootfs.Root, p string, e Entry, single bool) error {
	err := root.Set(p, rootfs.Attr{Owner: &rootfs.Owner{UID: e.UID, GID: e.GID}})
	if err != nil && !(single && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL))) {
		return err
	}
	err = root.Set(p, rootfs.Attr{Xattrs: visibleXattrs(e.Xattrs)})
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !(single && errors.Is(err, unix.EPERM)) {
		return err
	}
	return root.Set(p, rootfs.Attr{Mode: &e.Mode, Time: &rootfs.Time{Sec: e.ModTime}})
}

// overlayXattrs is the prefix of what overlayfs keeps for itself (with userxattr). A layer
// that carries such attributes must not be able to steer the mount.
const overlayXattrs = "user.overlay."

func visibleXattrs(all map[string]string) map[string]string {
	some := maps.Clone(all)
	maps.DeleteFunc(some, func(key, _ string) bool { return strings.HasPrefix(key, overlayXattrs) })
	return some
}

// impliedDirs lists the directories that x names only as parents of others, but the root.
// Writer and unpack make sure there are next to none, so that the walk over all paths is
// the whole cost; it is kept.
func (x *index) impliedDirs() []string {
	x.impliedOnce.Do(func() { x.implied = x.findImplied() })
	return x.implied
}

func (x *index) findImplied() []string {
	var list []string
	open := "." // the directory we are in: every ancestor of it is accounted for
	for i := range x.len() {
		p, t := x.head(i)
		parent := parentOf(p)
		for dir := parent; dir != "." && dir != open && !beneath(open, dir); dir = parentOf(dir) {
			list = append(list, dir)
		}
		if t == Opaque && open != p {
			list = append(list, p) // the marker stands without the directory
		}
		open = parent
		if t == Dir || t == Opaque {
			open = p
		}
	}
	return list
}

// parentOf is path.Dir of a clean path, without cleaning it: this runs for each file of an image.
func parentOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i]
	}
	return "."
}
