package source

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"filo/layer/rootfs"
)

// peekSize is enough for every magic number and for the header of a tar, most long names included.
const peekSize = 2048

// peek returns the beginning of r without taking it. An error but for the end of r is one.
func peek(r *bufio.Reader) ([]byte, error) {
	head, err := r.Peek(peekSize)
	if err == io.EOF {
		err = nil
	}
	return head, err
}

// decompressors are known by how a stream begins.
var decompressors = []struct {
	magic string
	open  func(io.Reader) (io.Reader, error)
}{
	{"\x1f\x8b\x08", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{"BZh", func(r io.Reader) (io.Reader, error) { return bzip2.NewReader(r), nil }},
	{"\xfd7zXZ\x00", func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) }},
	{"\x28\xb5\x2f\xfd", openZstd},
}

// maxWindow bounds what a zstd stream may ask us to keep in memory: the format's 8 MiB for every decoder is little,
// zstd --long makes 128 MiB.
const maxWindow = 128 << 20

// openZstd needs no Close: with one decoder there is no goroutine behind it.
func openZstd(r io.Reader) (io.Reader, error) {
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
}

// isZstdSkippable reports whether head begins with a skippable frame (RFC 8878, 3.1.2), which may come first.
func isZstdSkippable(head []byte) bool {
	return len(head) >= 8 && binary.LittleEndian.Uint32(head)&^0xf == 0x184D2A50
}

// isArchive reports whether a stream that begins with head is a tar, compressed or not.
func isArchive(head []byte) bool {
	for _, d := range decompressors {
		if bytes.HasPrefix(head, []byte(d.magic)) {
			return true
		}
	}
	if isZstdSkippable(head) || isEmptyTar(head) {
		return true
	}
	// The magic alone decides where a long extended header does not fit into head.
	if len(head) > ustar+5 && string(head[ustar:ustar+5]) == "ustar" && (head[ustar+5] == 0 || head[ustar+5] == ' ') {
		return true
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return err == nil
}

// ustar is where the magic of a tar header stands (pax(1), ustar Interchange Format).
const ustar = 257

// isEmptyTar reports whether head is the end of an archive that holds nothing.
func isEmptyTar(head []byte) bool {
	const block = 512
	return len(head) >= block && len(bytes.Trim(head[:block], "\x00")) == 0
}

// Decompress returns what r holds once decompressed: gzip, bzip2, xz or zstd by the first bytes, anything else as it is.
func Decompress(r *bufio.Reader) (io.Reader, error) {
	head, err := peek(r)
	if err != nil {
		return nil, err
	}
	for _, d := range decompressors {
		if bytes.HasPrefix(head, []byte(d.magic)) {
			return d.open(r)
		}
	}
	if isZstdSkippable(head) {
		return openZstd(r)
	}
	return r, nil
}

// readTar reads the tar r, compressed or not, into a tree whose bytes are kept in the directory temp.
func readTar(ctx context.Context, r *bufio.Reader, temp string) (_ *tree, err error) {
	plain, err := Decompress(r)
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	spool, err := newSpool(temp)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, spool.Close())
		}
	}()
	u := untar{ctx: ctx, tree: newTree(spool), most: maxFiles, buf: make([]byte, 128<<10)}
	tr := tar.NewReader(plain)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return u.tree, errors.Join(drain(plain), spool.Truncate(u.end)) // a hole at the end has to be there to be read
		}
		if err != nil {
			return nil, fmt.Errorf("read tar: %w", err)
		}
		if err := u.add(h, tr); err != nil {
			return nil, fmt.Errorf("read tar: %q: %w", h.Name, err)
		}
	}
}

// maxTail bounds what stands behind the end of an archive. It is padding, a few KiB; /dev/zero is an empty archive and has
// no end.
const maxTail = 256 << 20

// drain reads what stands behind the end of an archive: only then the checksum of a compressed stream is verified.
func drain(r io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxTail+1))
	if n > maxTail {
		return fmt.Errorf("more than %d MiB behind the end of the archive", maxTail>>20)
	}
	if errors.Is(err, gzip.ErrHeader) { // garbage after a stream that was whole: gzip(1) takes that too
		return nil
	}
	return err
}

// maxFiles bounds the files and directories of an archive: they are held in memory, some 200 bytes each.
const maxFiles = 4_000_000

// untar adds the entries of a tar to a tree.
type untar struct {
	ctx  context.Context
	tree *tree
	most uint64 // files and directories that tree may have
	end  int64  // of what the spool holds
	buf  []byte
}

// add adds one entry. Names are taken from the root, ".." stops there; links of the archive itself are followed on
// the way, as they are when an archive is unpacked on disk.
func (u *untar) add(h *tar.Header, r io.Reader) error {
	if err := u.ctx.Err(); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if u.tree.last > u.most {
		return fmt.Errorf("more than %d files", u.most)
	}
	kind, ok := kinds[h.Typeflag]
	if !ok {
		return fmt.Errorf("entry of unknown type %q", h.Typeflag)
	}
	name := strings.TrimPrefix(path.Join("/", h.Name), "/")
	st := rootfs.Stat{
		Mode: kind | uint32(h.Mode)&0o7777, UID: h.Uid, GID: h.Gid, Nlink: 1,
		Sec: h.ModTime.Unix(), Nsec: int64(h.ModTime.Nanosecond()),
	}
	if name == "" {
		if kind != modeDir {
			return errIsDir
		}
		st.Ino = u.tree.root.stat.Ino
		u.tree.root.stat = st
		return nil
	}
	dir, err := u.tree.dir(path.Dir(name), true)
	if err != nil {
		return err
	}
	base := path.Base(name)
	old := dir.children[base]
	switch h.Typeflag {
	case tar.TypeDir:
		if old != nil && old.is(modeDir) {
			st.Ino = old.stat.Ino
			old.stat = st
			return nil
		}
	case tar.TypeLink:
		return u.hardlink(dir, base, h.Linkname)
	}
	drop(old)
	n := &node{stat: st}
	switch kind {
	case modeDir:
		n.children = map[string]*node{}
	case modeSymlink:
		n.link, n.stat.Size = h.Linkname, int64(len(h.Linkname))
	case modeChar, modeBlock:
		n.stat.Major, n.stat.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	case modeRegular:
		n.offset = u.end
		if n.stat.Size, err = u.spool(r); err != nil {
			return err
		}
	}
	u.tree.put(dir, base, n)
	return nil
}

// kinds are the types of entries that a context can hold.
var kinds = map[byte]uint32{
	tar.TypeReg: modeRegular, tar.TypeCont: modeRegular, tar.TypeGNUSparse: modeRegular,
	tar.TypeLink: modeRegular, tar.TypeSymlink: modeSymlink, tar.TypeDir: modeDir,
	tar.TypeChar: modeChar, tar.TypeBlock: modeBlock, tar.TypeFifo: modeFifo,
}

func (u *untar) hardlink(dir *node, base, target string) error {
	target = strings.TrimPrefix(path.Join("/", target), "/")
	n, err := u.tree.lookup(path.Clean(target))
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", target, err)
	}
	if n.is(modeDir) {
		return fmt.Errorf("hard link to %q: %w", target, errIsDir)
	}
	old := dir.children[base]
	if old == n {
		return nil
	}
	drop(old)
	n.stat.Nlink++
	dir.children[base] = n
	return nil
}

// drop takes away one name of n.
func drop(n *node) {
	if n != nil && n.stat.Nlink > 0 {
		n.stat.Nlink--
	}
}

// spool appends r to the spool file and returns its size. Blocks of zeros become holes.
func (u *untar) spool(r io.Reader) (int64, error) {
	start := u.end
	f := u.tree.spool
	for {
		n, err := io.ReadFull(r, u.buf)
		if n > 0 && !zeros(u.buf[:n]) {
			if _, err := f.WriteAt(u.buf[:n], u.end); err != nil {
				return 0, err
			}
		}
		u.end += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return u.end - start, nil
		}
		if err == nil {
			err = u.ctx.Err() // a hole is read without reading anything
		}
		if err != nil {
			return 0, err
		}
	}
}

func zeros(b []byte) bool {
	return len(b) > 0 && b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}
