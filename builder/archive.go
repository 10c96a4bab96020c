package builder

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

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
	x := extraction{plan: p, root: root, owner: a.chown, spool: sp, id: src.root}
	for ; err == nil; hdr, err = t.Next() {
		if err := x.member(hdr, t); err != nil {
			return true, fmt.Errorf("unpack %s: %s: %w", src.name, hdr.Name, err)
		}
	}
	if err != io.EOF {
		return true, fmt.Errorf("unpack %s: %w", src.name, err)
	}
	return true, nil
}

// extraction unpacks one archive below root.
type extraction struct {
	*plan
	root  string
	owner *owner
	spool *spool
	id    string // tells its hard links from those of others
}

func (x *extraction) member(hdr *tar.Header, r io.Reader) error {
	name := strings.TrimPrefix(path.Join("/", hdr.Name), "/")
	if name == "" || hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	at, err := x.place(name)
	if err != nil {
		return err
	}
	n := node{Entry: layer.Entry{
		Path: at, Mode: uint32(hdr.Mode) & 0o7777, UID: hdr.Uid, GID: hdr.Gid, ModTime: hdr.ModTime.Unix(),
		Xattrs: layer.HeaderXattrs(hdr),
	}}
	if x.owner != nil {
		n.UID, n.GID = x.owner.uid, x.owner.gid
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont: // the reader says TypeReg for old archives too
		n.Type = layer.Regular
		n.Size, n.Digest, n.open, err = x.spool.add(r)
	case tar.TypeDir:
		n.Type = layer.Dir
	case tar.TypeSymlink:
		n.Type, n.Link, n.Mode = layer.Symlink, hdr.Linkname, 0o777
	case tar.TypeLink:
		return x.hardlink(at, hdr.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		n.Type, n.Major, n.Minor = layer.Char, uint32(hdr.Devmajor), uint32(hdr.Devminor)
		if hdr.Typeflag == tar.TypeBlock {
			n.Type = layer.Block
		}
	case tar.TypeFifo:
		n.Type = layer.Fifo
	default:
		return fmt.Errorf("unknown type %q", hdr.Typeflag)
	}
	if err != nil {
		return err
	}
	if old, ok := x.lstat(at); ok && !(old.Type == layer.Dir && n.Type == layer.Dir) {
		x.remove(at)
	}
	x.put(n)
	return nil
}

// place makes the directories above name and returns where name itself is.
func (x *extraction) place(name string) (string, error) {
	dir, err := x.resolve(x.root, path.Dir(name))
	if err != nil {
		return "", err
	}
	if e, ok := x.lstat(dir); ok && e.Type != layer.Dir {
		x.remove(dir)
	}
	return path.Join(dir, path.Base(name)), x.mkdirAll(dir, 0o755, owner{})
}

// hardlink makes at another name of the file that target names inside the archive's root.
func (x *extraction) hardlink(at, target string) error {
	target = strings.TrimPrefix(path.Join("/", target), "/")
	dir, err := x.resolve(x.root, path.Dir(target))
	if err != nil {
		return err
	}
	of := path.Join(dir, path.Base(target))
	n, ok := x.nodes[of]
	if !ok || n.Type == layer.Whiteout || n.Type == layer.Dir {
		return fmt.Errorf("hard link to %s, which the archive does not hold", target)
	}
	if n.inode == "" {
		n.inode = fmt.Sprintf("%p %s %s", x, x.id, of)
	}
	if old, ok := x.lstat(at); ok && old.Type == layer.Dir {
		x.remove(at)
	}
	l := *n
	l.Path = at
	x.put(l)
	return nil
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
