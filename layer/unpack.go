package layer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// need is what of a layer is wanted besides its index.
type need struct {
	tree bool
	into string        // where the tree goes instead of into the store; a new directory
	blob digest.Digest // a promised one; "" for none
}

// obtain makes what is missing of l: index, tree, promised blob. It is done
// once, whoever asks in whatever process.
func (s *Store) obtain(ctx context.Context, l Layer, n need) error {
	unlock, err := s.Lock(ctx, "layer "+l.DiffID.String())
	if err != nil {
		return err
	}
	defer unlock()
	x, _ := s.loadIndex(l)
	if x != nil && n.into == "" && s.wantsTree(l, n) && s.adoptTree(ctx, l, x) == nil {
		n.tree = false
	}
	if s.fulfilled(l, n, x) {
		return nil
	}
	dir, err := s.Temp("unpack-")
	if err != nil {
		return err
	}
	defer removeAll(dir)
	err = s.obtainFrom(ctx, l, n, x, dir)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case n.into == "" && !noRoom(err) && s.isLost(l):
		err = fmt.Errorf("%w: %w", ErrLost, err)
	}
	return fmt.Errorf("unpack layer %s: %w", l.DiffID, err)
}

// isLost says whether l can be had from nowhere, now that its trees, which may be others', turned out to be of no use.
func (s *Store) isLost(l Layer) bool {
	s.mu.Lock()
	s.useless[l.DiffID] = true
	s.mu.Unlock()
	return !s.Has(l)
}

// noRoom says whether err is about the disk and not about what is on it.
func noRoom(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS)
}

// wantsTree says whether a tree has to be made for n.
func (s *Store) wantsTree(l Layer, n need) bool {
	return n.tree && (n.into != "" || !s.hasTree(l))
}

func (s *Store) placeTree(l Layer, n need, dir string) error {
	if n.into == "" {
		return s.putTree(l, dir)
	}
	err := os.Rename(dir, n.into)
	if errors.Is(err, fs.ErrPermission) {
		err = moveReadOnly(dir, n.into)
	}
	return err
}

func (s *Store) fulfilled(l Layer, n need, x *index) bool {
	if x == nil || s.wantsTree(l, n) {
		return false
	}
	if n.blob == "" {
		return true
	}
	_, err := os.Lstat(s.blobPath(n.blob))
	return err == nil
}

// obtainFrom tries stored blobs, promised ones, an untrusted tree and those of
// others, in this order.
func (s *Store) obtainFrom(ctx context.Context, l Layer, n need, x *index, dir string) error {
	own := s.treePath(l)
	if n.into == "" && s.wantsTree(l, n) {
		own = s.dropTree(l, dir)
	}
	var failed error
	for _, o := range s.origins(l, n) {
		err := s.obtainBlob(ctx, l, n, o, filepath.Join(dir, "new"))
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		failed = errors.Join(failed, err)
		removeAll(filepath.Join(dir, "new"))
	}
	var trees []string
	if n.blob == "" && n.into == "" {
		trees = s.treesOf(l, own)
	}
	for _, tree := range trees {
		if err := s.obtainFromTree(ctx, l, x, tree); err == nil {
			return nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	if failed == nil {
		failed = errNotHere
	}
	return failed
}

// obtainFromTree makes from a tree, one that can't be trusted or used here, and
// the index a tree again; or the index, if that is damaged, from the tree.
func (s *Store) obtainFromTree(ctx context.Context, l Layer, x *index, tree string) error {
	if x != nil {
		return s.rebuild(ctx, l, Sinks{Tree: true}, x, tree)
	}
	return s.reindex(ctx, l, tree)
}

// origin is a blob to unpack l from.
type origin struct {
	promise
	stored bool
}

func (s *Store) origins(l Layer, n need) []origin {
	var list []origin
	if n.blob == "" {
		for _, b := range s.storedBlobs(l) {
			list = append(list, origin{promise{b.Descriptor, s.openIt(b.Descriptor.Digest)}, true})
		}
	}
	for _, p := range s.promisesOf(l) {
		if n.blob != "" && n.blob != p.desc.Digest {
			continue
		}
		if s.hasBlob(p.desc) { // whatever list of it was lost
			list = append(list, origin{promise{p.desc, s.openIt(p.desc.Digest)}, true})
		}
		list = append(list, origin{p, false})
	}
	return list
}

// openIt returns what opens a stored blob.
func (s *Store) openIt(d digest.Digest) func(context.Context) (io.ReadCloser, error) {
	return func(ctx context.Context) (io.ReadCloser, error) {
		r, _, err := s.openStored(ctx, d)
		return r, err
	}
}

// obtainBlob reads one blob once: on the way it is stored, decompressed,
// verified, indexed and, if asked for, unpacked. dir does not exist yet.
func (s *Store) obtainBlob(ctx context.Context, l Layer, n need, o origin, dir string) (err error) {
	if err := checkDigest(o.desc.Digest); err != nil {
		return err
	}
	if _, err := algorithmOf(o.desc); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	u := &unpacking{ctx: ctx, desc: o.desc, diff: sha256.New()}
	if !o.stored && s.pulling != nil {
		var done func(error)
		u.moved, done = s.pulling(o.desc)
		defer func() { done(err) }()
	}
	body, err := o.fetch(ctx)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if !o.stored {
		if u.blob, err = os.Create(filepath.Join(dir, "blob")); err != nil {
			return err
		}
		defer u.blob.Close()
		u.parity = &parity{}
	}
	if s.wantsTree(l, n) {
		if u.tree, err = s.newTree(filepath.Join(dir, "tree")); err != nil {
			return err
		}
		defer u.tree.close()
	}
	if err := u.read(body); err != nil {
		return err
	}
	if sum := digest.NewDigest(digest.SHA256, u.diff); sum != l.DiffID {
		return fmt.Errorf("blob %s: holds the layer %s", o.desc.Digest, sum)
	}
	if err := u.checkTwin(); err != nil {
		return err
	}
	return s.putUnpacked(ctx, l, n, u, dir)
}

func (s *Store) putUnpacked(ctx context.Context, l Layer, n need, u *unpacking, dir string) error {
	if u.tree != nil {
		if err := u.tree.finish(u.index); err != nil {
			return err
		}
		if err := s.placeTree(l, n, filepath.Join(dir, "tree")); err != nil {
			return err
		}
	}
	if u.algorithm == Gzip && isEStargz(u.desc) {
		u.algorithm = EStargz
	}
	b := storedBlob{Algorithm: u.algorithm, Descriptor: ociDescriptor(u.desc, u.algorithm)}
	err := error(nil)
	if u.blob == nil {
		err = s.noteBlob(ctx, l, b)
	} else if err = errors.Join(u.blob.Chmod(0o644), u.blob.Close()); err == nil {
		err = errors.Join(s.putLayerBlob(ctx, l, u.blob.Name(), b), s.putParity(b.Descriptor.Digest, u.parity))
	}
	if err != nil {
		return err
	}
	return s.putIndex(l, u.index)
}

// unpacking is the one pass over a blob.
type unpacking struct {
	ctx       context.Context
	desc      ocispec.Descriptor
	moved     func(int) // told of bytes that come; nil for none
	blob      *os.File  // copy of the compressed bytes, nil for none
	parity    *parity   // of them
	tree      *tree     // nil for none
	diff      hash.Hash
	algorithm string
	index     *index
}

func (u *unpacking) read(body io.Reader) error {
	var in io.Reader = newVerifier(u.ctx, body, u.desc.Digest, u.desc.Size)
	if u.moved != nil {
		in = watched{in, u.moved}
	}
	if u.blob != nil {
		in = io.TeeReader(in, io.MultiWriter(u.blob, u.parity))
	}
	err := u.readTar(payload(in, u.desc))
	if err != nil && u.ctx.Err() != nil {
		return context.Cause(u.ctx)
	}
	// The rest counts for the digest; and if that does not match it is the
	// better explanation of any other error.
	if _, end := io.Copy(io.Discard, in); errors.Is(end, errMismatch) || err == nil {
		return end
	}
	return err
}

func (u *unpacking) readTar(in io.Reader) error {
	src, algorithm, err := decompressor(in)
	if err != nil {
		return err
	}
	u.algorithm = algorithm
	all := io.TeeReader(src, u.diff)
	f := newForeign(u.ctx, u.tree)
	err = f.read(tar.NewReader(all))
	if err == nil {
		u.index, err = f.index()
	}
	if err == nil {
		_, err = io.CopyBuffer(io.Discard, onlyReader{all}, make([]byte, copyBuffer))
	}
	src.Close()
	return err
}

// checkTwin reads a fetched blob of which images name another layer than ours once more, with what follows the layer: it is
// noted for that one as well, see [Store.noteTwin].
func (u *unpacking) checkTwin() error {
	twin := u.desc.Annotations[AnnotationDiffID]
	if u.blob == nil || twin == "" || !isEStargz(u.desc) {
		return nil
	}
	if _, err := u.blob.Seek(0, io.SeekStart); err != nil {
		return err
	}
	src, _, err := decompressor(newVerifier(u.ctx, u.blob, u.desc.Digest, u.desc.Size))
	if err != nil {
		return err
	}
	defer src.Close()
	all := sha256.New()
	if _, err := io.CopyBuffer(all, onlyReader{src}, make([]byte, copyBuffer)); err != nil {
		return err
	}
	if sum := digest.NewDigest(digest.SHA256, all); sum.String() != twin {
		return fmt.Errorf("blob %s: unpacks to %s, not %s", u.desc.Digest, sum, twin)
	}
	return nil
}

// watched tells of each read.
type watched struct {
	io.Reader
	moved func(n int)
}

func (w watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	w.moved(n)
	return n, err
}

// onlyReader hides other methods, so that io.CopyBuffer uses its buffer.
type onlyReader struct{ io.Reader }

// foreign collects the entries of a tar that somebody else wrote, in any
// order, as an extraction in the tar's order would leave them.
type foreign struct {
	ctx  context.Context
	tree *tree // nil if nothing is to be written
	root *tarNode
	hash hash.Hash
	buf  []byte

	linked map[*Entry]string // entries with several names, and where index listed them first
}

// tarNode is a path of the layer. One without entry is an implied directory,
// or stands for a whiteout alone.
type tarNode struct {
	children map[string]*tarNode
	entry    *Entry // names that are hard links of each other share one
	whiteout bool   // the path in the layers below is deleted
	opaque   bool
}

func (n *tarNode) isDir() bool {
	if n.entry != nil {
		return n.entry.Type == Dir
	}
	return len(n.children) > 0 || n.opaque
}

func newForeign(ctx context.Context, t *tree) *foreign {
	return &foreign{ctx: ctx, tree: t, root: &tarNode{}, hash: sha256.New(), linked: map[*Entry]string{}}
}

func (f *foreign) read(r *tar.Reader) error {
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return err
		}
		if f.ctx.Err() != nil {
			return context.Cause(f.ctx)
		}
		if err := f.add(h, r); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
}

func (f *foreign) add(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	dir, base := path.Dir(name), path.Base(name)
	switch mark, rest := cutMark(name); {
	case mark == "":
	case strings.HasPrefix(mark, whiteoutPrefix+whiteoutPrefix) && mark != opaqueMarker:
		return nil // aufs, where these names come from, has more marks; they mean nothing here
	case rest != "":
		return errors.New("name is inside a whiteout")
	default:
		return f.addWhiteout(dir, base)
	}
	e, err := entryOf(h)
	if err != nil {
		return err
	}
	parent, where, err := f.directory(dir)
	if err != nil {
		return err
	}
	e.Path = path.Join(where, base)
	if e.Type == Hardlink {
		return f.addLink(parent, base, e)
	}
	if name == "." {
		if e.Type != Dir {
			return errors.New("the root is not a directory")
		}
		f.root.entry = &e
		return nil
	}
	n, err := f.clear(parent, base, e)
	if err != nil {
		return err
	}
	n.entry = &e
	switch {
	case e.Type == Regular:
		return f.addFile(&e, content)
	case f.tree == nil:
		return nil
	case e.Type == Dir: // it may be there, as the parent of earlier entries
		_, err = f.tree.dirs.open(e.Path, true)
		return err
	}
	return f.tree.add(e)
}

// cutMark returns the first component of name that marks something, and what
// comes after it.
func cutMark(name string) (mark, rest string) {
	for name != "" {
		part, after, _ := strings.Cut(name, "/")
		if strings.HasPrefix(part, whiteoutPrefix) {
			return part, after
		}
		name = after
	}
	return "", ""
}

// cleanName is a tar's name as a path in the root.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("name has a NUL byte")
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	switch {
	case clean == "..", strings.HasPrefix(clean, "../"):
		return "", errors.New("name leads out of the layer")
	case len(clean) > maxPath:
		return "", errors.New("name is too long")
	}
	for part := range strings.SplitSeq(clean, "/") {
		if len(part) > maxName {
			return "", errors.New("name is too long")
		}
	}
	return clean, nil
}

// What Linux can hold (PATH_MAX, NAME_MAX).
const (
	maxPath = 4095
	maxName = 255
)

func entryOf(h *tar.Header) (Entry, error) {
	e := Entry{
		Mode: uint32(h.Mode & 0o7777), UID: h.Uid, GID: h.Gid,
		ModTime: h.ModTime.Unix(), Xattrs: HeaderXattrs(h),
	}
	if e.UID < 0 || e.GID < 0 || int64(e.UID) > maxID || int64(e.GID) > maxID {
		return e, fmt.Errorf("owner %d:%d is out of range", e.UID, e.GID)
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		e.Type, e.Size = Regular, h.Size
		if strings.HasSuffix(h.Name, "/") { // how tar had directories before POSIX
			e.Type, e.Size = Dir, 0
		}
	case tar.TypeDir:
		e.Type = Dir
	case tar.TypeSymlink:
		e.Type, e.Link = Symlink, h.Linkname
		if e.Link == "" || len(e.Link) > maxPath || strings.IndexByte(e.Link, 0) >= 0 {
			return e, errors.New("target of symbolic link is empty or too long")
		}
	case tar.TypeLink:
		e.Type, e.Link = Hardlink, h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		e.Type = Char
		if h.Typeflag == tar.TypeBlock {
			e.Type = Block
		}
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 {
			return e, fmt.Errorf("device %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		e.Type = Fifo
	default:
		return e, fmt.Errorf("unknown type %q", h.Typeflag)
	}
	return e, nil
}

// HeaderXattrs returns the extended attributes of a tar header that layers carry, nil for none.
func HeaderXattrs(h *tar.Header) map[string]string {
	var all map[string]string
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || len(name) > maxName || len(value) > maxXattr || strings.IndexByte(name, 0) >= 0 {
			continue
		}
		if all == nil {
			all = map[string]string{}
		}
		all[name] = value
	}
	return keptXattrs(all)
}

// maxXattr is Linux's XATTR_SIZE_MAX.
const maxXattr = 64 << 10

func (f *foreign) addWhiteout(dir, base string) error {
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return errors.New("whiteout of nothing")
	}
	parent, _, err := f.directory(dir)
	if err != nil {
		return err
	}
	if base == opaqueMarker {
		parent.opaque = true
		return nil
	}
	parent.child(name).whiteout = true
	return nil
}

func (n *tarNode) child(name string) *tarNode {
	if n.children == nil {
		n.children = map[string]*tarNode{}
	}
	if n.children[name] == nil {
		n.children[name] = &tarNode{}
	}
	return n.children[name]
}

// maxLinks bounds how many links lead to one directory of an archive.
const maxLinks = 255

// directory finds or implies the directory dir. As an extraction in order
// would, it follows symbolic links that the layer has on the way, and replaces
// other files. The path without the links is returned with it.
func (f *foreign) directory(dir string) (*tarNode, string, error) {
	todo := strings.Split(dir, "/")
	var at []*tarNode // way from the root
	var names []string
	here := f.root
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(at) > 0 {
				here, at, names = at[len(at)-1], at[:len(at)-1], names[:len(names)-1]
			}
			continue
		}
		next := here.child(name)
		if next.entry != nil && next.entry.Type == Symlink {
			if links++; links > maxLinks {
				return nil, "", errors.New("too many levels of symbolic links")
			}
			if path.IsAbs(next.entry.Link) {
				here, at, names = f.root, nil, nil
			}
			todo = append(strings.Split(next.entry.Link, "/"), todo...)
			continue
		}
		at, names = append(at, here), append(names, name)
		if len(names) > maxPath/2 {
			return nil, "", errors.New("name is too long")
		}
		if next.entry != nil && next.entry.Type != Dir {
			if err := f.drop(next, strings.Join(names, "/")); err != nil {
				return nil, "", err
			}
		}
		here = next
	}
	where := strings.Join(names, "/")
	if len(where) > maxPath {
		return nil, "", errors.New("name is too long")
	}
	if where == "" {
		where = "."
	}
	return here, where, nil
}

// clear makes the place for e: what is there goes, unless a directory meets a
// directory.
func (f *foreign) clear(parent *tarNode, base string, e Entry) (*tarNode, error) {
	n := parent.child(base)
	if n.isDir() && e.Type == Dir {
		return n, nil
	}
	if n.entry == nil && !n.isDir() {
		return n, nil
	}
	return n, f.drop(n, e.Path)
}

func (f *foreign) drop(n *tarNode, p string) error {
	// A whiteout is of the layers below: it stays true.
	*n = tarNode{whiteout: n.whiteout}
	if f.tree == nil {
		return nil
	}
	return f.tree.remove(p)
}

// addLink makes e another name of what it links to, which must be in the
// layer already. Of all names of a file the index later makes the first in
// canonical order the one that is no link.
func (f *foreign) addLink(parent *tarNode, base string, e Entry) error {
	target, err := cleanName(e.Link)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", e.Link, err)
	}
	from, where, err := f.directory(path.Dir(target))
	if err != nil {
		return err
	}
	old := from.children[path.Base(target)]
	if target == "." || old == nil || old.entry == nil || old.entry.Type == Dir {
		return fmt.Errorf("hard link to %q: no such file before it in this layer", e.Link)
	}
	if parent.children[base] == old {
		return nil
	}
	e.Link = path.Join(where, path.Base(target))
	if beneath(e.Link, e.Path) {
		return fmt.Errorf("hard link to %q: the link replaces its target", e.Link)
	}
	shared := old.entry
	n, err := f.clear(parent, base, e)
	if err != nil {
		return err
	}
	n.entry = shared
	f.linked[shared] = ""
	if f.tree == nil {
		return nil
	}
	return f.tree.add(e)
}

// addFile reads the content of e, for its digest and into the tree.
func (f *foreign) addFile(e *Entry, content io.Reader) error {
	var file *treeFile
	if f.tree != nil {
		var err error
		if file, err = f.tree.create(e.Path); err != nil {
			return err
		}
		defer file.close()
	}
	if f.buf == nil {
		f.buf = make([]byte, copyBuffer)
	}
	f.hash.Reset()
	for left := e.Size; left > 0; {
		if f.ctx.Err() != nil { // of a hole there may be exabytes, for which nothing below is asked
			return context.Cause(f.ctx)
		}
		b := f.buf[:min(left, copyBuffer)]
		if _, err := io.ReadFull(content, b); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		f.hash.Write(b)
		if file != nil {
			if err := file.write(b); err != nil {
				return err
			}
		}
		left -= int64(len(b))
	}
	e.Digest = digest.NewDigest(digest.SHA256, f.hash)
	if file == nil {
		return nil
	}
	return file.finish(*e)
}

// index lists what was read, in canonical order.
func (f *foreign) index() (*index, error) {
	var b indexBuilder
	if err := f.list(&b, f.root, "."); err != nil {
		return nil, err
	}
	return b.finish(), nil
}

func (f *foreign) list(b *indexBuilder, n *tarNode, p string) error {
	if err := f.listOne(b, n, p); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		if err := f.list(b, n.children[name], path.Join(p, name)); err != nil {
			return err
		}
	}
	return nil
}

func (f *foreign) listOne(b *indexBuilder, n *tarNode, p string) error {
	if n.entry == nil && !n.isDir() {
		if n.whiteout {
			return b.add(Entry{Path: p, Type: Whiteout})
		}
		return nil
	}
	if n.entry != nil {
		e := *n.entry
		e.Path = p
		if first, ok := f.linked[n.entry]; ok {
			if first == "" {
				f.linked[n.entry] = p
			} else {
				e.Type, e.Link = Hardlink, first
				e = ownFields(e)
			}
		}
		if err := b.add(e); err != nil {
			return err
		}
	}
	// Deleted below and a directory here: of the one below nothing shows.
	if n.isDir() && (n.opaque || n.whiteout) {
		return b.add(Entry{Path: p, Type: Opaque})
	}
	return nil
}
