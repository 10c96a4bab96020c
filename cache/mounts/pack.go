package mounts

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"filo/layer/rootfs"
)

// packBytes is how much content a pack holds at least, unless it is the last one.
const packBytes = 16 << 20

// smallPacks is how many packs of less than a quarter of that there may be before they are made one.
const smallPacks = 16

// Pack makes blobs of the directory dir below the directory temp, where they stay. Nobody may change dir meanwhile.
// What the archive with the list old has already is not made again; nil is none. If the files have more than most
// bytes, the error is a [*TooLargeError]. Of a directory without any the archive has no parts.
func Pack(ctx context.Context, dir, temp string, most int64, old *List) (*Archive, error) {
	root, err := rootfs.Open(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	p := &packing{ctx: ctx, root: root, temp: temp, made: map[digest.Digest]string{}, links: map[[2]uint64]text{}}
	top, err := root.Dir(".")
	if err != nil {
		return nil, err
	}
	if err := p.scan(top, "."); err != nil {
		return nil, err
	}
	if bytes := p.list.Bytes(); bytes > most {
		return nil, &TooLargeError{bytes}
	}
	if len(p.list.Files) == 0 {
		return &Archive{}, nil
	}
	if err := p.hash(); err != nil {
		return nil, err
	}
	p.takeOver(old)
	if err := p.write(); err != nil {
		return nil, err
	}
	return p.archive(old)
}

// packing is a directory on its way into blobs.
type packing struct {
	ctx   context.Context
	root  *rootfs.Root
	temp  string
	list  List
	links map[[2]uint64]text // files with several names, by inode: the first of them
	at    map[digest.Digest]int
	made  map[digest.Digest]string
}

// scan lists the directory d, which is at p, and closes it.
func (p *packing) scan(d *rootfs.Dir, at string) error {
	defer d.Close()
	if err := p.ctx.Err(); err != nil {
		return err
	}
	names, err := d.Names()
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		f, err := p.file(d, name, path.Join(at, name))
		if err != nil {
			return err
		}
		if f.Type == "" {
			continue
		}
		p.list.Files = append(p.list.Files, f)
		if f.Type != dir {
			continue
		}
		sub, err := d.Dir(name)
		if err != nil {
			return err
		}
		if err := p.scan(sub, string(f.Path)); err != nil {
			return err
		}
	}
	return nil
}

// file looks at one name of d. A file that does not travel has no type.
func (p *packing) file(d *rootfs.Dir, name, at string) (file, error) {
	st, err := d.Lstat(name)
	if err != nil {
		return file{}, err
	}
	f := file{Path: text(at), Mode: st.Mode & 0o7777, UID: st.UID, GID: st.GID, Sec: st.Sec, Nsec: st.Nsec}
	switch st.FileMode().Type() {
	case fs.ModeDir:
		f.Type = dir
	case fs.ModeSymlink:
		f.Type, f.Mode = symlink, 0
		link, err := d.Readlink(name)
		f.Link = text(link)
		return f, err
	case 0:
		inode := [2]uint64{st.Dev, st.Ino}
		if first, ok := p.links[inode]; ok {
			return file{Path: f.Path, Type: hardlink, Link: first}, nil
		}
		if st.Nlink > 1 {
			p.links[inode] = f.Path
		}
		f.Type, f.Size = regular, st.Size
	}
	return f, nil
}

// hash finds the digests of all files.
func (p *packing) hash() error {
	g, ctx := errgroup.WithContext(p.ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range p.list.Files {
		f := &p.list.Files[i]
		if f.Size == 0 {
			continue
		}
		g.Go(func() (err error) {
			if err := ctx.Err(); err != nil {
				return err
			}
			f.Digest, err = p.copy(io.Discard, f)
			return err
		})
	}
	return g.Wait()
}

// copy writes the content of f to w and returns its digest.
func (p *packing) copy(w io.Writer, f *file) (digest.Digest, error) {
	r, err := p.open(string(f.Path))
	if err != nil {
		return "", err
	}
	defer r.Close()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), io.LimitReader(r, f.Size))
	if err == nil && n != f.Size {
		err = errChanged
	}
	return digest.NewDigest(digest.SHA256, h), err
}

var errChanged = errors.New("a file changed while it was read")

func (p *packing) open(at string) (*os.File, error) {
	d, name, err := p.root.Parent(at)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.OpenFile(name, os.O_RDONLY, 0)
}

// takeOver makes the packs of an old list ours that are worth it, and finds out what they have.
func (p *packing) takeOver(old *List) {
	p.at = map[digest.Digest]int{}
	if old == nil {
		return
	}
	holds := map[digest.Digest]int{} // by number in old
	for i := range old.Files {
		if f := &old.Files[i]; f.Size > 0 {
			holds[f.Digest] = f.Pack
		}
	}
	used := make([]int64, len(old.Packs)) // bytes
	counted := map[digest.Digest]bool{}
	for i := range p.list.Files {
		f := &p.list.Files[i]
		if n, ok := holds[f.Digest]; ok && !counted[f.Digest] {
			counted[f.Digest] = true
			used[n] += f.Size
		}
	}
	number := map[int]int{} // old to new
	for _, n := range worthKeeping(old.Packs, used) {
		number[n] = len(p.list.Packs)
		p.list.Packs = append(p.list.Packs, old.Packs[n])
	}
	for d, n := range holds {
		if now, ok := number[n]; ok {
			p.at[d] = now
		}
	}
}

// worthKeeping returns the numbers of packs that go on to serve.
func worthKeeping(packs []pack, used []int64) []int {
	var keep, small []int
	for n, p := range packs {
		switch {
		case used[n] == 0 || used[n] < p.Bytes/2:
		case p.Bytes < packBytes/4:
			small = append(small, n)
		default:
			keep = append(keep, n)
		}
	}
	if len(small) <= smallPacks {
		keep = append(keep, small...)
	}
	slices.Sort(keep)
	return keep
}

// write puts the contents that no pack has into new ones.
func (p *packing) write() error {
	var w *partWriter
	var bytes int64
	finish := func() error {
		part, at, err := w.finish()
		if err != nil {
			return err
		}
		p.made[part.Blob.Digest] = at
		p.list.Packs = append(p.list.Packs, pack{part.Blob.Digest, part.Blob.Size, part.DiffID, bytes})
		w, bytes = nil, 0
		return nil
	}
	for i := range p.list.Files {
		f := &p.list.Files[i]
		if f.Size == 0 {
			continue
		}
		n, ok := p.at[f.Digest]
		if f.Pack = n; ok {
			continue
		}
		f.Pack = len(p.list.Packs)
		p.at[f.Digest] = f.Pack
		if err := p.put(&w, f); err != nil {
			if w != nil {
				w.abort()
			}
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		if bytes += f.Size; bytes < packBytes {
			continue
		}
		if err := finish(); err != nil {
			return err
		}
	}
	if w == nil {
		return nil
	}
	return finish()
}

// put adds the content of f to w, which is made if there is none.
func (p *packing) put(w **partWriter, f *file) (err error) {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	if *w == nil {
		if *w, err = newPart(p.temp); err != nil {
			return err
		}
	}
	if err := (*w).WriteHeader(&tar.Header{Name: f.Digest.Encoded(), Mode: 0o644, Size: f.Size}); err != nil {
		return err
	}
	got, err := p.copy(*w, f)
	if err == nil && got != f.Digest {
		err = errChanged
	}
	return err
}

// archive ends it with the list.
func (p *packing) archive(old *List) (*Archive, error) {
	a := &Archive{Bytes: p.list.Bytes(), made: p.made}
	var part Part
	if old != nil && p.list.same(old) {
		part = old.part
	} else {
		var at string
		var err error
		if part, at, err = p.list.write(p.temp); err != nil {
			return nil, err
		}
		p.made[part.Blob.Digest] = at
	}
	a.Parts = append(a.Parts, part)
	for _, k := range p.list.Packs {
		a.Parts = append(a.Parts, k.part())
	}
	return a, nil
}
