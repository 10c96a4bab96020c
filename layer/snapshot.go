package layer

import (
	"context"
	"fmt"
	"io"
	"iter"
	"path"
	"slices"
	"strings"

	"filo/layer/rootfs"
)

// Snapshot makes a layer of what the upper directory of o holds; the directory becomes the
// layer's tree. No process may see the overlay any more; it may be mounted until o.Gone returns, which is called before
// anything is changed. It can only be closed afterwards.
//
// The layer is the difference of two merged file systems: copied-up files that are as they
// were are left out, so are directories of which only the mtime changed, sockets, whiteouts
// of what no layer has, and mount points. Deletions are explicit, one whiteout for each
// topmost path that is gone. The directories that lead to an entry are entries themselves.
// Files that are hard links of each other stay so.
func (s *Store) Snapshot(ctx context.Context, o *Overlay, sinks Sinks) (Layer, error) {
	if o.Root != "" {
		o.gone()
		return s.snapshotMerged(ctx, o, sinks)
	}
	root, err := rootfs.Open(o.Upper)
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	defer root.Close()
	w := &walker{ctx: ctx, root: root, lower: o.entry, below: o, single: s.single}
	top, err := w.walk()
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	linkUp(top)
	expand(top, o.view)
	mark(top)
	l, err := s.record(w, top, o, sinks)
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	o.kept = true
	return l, nil
}

func (o *Overlay) gone() {
	if o.Gone != nil {
		o.Gone()
	}
}

// entry is what the lower directories show at p.
func (o *Overlay) entry(p string) (*Entry, bool) {
	if e, ok := o.view.Entry(p); ok {
		return e, true
	}
	e, ok := o.stubs[p]
	return &e, ok
}

// isStub says whether what the lower directories show at p is in no layer.
func (o *Overlay) isStub(p string) bool {
	_, ok := o.stubs[p]
	return ok
}

// nsec is the fraction of the mtime of the lower file at p.
func (o *Overlay) nsec(p string) (int64, bool) {
	if o.merged != nil {
		return o.merged.nsec(p)
	}
	_, i, ok := o.view.lookup(p)
	if !ok || i < 0 {
		return 0, false
	}
	root, err := rootfs.Open(o.view.store.treePath(o.view.layers[i]))
	if err != nil {
		return 0, false
	}
	defer root.Close()
	st, err := root.Lstat(p)
	return st.Nsec, err == nil
}

// linkUp makes names of one file that changed hard links of the first of them. Names that did not change are not in the
// layer, so nothing can be linked to them.
func linkUp(top *node) {
	first := map[[2]uint64]*node{}
	top.each(func(n *node) {
		if n.hasNames() {
			n.linkTo(first)
		}
	})
}

// hasNames says whether n changed and is a file with several names. Whiteouts are not: an overlay makes one file do for many.
func (n *node) hasNames() bool { return n.links > 1 && n.verdict == changed && n.linkable() }

// linkTo makes n a hard link of the first node of the same file, or notes that n is the first.
func (n *node) linkTo(first map[[2]uint64]*node) {
	f, ok := first[n.inode]
	if !ok {
		first[n.inode] = n
		return
	}
	n.Type, n.Link = Hardlink, f.Path
	n.Entry = ownFields(n.Entry)
}

// expand says in single deletions what opaque directories hide.
func expand(top *node, view *View) {
	top.each(func(n *node) {
		if n.Type != Dir || !n.opaque {
			return
		}
		for _, e := range view.children(n.Path) {
			i, found := slices.BinarySearchFunc(n.children, e.Path, func(c *node, p string) int {
				return strings.Compare(c.Path, p)
			})
			if !found {
				gone := &node{Entry: Entry{Path: e.Path, Type: Whiteout}}
				n.children = slices.Insert(n.children, i, gone)
			}
		}
	})
}

// mark sets emit for n and everything in it.
func mark(n *node) bool {
	inside := false
	for _, c := range n.children {
		inside = mark(c) || inside
	}
	// The root is there in any case.
	n.emit = n.verdict == changed || inside && n.Path != "."
	return n.emit || inside
}

// each visits n and everything in it in canonical order.
func (n *node) each(visit func(*node)) {
	n.until(func(n *node) bool {
		visit(n)
		return true
	})
}

// until is each that ends when visit returns false, and so does until.
func (n *node) until(visit func(*node) bool) bool {
	if !visit(n) {
		return false
	}
	for _, c := range n.children {
		if !c.until(visit) {
			return false
		}
	}
	return true
}

// record writes the marked nodes as a layer and trims the upper of o to be its tree.
func (s *Store) record(w *walker, top *node, o *Overlay, sinks Sinks) (Layer, error) {
	writer, err := s.createAdopting(w.ctx, sinks, o.Upper)
	if err != nil {
		return Layer{}, err
	}
	if err := writer.AddAll(w.emitted(top)); err != nil {
		writer.Abort()
		return Layer{}, err
	}
	o.gone()
	d, err := w.root.Dir(".")
	if err != nil {
		writer.Abort()
		return Layer{}, err
	}
	defer d.Close()
	t := trimmer{epoch: sinks.Epoch, lower: w.lower}
	if err := t.trim(d, top); err != nil {
		writer.Abort()
		return Layer{}, err
	}
	return writer.Close()
}

// emitted are the entries of the layer, with their content.
func (w *walker) emitted(top *node) iter.Seq[File] {
	return w.some(top, func(n *node) bool { return n.emit })
}

// some are the files that wanted says, in canonical order.
func (w *walker) some(top *node, wanted func(*node) bool) iter.Seq[File] {
	return func(yield func(File) bool) {
		top.until(func(n *node) bool {
			return !wanted(n) || yield(w.fileOf(n))
		})
	}
}

func (w *walker) fileOf(n *node) File {
	return File{Entry: n.Entry, Open: func() (io.ReadCloser, error) { return w.open(n) }, content: n.content}
}

// trimmer makes an upper directory say the same as the layer that was made of it.
type trimmer struct {
	epoch *int64
	lower func(string) (*Entry, bool)
}

// trim goes through the directory n, which is open as d. What is no entry is removed,
// but for files as they were inside an opaque directory: the lower ones do not show there.
func (t trimmer) trim(d *rootfs.Dir, n *node) error {
	touched := false
	for _, c := range n.children {
		if !c.inUpper {
			continue
		}
		name := path.Base(c.Path)
		if c.verdict == void || !c.emit && !n.opaque {
			if err := d.RemoveAll(name); err != nil {
				return err
			}
			touched = true
			continue
		}
		if err := t.child(d, name, c); err != nil {
			return err
		}
	}
	if n.Path == "." {
		return nil
	}
	if !n.emit { // only inside an opaque directory
		if l, ok := t.lower(n.Path); ok {
			return d.Chtimes(".", rootfs.Time{Sec: l.ModTime})
		}
	}
	if touched || t.late(n) {
		return d.Chtimes(".", rootfs.Time{Sec: t.clamp(n.ModTime)})
	}
	return nil
}

func (t trimmer) child(d *rootfs.Dir, name string, c *node) error {
	if c.Type == Dir {
		sub, err := d.Dir(name)
		if err != nil {
			return err
		}
		defer sub.Close()
		return t.trim(sub, c)
	}
	if c.emit && t.late(c) && c.Type != Whiteout {
		return d.Chtimes(name, rootfs.Time{Sec: *t.epoch})
	}
	return nil
}

func (t trimmer) late(n *node) bool { return t.epoch != nil && n.ModTime > *t.epoch }

func (t trimmer) clamp(sec int64) int64 {
	if t.epoch != nil && sec > *t.epoch {
		return *t.epoch
	}
	return sec
}
