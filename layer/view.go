package layer

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// View is the file system that a stack of layers makes, read from their indexes: nothing is
// unpacked or mounted to list it. It implements fs.FS, fs.ReadDirFS and fs.ReadLinkFS.
//
// Names are those of io/fs, but any bytes are allowed in them. No symbolic link is followed,
// in no component: what a caller wants followed goes through [View.Resolve]. Open of a link
// gives a file that can be asked for its Stat. FileInfo.Sys is a *[Entry] with the asked
// Path; a hard link shows as the entry it is a name of, see [View.Inode]. The first
// read of a regular file unpacks its layer. A View is safe for concurrent use.
type View struct {
	store *Store
	ctx   context.Context // fs.FS has no room for one; Read may have to unpack a layer
	// layers and indexes are highest first.
	layers  []Layer
	indexes []*index

	mu   sync.Mutex
	dirs map[string][]int // directory to the layers that show in it, highest first
}

// View stacks layers, lowest first. Layers that are only promised are fetched for their
// index. ctx also bounds the reads from files of the View.
func (s *Store) View(ctx context.Context, layers []Layer) (*View, error) {
	v := &View{
		store: s, ctx: ctx,
		layers:  slices.Clone(layers),
		indexes: make([]*index, len(layers)),
		dirs:    map[string][]int{},
	}
	slices.Reverse(v.layers)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, l := range v.layers {
		if v.indexes[i] = s.cachedIndex(l); v.indexes[i] != nil {
			continue
		}
		g.Go(func() (err error) {
			v.indexes[i], err = s.index(ctx, l)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("view layers: %w", err)
	}
	return v, nil
}

// parallel is how many layers are fetched or unpacked side by side.
const parallel = 8

// Open implements fs.FS.
func (v *View) Open(name string) (fs.File, error) {
	e, i, err := v.stat("open", name)
	if err != nil {
		return nil, err
	}
	if e.Type == Dir {
		return &viewDir{info: fileInfo{e}, view: v}, nil
	}
	return &viewFile{info: fileInfo{e}, view: v, layer: i}, nil
}

// Lstat implements fs.ReadLinkFS.
func (v *View) Lstat(name string) (fs.FileInfo, error) {
	e, _, err := v.stat("lstat", name)
	if err != nil {
		return nil, err
	}
	return fileInfo{e}, nil
}

// ReadLink implements fs.ReadLinkFS.
func (v *View) ReadLink(name string) (string, error) {
	e, _, err := v.stat("readlink", name)
	if err != nil {
		return "", err
	}
	if e.Type != Symlink {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return e.Link, nil
}

// ReadDir implements fs.ReadDirFS.
func (v *View) ReadDir(name string) ([]fs.DirEntry, error) {
	e, _, err := v.stat("readdir", name)
	if err != nil {
		return nil, err
	}
	if e.Type != Dir {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: unix.ENOTDIR}
	}
	entries := v.children(name)
	list := make([]fs.DirEntry, len(entries))
	for i, e := range entries {
		list[i] = fs.FileInfoToDirEntry(fileInfo{e})
	}
	return list, nil
}

// Entry returns what is at name, as FileInfo.Sys would.
func (v *View) Entry(name string) (*Entry, bool) {
	e, _, err := v.stat("lstat", name)
	return e, err == nil
}

// Inode returns a text that two names share if and only if they are hard links of one file;
// "" if there is nothing at name.
func (v *View) Inode(name string) string {
	e, i, ok := v.lookup(name)
	if !ok {
		return ""
	}
	if i < 0 {
		return "/" + name
	}
	if e.Type == Hardlink {
		name = e.Link
	}
	return v.layers[i].DiffID.String() + "/" + name
}

// Resolve follows the symbolic links in name inside the view, see [rootfs.Resolve].
func (v *View) Resolve(name string, follow bool) (string, error) {
	return rootfs.Resolve(name, follow, func(name string) (string, bool, error) {
		e, i, ok := v.lookup(name)
		if ok {
			e, ok = v.inode(e, i)
		}
		return e.Link, ok && e.Type == Symlink, nil
	})
}

// stat is lookup for callers from outside: the name is checked, hard links are resolved,
// and the entry is the caller's.
func (v *View) stat(op, name string) (*Entry, int, error) {
	if !validName(name) {
		return nil, 0, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	e, i, ok := v.lookup(name)
	if ok {
		e, ok = v.inode(e, i)
	}
	if !ok {
		return nil, 0, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
	}
	return &e, i, nil
}

// inode turns a Hardlink of layer i into the entry it is a name of.
func (v *View) inode(e Entry, i int) (Entry, bool) {
	if e.Type != Hardlink {
		return e, true
	}
	file, ok := v.indexes[i].find(e.Link)
	if !ok || !file.linkable() {
		return Entry{}, false
	}
	file.Path = e.Path
	return file, true
}

// lookup finds the entry that shows at name and the layer that has it, -1 for a root that no
// layer describes.
func (v *View) lookup(name string) (Entry, int, bool) {
	if name == "." {
		return v.root()
	}
	var implied Entry
	in := -1
	for _, i := range v.showing(path.Dir(name)) {
		r := v.indexes[i].at(name)
		switch {
		case !r.ok:
			continue
		case r.typ == Whiteout, in >= 0 && r.typ != Dir:
			return implied, in, in >= 0
		case !r.implied:
			e, ok := v.indexes[i].entry(r.record)
			return e, i, ok
		case in < 0: // opaque or not: a marker hides what is inside, not the directory
			implied, in = impliedDir(name), i
		}
	}
	return implied, in, in >= 0
}

func (v *View) root() (Entry, int, bool) {
	for i, x := range v.indexes {
		r := x.at(".")
		if r.ok && r.typ == Dir && !r.implied {
			e, ok := x.entry(r.record)
			return e, i, ok
		}
	}
	return impliedDir("."), -1, true
}

// children lists what shows in the directory dir, hard links resolved, sorted by name.
func (v *View) children(dir string) []*Entry {
	var list []*Entry
	seen := map[string]*Entry{} // nil for what is settled: deleted or complete
	for _, i := range v.showing(dir) {
		for e := range v.indexes[i].children(dir) {
			above, known := seen[e.Path]
			switch {
			case e.Type == Opaque: // of dir itself: showing knows
			case known && above == nil:
			case known: // implied above
				if e.Type == Dir && !e.Implied {
					*above = e
				}
				if e.Type != Dir || !e.Implied {
					seen[e.Path] = nil
				}
			case e.Type == Whiteout:
				seen[e.Path] = nil
			default:
				seen[e.Path] = nil
				if e, ok := v.inode(e, i); ok {
					list = append(list, &e)
					if e.Implied {
						seen[e.Path] = &e
					}
				}
			}
		}
	}
	slices.SortFunc(list, func(a, b *Entry) int { return strings.Compare(a.Path, b.Path) })
	return list
}

// showing returns the layers whose entries directly in dir are not hidden by a higher layer,
// highest first; none if dir is no directory.
func (v *View) showing(dir string) []int {
	v.mu.Lock()
	layers, known := v.dirs[dir]
	v.mu.Unlock()
	if known {
		return layers
	}
	var above []int
	if dir == "." {
		above = make([]int, len(v.indexes))
		for i := range above {
			above[i] = i
		}
	} else {
		above = v.showing(path.Dir(dir))
	}
	for _, i := range above {
		r := v.indexes[i].at(dir)
		if r.ok && r.typ != Dir {
			break
		}
		if r.ok {
			layers = append(layers, i)
		}
		if r.opaque {
			break
		}
	}
	v.mu.Lock()
	v.dirs[dir] = layers
	v.mu.Unlock()
	return layers
}

// record says what one layer has at a path.
type record struct {
	ok      bool
	typ     Type
	implied bool // a directory, because there are records beneath it
	opaque  bool
	record  int // for index.entry, unless implied
}

// at finds path with one search and decodes no more than it must.
func (x *index) at(path string) record {
	i := x.search(path)
	if i >= x.len() {
		return record{}
	}
	p, t := x.head(i)
	if p != path {
		return record{ok: beneath(p, path), typ: Dir, implied: true}
	}
	if t == Opaque {
		return record{ok: true, typ: Dir, implied: true, opaque: true}
	}
	r := record{ok: true, typ: t, record: i}
	if t == Dir && i+1 < x.len() {
		p, t = x.head(i + 1)
		r.opaque = p == path && t == Opaque
	}
	return r
}

func impliedDir(name string) Entry {
	return Entry{Path: name, Type: Dir, Mode: 0o755, Implied: true}
}

// validName is fs.ValidPath without the demand for UTF-8: file systems have no such rule.
func validName(name string) bool {
	if name == "." {
		return true
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." || strings.IndexByte(part, 0) >= 0 {
			return false
		}
	}
	return true
}

type fileInfo struct{ e *Entry }

func (i fileInfo) Name() string       { return path.Base(i.e.Path) }
func (i fileInfo) Mode() fs.FileMode  { return i.e.FileMode() }
func (i fileInfo) ModTime() time.Time { return time.Unix(i.e.ModTime, 0).UTC() }
func (i fileInfo) IsDir() bool        { return i.e.Type == Dir }
func (i fileInfo) Sys() any           { return i.e }
func (i fileInfo) Size() int64 {
	if i.e.Type == Symlink {
		return int64(len(i.e.Link))
	}
	return i.e.Size
}

// FileMode returns type and mode as io/fs writes them.
func (e *Entry) FileMode() fs.FileMode {
	mode := fs.FileMode(e.Mode & 0o777)
	if e.Mode&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if e.Mode&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if e.Mode&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	switch e.Type {
	case Dir:
		return mode | fs.ModeDir
	case Symlink:
		return mode | fs.ModeSymlink
	case Char:
		return mode | fs.ModeDevice | fs.ModeCharDevice
	case Block:
		return mode | fs.ModeDevice
	case Fifo:
		return mode | fs.ModeNamedPipe
	case Regular, Hardlink:
		return mode
	case Whiteout, Opaque:
	}
	return mode | fs.ModeIrregular
}

// viewDir is an open directory of a View.
type viewDir struct {
	info fileInfo
	view *View
	list []fs.DirEntry
	read bool
}

func (d *viewDir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *viewDir) Close() error               { return nil }
func (d *viewDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.info.e.Path, Err: unix.EISDIR}
}

// ReadDir implements fs.ReadDirFile.
func (d *viewDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !d.read {
		list, err := d.view.ReadDir(d.info.e.Path)
		if err != nil {
			return nil, err
		}
		d.list, d.read = list, true
	}
	if n <= 0 {
		n = len(d.list)
	} else if len(d.list) == 0 {
		return nil, io.EOF
	}
	n = min(n, len(d.list))
	list := d.list[:n:n]
	d.list = d.list[n:]
	return list, nil
}

// viewFile is an open file of a View. What has to be unpacked to read it is unpacked by the
// first read: most files are only opened to be asked for their attributes.
type viewFile struct {
	info    fileInfo
	view    *View
	layer   int
	file    *os.File
	release func() // of the merged directory it is in; nil for a tree
	closed  bool
}

func (f *viewFile) Stat() (fs.FileInfo, error) {
	if f.closed {
		return nil, f.error("stat", fs.ErrClosed)
	}
	return f.info, nil
}

func (f *viewFile) Read(b []byte) (int, error) {
	if err := f.open(); err != nil {
		return 0, err
	}
	return f.file.Read(b)
}

// ReadAt implements io.ReaderAt.
func (f *viewFile) ReadAt(b []byte, off int64) (int, error) {
	if err := f.open(); err != nil {
		return 0, err
	}
	return f.file.ReadAt(b, off)
}

// Seek implements io.Seeker.
func (f *viewFile) Seek(offset int64, whence int) (int64, error) {
	if err := f.open(); err != nil {
		return 0, err
	}
	return f.file.Seek(offset, whence)
}

// WriteTo implements io.WriterTo: it lets the kernel copy between files.
func (f *viewFile) WriteTo(w io.Writer) (int64, error) {
	if err := f.open(); err != nil {
		return 0, err
	}
	return f.file.WriteTo(w)
}

func (f *viewFile) Close() error {
	if f.closed {
		return f.error("close", fs.ErrClosed)
	}
	f.closed = true
	if f.file == nil {
		return nil
	}
	if f.release != nil {
		f.release()
	}
	return f.file.Close()
}

func (f *viewFile) open() error {
	switch {
	case f.closed:
		return f.error("read", fs.ErrClosed)
	case f.file != nil:
		return nil
	case f.info.e.Type != Regular:
		return f.error("read", fs.ErrInvalid)
	}
	if f.file, f.release = f.view.openMerged(f.info.e, f.layer); f.file != nil {
		return nil
	}
	tree, err := f.view.store.Tree(f.view.ctx, f.view.layers[f.layer])
	if err != nil {
		return f.error("read", err)
	}
	// The tree of an image's layer is ours, but whoever owns the disk can change it.
	if f.file, err = openIn(tree, f.info.e); err != nil {
		return f.error("read", err)
	}
	return nil
}

func (f *viewFile) error(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.info.e.Path, Err: err}
}
