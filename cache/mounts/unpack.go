package mounts

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"filo/layer/rootfs"
)

// Target is a directory to be filled.
type Target struct {
	Dir      string // empty
	SingleID bool   // owners are not put on disk
}

// atOnce is how many packs are fetched side by side.
const atOnce = 4

// Unpack makes the files of l in the directory of t. open gives the blob of a pack; everything is verified. After an
// error the directory holds part of the files and is to be thrown away.
func (l *List) Unpack(ctx context.Context, t Target, open func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) error {
	root, err := rootfs.Open(t.Dir)
	if err != nil {
		return err
	}
	defer root.Close()
	u := &unpacking{root: root, single: t.SingleID}
	wanted := make([]map[digest.Digest][]*file, len(l.Packs))
	for i := range l.Files {
		f := &l.Files[i]
		if err := u.begin(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		if f.Size == 0 {
			continue
		}
		if wanted[f.Pack] == nil {
			wanted[f.Pack] = map[digest.Digest][]*file{}
		}
		wanted[f.Pack][f.Digest] = append(wanted[f.Pack][f.Digest], f)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for n, files := range wanted {
		if len(files) > 0 {
			g.Go(func() error { return u.pack(gctx, l.Packs[n], files, open) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return u.finish(l.Files)
}

// unpacking is a directory being filled.
type unpacking struct {
	root   *rootfs.Root
	single bool
}

// begin makes what needs no content. Directories stay open to us until the end.
func (u *unpacking) begin(f *file) error {
	if f.Type == hardlink || f.Size > 0 {
		return nil
	}
	d, name, err := u.root.Parent(string(f.Path))
	if err != nil {
		return err
	}
	defer d.Close()
	switch f.Type {
	case dir:
		return d.Mkdir(name, 0o700)
	case symlink:
		err = d.Symlink(string(f.Link), name)
	default:
		var out *os.File
		if out, err = d.Create(name, 0o600); err == nil {
			err = out.Close()
		}
	}
	if err != nil {
		return err
	}
	return d.Set(name, u.attributes(f))
}

func (u *unpacking) attributes(f *file) rootfs.Attr {
	a := rootfs.Attr{Mode: rootfs.Mode(f.Mode), Time: &rootfs.Time{Sec: f.Sec, Nsec: f.Nsec}}
	if !u.single {
		a.Owner = &rootfs.Owner{UID: f.UID, GID: f.GID}
	}
	return a
}

// headers is what a pack may unpack to beside its contents, for each file.
const headers = 2 << 10

// pack reads one pack and writes the files whose content it has.
func (u *unpacking) pack(ctx context.Context, k pack, files map[digest.Digest][]*file, open func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) error {
	part := k.part()
	body, err := open(ctx, part.Blob)
	if err != nil {
		return err
	}
	defer body.Close()
	most := k.Bytes + headers*(int64(maxFiles)+1)
	err = readPart(body, part, most, func(h *tar.Header, content io.Reader) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		d := digest.NewDigestFromEncoded(digest.SHA256, h.Name)
		list := files[d]
		if len(list) == 0 {
			return nil
		}
		delete(files, d)
		return u.content(d, list, h.Size, content)
	})
	if err == nil && len(files) > 0 {
		err = fmt.Errorf("blob %s: %d contents are missing", k.Blob, len(files))
	}
	return err
}

// content writes one content to all files that have it.
func (u *unpacking) content(d digest.Digest, list []*file, size int64, content io.Reader) error {
	h := sha256.New()
	if err := u.file(list[0], size, io.TeeReader(content, h)); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, h); got != d {
		return fmt.Errorf("content %s has digest %s", d, got)
	}
	for _, f := range list[1:] {
		if err := u.again(list[0], f, size); err != nil {
			return err
		}
	}
	for _, f := range list {
		if err := u.root.Set(string(f.Path), u.attributes(f)); err != nil {
			return err
		}
	}
	return nil
}

// file makes f, which must have that size.
func (u *unpacking) file(f *file, size int64, content io.Reader) error {
	if size != f.Size {
		return fmt.Errorf("%s: its content has %d bytes, not %d", f.Path, size, f.Size)
	}
	d, name, err := u.root.Parent(string(f.Path))
	if err != nil {
		return err
	}
	defer d.Close()
	out, err := d.Create(name, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, content)
	return errors.Join(err, out.Close())
}

// again makes f of what from got.
func (u *unpacking) again(from, f *file, size int64) error {
	d, name, err := u.root.Parent(string(from.Path))
	if err != nil {
		return err
	}
	defer d.Close()
	in, err := d.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	return u.file(f, size, in)
}

// finish makes the hard links, then gives directories what filling them would change, the inner ones first.
func (u *unpacking) finish(files []file) error {
	for i := range files {
		if f := &files[i]; f.Type == hardlink {
			if err := u.root.Link(string(f.Link), string(f.Path)); err != nil {
				return err
			}
		}
	}
	for _, f := range slices.Backward(files) {
		if f.Type == dir {
			if err := u.root.Set(string(f.Path), u.attributes(&f)); err != nil {
				return err
			}
		}
	}
	return nil
}
