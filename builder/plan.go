package builder

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"

	"filo/layer"
	"filo/layer/rootfs"
)

// plan is a root filesystem with changes on it that are not made yet: copies are planned on it one after the other,
// then emitted as the entries of one layer. Paths are those of io/fs.
type plan struct {
	below   *layer.View // what is there before; nil is nothing
	nodes   map[string]*node
	created int64 // mtime of what is made
}

// node is a path that was changed or looked into.
type node struct {
	layer.Entry
	open   func() (io.ReadCloser, error) // of a regular file
	inode  string                        // equal for hard links of each other
	opaque bool                          // a directory that hides what is below it
}

func newPlan(below *layer.View, created int64) *plan {
	return &plan{below: below, nodes: map[string]*node{}, created: created}
}

// lstat returns what is at p, which holds no link but perhaps the last one.
func (p *plan) lstat(name string) (layer.Entry, bool) {
	if n, ok := p.nodes[name]; ok {
		return n.Entry, n.Type != layer.Whiteout
	}
	for dir := path.Dir(name); name != "."; dir = path.Dir(dir) {
		if n, ok := p.nodes[dir]; ok && (n.Type != layer.Dir || n.opaque) {
			return layer.Entry{}, false
		}
		if dir == "." {
			break
		}
	}
	if p.below == nil {
		return layer.Entry{Path: ".", Type: layer.Dir, Mode: 0o755}, name == "."
	}
	e, ok := p.below.Entry(name)
	if !ok {
		return layer.Entry{}, false
	}
	return *e, true
}

// resolve follows all links of name, as if the directory root were the root.
func (p *plan) resolve(root, name string) (string, error) {
	name, err := rootfs.Resolve(name, true, func(name string) (string, bool, error) {
		e, ok := p.lstat(path.Join(root, name))
		return e.Link, ok && e.Type == layer.Symlink, nil
	})
	return path.Join(root, name), err
}

// put makes n what is at its path. Its parent must be a directory.
func (p *plan) put(n node) {
	old, exists := p.lstat(n.Path)
	if n.Type != layer.Dir {
		if exists && old.Type == layer.Dir { // else nothing is below it, and to look through all nodes for each file takes long
			p.drop(n.Path)
		}
	} else if before, ok := p.nodes[n.Path]; ok && before.Type == layer.Dir {
		n.opaque = before.opaque
	} else if ok && before.Type == layer.Whiteout || exists && old.Type != layer.Dir {
		n.opaque = true
	}
	p.nodes[n.Path] = &n
}

// remove takes away what is at name and all below it.
func (p *plan) remove(name string) {
	p.drop(name)
	p.nodes[name] = &node{Entry: layer.Entry{Path: name, Type: layer.Whiteout}}
}

// drop forgets what was planned below name.
func (p *plan) drop(name string) {
	prefix := name + "/"
	maps.DeleteFunc(p.nodes, func(k string, _ *node) bool { return strings.HasPrefix(k, prefix) })
}

// owner is a user and group ID.
type owner struct{ uid, gid int }

// mkdirAll makes the directory name, links resolved, and its missing parents with mode and o.
func (p *plan) mkdirAll(name string, mode uint32, o owner) error {
	e, ok := p.lstat(name)
	if ok && e.Type == layer.Dir {
		return nil
	}
	if ok {
		return &fs.PathError{Op: "mkdir", Path: "/" + name, Err: syscall.ENOTDIR}
	}
	if err := p.mkdirAll(path.Dir(name), mode, o); err != nil {
		return err
	}
	p.put(node{Entry: layer.Entry{Path: name, Type: layer.Dir, Mode: mode, UID: o.uid, GID: o.gid, ModTime: p.created}})
	return nil
}

// attributes is what --chown and --chmod say.
type attributes struct {
	chown *owner                               // nil keeps a file's owner; what is made belongs to 0:0
	chmod func(mode uint32, isDir bool) uint32 // nil keeps a file's mode
	octal *uint32                              // --chmod as a number: directories made on the way get it too
}

func (a attributes) made() (uint32, owner) {
	mode, o := uint32(0o755), owner{}
	if a.octal != nil {
		mode = *a.octal & 0o777
	}
	if a.chown != nil {
		o = *a.chown
	}
	return mode, o
}

func (a attributes) apply(e *layer.Entry) {
	if a.chown != nil {
		e.UID, e.GID = a.chown.uid, a.chown.gid
	}
	if a.chmod != nil && e.Type != layer.Symlink {
		e.Mode = a.chmod(e.Mode, e.Type == layer.Dir)
	}
}

// copy copies src to dest by the rules of COPY: dest ends in a slash if it must be a directory; links in it are
// followed; a file goes into an existing directory; of a directory the contents are copied into dest.
func (p *plan) copy(src *picked, dest string, a attributes) error {
	mode, o := a.made()
	ensure := dest
	if dir, last := path.Split(dest); last != "" && last != "." {
		ensure = dir
	}
	dir, err := p.resolve(".", ensure)
	if err != nil {
		return err
	}
	if err := p.mkdirAll(dir, mode, o); err != nil {
		return err
	}
	dst, err := p.resolve(".", path.Clean(dest))
	if err != nil {
		return err
	}
	e, exists := p.lstat(dst)
	if !src.isDir() && exists && e.Type == layer.Dir || src.isDir() && !src.contents && exists {
		dst = path.Join(dst, src.name)
		if src.name == "/" {
			dst = path.Clean(dst)
		}
	}
	target := path.Dir(dst)
	if src.isDir() && src.contents && !exists {
		target = dst
	}
	if err := p.mkdirAll(target, mode, o); err != nil {
		return err
	}
	for f := range src.files {
		if err := p.copyFile(src, f, dst, a); err != nil {
			return err
		}
	}
	return nil
}

// copyFile copies the file f of src below dst.
func (p *plan) copyFile(src *picked, f *file, dst string, a attributes) error {
	n := node{Entry: f.Entry}
	n.Path = path.Join(dst, f.Path)
	old, exists := p.lstat(n.Path)
	if n.Type == layer.Dir {
		if exists && old.Type != layer.Dir {
			return fmt.Errorf("cannot copy to non-directory: /%s", n.Path)
		}
		if exists && f == &src.top { // an existing destination keeps all but its time
			old.ModTime, old.Path = n.ModTime, n.Path
			p.put(node{Entry: old})
			return nil
		}
		if exists && f.held { // nor does one on the way, but for its mode
			old.Mode, old.Path = n.Mode, n.Path
			p.put(node{Entry: old})
			return nil
		}
	} else if exists && old.Type == layer.Dir {
		return fmt.Errorf("cannot replace directory /%s with a file", n.Path)
	}
	a.apply(&n.Entry)
	if src.made {
		n.ModTime = p.created
	}
	if f.inode != "" {
		n.inode = fmt.Sprintf("%p %s", src, f.inode)
	}
	if n.Type == layer.Regular {
		name := path.Join(src.root, f.Path)
		n.open = func() (io.ReadCloser, error) { return src.open(name) }
	}
	p.put(n)
	return nil
}

// entries returns what the plan changes, in canonical order: with every entry the directories above it.
func (p *plan) entries() []*node {
	wanted := map[string]*node{}
	for name, n := range p.nodes {
		if n.opaque {
			p.hide(name, wanted)
		}
		if !p.changed(n) {
			continue
		}
		wanted[name] = n
		for dir := path.Dir(name); ; dir = path.Dir(dir) {
			if _, ok := wanted[dir]; ok || name == "." {
				break
			}
			if e, ok := p.lstat(dir); ok && !(dir == "." && e.Path != dir) {
				e.Path = dir
				wanted[dir] = &node{Entry: e}
			}
			if dir == "." {
				break
			}
		}
	}
	if n, ok := p.nodes["."]; !ok || !p.changed(n) {
		delete(wanted, ".") // the root is a parent of everything and repeated only if it changed
	}
	return link(slices.SortedFunc(maps.Values(wanted), func(a, b *node) int { return layer.ComparePaths(a.Path, b.Path) }))
}

// hide adds whiteouts for what is below the directory name and not planned anew.
func (p *plan) hide(name string, wanted map[string]*node) {
	if p.below == nil {
		return
	}
	children, err := p.below.ReadDir(name)
	if err != nil {
		return // nothing there to hide
	}
	for _, c := range children {
		child := path.Join(name, c.Name())
		if _, ok := p.nodes[child]; !ok {
			wanted[child] = &node{Entry: layer.Entry{Path: child, Type: layer.Whiteout}}
		}
	}
}

// changed reports whether n differs from what is below; of a directory another time alone is no difference.
func (p *plan) changed(n *node) bool {
	if p.below == nil {
		return n.Type != layer.Whiteout && n.Path != "." // an empty root's own attributes are nobody's
	}
	old, ok := p.below.Entry(n.Path)
	if n.Type == layer.Whiteout {
		return ok
	}
	return !ok || !n.Entry.Same(*old)
}

// link makes of several names of one file the first a file and the others hard links to it.
func link(nodes []*node) []*node {
	first := map[string]string{}
	for i, n := range nodes {
		if n.inode == "" {
			continue
		}
		to, ok := first[n.inode]
		if !ok {
			first[n.inode] = n.Path
			continue
		}
		l := &node{Entry: n.Entry}
		l.Type, l.Link, l.Digest, l.Size = layer.Hardlink, to, "", 0 // of what other types have the writer makes nothing
		nodes[i] = l
	}
	return nodes
}

// write writes what the plan changes to w.
func (p *plan) write(w *layer.Writer) error {
	return w.AddAll(func(yield func(layer.File) bool) {
		for _, n := range p.entries() {
			if !yield(layer.File{Entry: n.Entry, Open: n.open}) {
				return
			}
		}
	})
}
