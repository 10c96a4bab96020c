package builder

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"

	"filo/builder/source"
	"filo/layer"
)

// unpack unpacks src to the directory dest if it is an archive and reports whether it is: a tar by its first header,
// plain or compressed, whatever its name. Members stay inside dest, links in it seen as if dest were the root.
func (p *plan) unpack(src *picked, dest string, a attributes, sp *spool) (bool, error) {
	f, err := src.open(src.root)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, err := source.Decompress(bufio.NewReader(f))
	if err != nil {
		return false, nil
	}
	t := tar.NewReader(r)
	hdr, err := t.Next()
	if err != nil {
		return false, nil
	}
	_, o := attributes{chown: a.chown}.made()
	root, err := p.resolve(".", dest)
	if err != nil {
		return true, err
	}
	if err := p.mkdirAll(root, 0o755, o); err != nil {
		return true, err
	}
	x := extraction{plan: p, root: root, owner: a.chown, spool: sp, links: map[string]layer.Entry{}}
	for ; err == nil; hdr, err = t.Next() {
		if err := x.member(hdr, t); err != nil {
			return true, fmt.Errorf("unpack %s: %s: %w", src.name, hdr.Name, err)
		}
	}
	if err != io.EOF {
		return true, fmt.Errorf("unpack %s: %w", src.name, err)
	}
	x.settle()
	return true, nil
}

// extraction unpacks one archive below root.
type extraction struct {
	*plan
	root  string
	owner *owner
	spool *spool
	links map[string]layer.Entry // by inode, what the last header of a file with several names says of it
}

func (x *extraction) member(hdr *tar.Header, r io.Reader) error {
	if path.Clean(hdr.Name) == "." || hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	at := x.root
	if name := strings.TrimPrefix(path.Join("/", hdr.Name), "/"); name != "" {
		var err error
		if at, err = x.place(name); err != nil {
			return err
		}
	}
	n, err := x.describe(hdr, at)
	if err != nil {
		return err
	}
	if old, ok := x.lstat(at); ok && !(old.Type == layer.Dir && n.Type == layer.Dir) {
		if at == x.root {
			return &fs.PathError{Op: "replace", Path: "/" + at, Err: syscall.EISDIR}
		}
		x.remove(at)
	}
	switch n.Type {
	case layer.Hardlink:
		return x.hardlink(n)
	case layer.Regular:
		if n.Size, n.Digest, n.open, err = x.spool.add(r); err != nil {
			return err
		}
	}
	x.put(n)
	return nil
}

// describe makes of a header the node at the path at, without its content.
func (x *extraction) describe(hdr *tar.Header, at string) (node, error) {
	n := node{Entry: layer.Entry{
		Path: at, Mode: uint32(hdr.Mode) & 0o7777, UID: hdr.Uid, GID: hdr.Gid, ModTime: max(hdr.ModTime.Unix(), 0),
		Xattrs: layer.HeaderXattrs(hdr),
	}}
	if x.owner != nil {
		n.UID, n.GID = x.owner.uid, x.owner.gid
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont: // the reader says TypeReg for old archives too
		n.Type = layer.Regular
	case tar.TypeDir:
		n.Type = layer.Dir
	case tar.TypeSymlink:
		n.Type, n.Link, n.Mode = layer.Symlink, hdr.Linkname, 0o777
	case tar.TypeLink:
		n.Type, n.Link = layer.Hardlink, hdr.Linkname
	case tar.TypeChar, tar.TypeBlock:
		n.Type, n.Major, n.Minor = layer.Char, uint32(hdr.Devmajor), uint32(hdr.Devminor)
		if hdr.Typeflag == tar.TypeBlock {
			n.Type = layer.Block
		}
	case tar.TypeFifo:
		n.Type = layer.Fifo
	default:
		return n, fmt.Errorf("unknown type %q", hdr.Typeflag)
	}
	return n, nil
}

// place makes the directories above name and returns where name itself is. A file or a link to nowhere among them is
// not replaced.
func (x *extraction) place(name string) (string, error) {
	parent := path.Dir(name)
	dir, err := x.resolve(x.root, parent)
	if err != nil {
		return "", err
	}
	if _, ok := x.lstat(dir); !ok {
		if err := x.refuseDangling(parent); err != nil {
			return "", err
		}
	}
	return path.Join(dir, path.Base(name)), x.mkdirAll(dir, 0o755, owner{})
}

// refuseDangling reports a link in dir that leads nowhere: what a member is put into cannot be made behind it.
func (x *extraction) refuseDangling(dir string) error {
	for ; dir != "."; dir = path.Dir(dir) {
		above, err := x.resolve(x.root, path.Dir(dir))
		if err != nil {
			return err
		}
		if e, ok := x.lstat(path.Join(above, path.Base(dir))); ok {
			if e.Type == layer.Symlink {
				if to, err := x.resolve(x.root, dir); err != nil || !x.exists(to) {
					return errors.Join(&fs.PathError{Op: "mkdir", Path: "/" + e.Path, Err: syscall.EEXIST}, err)
				}
			}
			return nil
		}
	}
	return nil
}

func (x *extraction) exists(name string) bool {
	_, ok := x.lstat(name)
	return ok
}

// hardlink makes l another name of the file that its target, a path inside the archive's root, names: one of the
// archive or one that was there before.
func (x *extraction) hardlink(l node) error {
	target := strings.TrimPrefix(path.Join("/", l.Link), "/")
	dir, err := x.resolve(x.root, path.Dir(target))
	if err != nil {
		return err
	}
	of := path.Join(dir, path.Base(target))
	e, ok := x.lstat(of)
	if !ok || e.Type == layer.Dir {
		why := syscall.ENOENT
		if ok {
			why = syscall.EPERM
		}
		return &fs.PathError{Op: "link", Path: target, Err: why}
	}
	n, ok := x.nodes[of]
	if !ok {
		e.Path = of
		n = &node{Entry: e, open: func() (io.ReadCloser, error) { return x.below.Open(of) }}
		x.nodes[of] = n
	}
	other := *n
	other.Path = l.Path
	if n.inode == "" {
		n.inode = fmt.Sprintf("%p %d", x, len(x.links))
	}
	other.inode = n.inode
	x.links[n.inode] = l.Entry
	x.put(other)
	return nil
}

// settle gives all names of a file the attributes that its last header told.
func (x *extraction) settle() {
	if len(x.links) == 0 {
		return
	}
	for _, n := range x.nodes {
		if e, ok := x.links[n.inode]; ok {
			n.UID, n.GID, n.ModTime = e.UID, e.GID, e.ModTime
			if n.Type != layer.Symlink {
				n.Mode = e.Mode
			}
		}
	}
}

// spool keeps the bytes of archive members until their turn in the layer, in one file.
type spool struct {
	store *layer.Store
	dir   string
	f     *os.File
	size  int64
}

// add appends what r gives and returns its size, its digest and how to read it again.
func (s *spool) add(r io.Reader) (int64, digest.Digest, func() (io.ReadCloser, error), error) {
	if s.f == nil {
		if err := s.begin(); err != nil {
			return 0, "", nil, err
		}
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(s.f, h), r)
	at := s.size
	s.size += n
	open := func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(s.f, at, n)), nil }
	return n, digest.NewDigest(digest.SHA256, h), open, err
}

func (s *spool) begin() (err error) {
	if s.dir, err = s.store.Temp("unpack-"); err != nil {
		return err
	}
	s.f, err = os.Create(filepath.Join(s.dir, "members"))
	return err
}

// Close throws the bytes away.
func (s *spool) Close() error {
	if s.dir == "" {
		return nil
	}
	return errors.Join(s.f.Close(), os.RemoveAll(s.dir))
}
