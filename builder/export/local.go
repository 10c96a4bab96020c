package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"golang.org/x/sync/errgroup"

	"filo/builder/image"
	"filo/layer"
	"filo/layer/rootfs"
)

// part is the file system of one image and the directory of the output that it goes to.
type part struct {
	view *layer.View
	from string // directory of the view
	dir  string // directory of the output; "." for the output itself
}

// parts opens the file systems of a result.
func (e Exporter) parts(ctx context.Context, p plan, r Result) ([]part, error) {
	if r.Descriptor != nil {
		return nil, errors.New("only images of a build have files to export")
	}
	split := len(r.Images) > 1 || r.Index
	if p.split != nil {
		split = *p.split
	}
	all := make([]part, len(r.Images))
	g, gctx := errgroup.WithContext(ctx)
	for i, img := range r.Images {
		g.Go(func() (err error) {
			all[i] = part{dir: ".", from: "."}
			if split {
				all[i].dir = strings.ReplaceAll(platforms.Format(platforms.Normalize(image.Platform(img.Config))), "/", "_")
			}
			if err := gctx.Err(); err != nil {
				return err
			}
			if all[i].view, err = e.Store.View(ctx, img.Layers); err != nil || p.src == "" {
				return err
			}
			all[i].from, err = subtree(all[i].view, p.src)
			return err
		})
	}
	return all, g.Wait()
}

// subtree returns the directory of the view that src= names.
func subtree(v *layer.View, src string) (string, error) {
	at, err := v.Resolve(src, true)
	if err != nil {
		return "", fmt.Errorf("src=%s: %w", src, err)
	}
	entry, ok := v.Entry(at)
	if !ok {
		return "", fmt.Errorf("src=%s: %w", src, fs.ErrNotExist)
	}
	if entry.Type != layer.Dir {
		return "", fmt.Errorf("src=%s: not a directory", src)
	}
	return at, nil
}

// local writes root file systems into a directory. Other files there stay, unless mode=delete.
func (e Exporter) local(ctx context.Context, o Output, p plan, r Result) error {
	if p.remove {
		if err := e.mayDelete(o.Dest); err != nil {
			return err
		}
	}
	parts, err := e.parts(ctx, p, r)
	if err != nil {
		return err
	}
	documents, err := e.documents(ctx, p, r, parts)
	if err != nil {
		return err
	}
	done := e.begin("copying files to " + o.Dest)
	err = e.localParts(ctx, o.Dest, p, r, parts, documents)
	done(err)
	return err
}

func (e Exporter) localParts(ctx context.Context, dest string, p plan, r Result, parts []part, documents [][]document) error {
	if err := os.MkdirAll(dest, 0o755); err != nil {
		return err
	}
	root, err := rootfs.Open(dest)
	if err != nil {
		return err
	}
	defer root.Close()
	w := &localWriter{e: e, root: root, epoch: r.Epoch, remove: p.remove, kept: map[string]bool{}}
	for i, part := range parts {
		w.view, w.links, w.alone = part.view, map[string]string{}, i == 0 || part.dir != "."
		if err := w.part(ctx, part); err != nil {
			return err
		}
		for _, d := range documents[i] {
			if err := w.document(part.dir, d, r.documentEntry(d)); err != nil {
				return fmt.Errorf("export %s: %w", d.name, err)
			}
		}
	}
	if p.remove {
		return w.sweep(root)
	}
	return nil
}

// mayDelete refuses mode=delete for a destination that is not strictly below the working directory: a slip
// there would empty somebody's home.
func (e Exporter) mayDelete(dest string) error {
	if e.AllowDelete {
		return nil
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(dest)
	if err != nil {
		return err
	}
	for _, p := range []*string{&wd, &abs} {
		if *p, err = real(*p); err != nil {
			return err
		}
	}
	if rel, err := filepath.Rel(wd, abs); err != nil || !filepath.IsLocal(rel) || rel == "." {
		return fmt.Errorf("mode=delete: %s is not below the working directory; allow it with --allow buildx.local.delete", dest)
	}
	return nil
}

// real resolves the links of the part of a path that exists.
func real(p string) (string, error) {
	r, err := filepath.EvalSymlinks(p)
	if !errors.Is(err, fs.ErrNotExist) || p == filepath.Dir(p) {
		return r, err
	}
	dir, err := real(filepath.Dir(p))
	return filepath.Join(dir, filepath.Base(p)), err
}

// localWriter writes the files of a view below a directory.
type localWriter struct {
	e       Exporter
	root    *rootfs.Root
	view    *layer.View
	epoch   *int64
	remove  bool
	alone   bool              // no other image was written to the same place
	links   map[string]string // inode of the view: where its first name was written
	kept    map[string]bool   // output paths written, for mode=delete and to see collisions
	temps   int
	devices bool // it was said that devices are left out
}

func (w *localWriter) part(ctx context.Context, p part) error {
	d, err := w.root.Dir(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if p.dir == "." {
		return w.fill(ctx, d, p.from, ".")
	}
	w.kept[p.dir] = true
	if err := w.mkdir(d, p.dir); err != nil {
		return err
	}
	sub, err := d.Dir(p.dir)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := w.fill(ctx, sub, p.from, p.dir); err != nil {
		return err
	}
	return d.Chmod(p.dir, 0o755)
}

// fill writes what the view has in directory from into d, which is at path to of the output.
func (w *localWriter) fill(ctx context.Context, d *rootfs.Dir, from, to string) error {
	list, err := w.view.ReadDir(from)
	if err != nil {
		return err
	}
	for _, item := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		at := path.Join(from, item.Name())
		entry, ok := w.view.Entry(at)
		if !ok {
			return fmt.Errorf("read %s: %w", at, fs.ErrNotExist)
		}
		out := path.Join(to, item.Name())
		if !w.alone && w.kept[out] && entry.Type != layer.Dir {
			return fmt.Errorf("platform-split=false: %s is in the images of several platforms", out)
		}
		w.kept[out] = true
		if err := w.entry(ctx, d, item.Name(), at, out, entry); err != nil {
			return err
		}
	}
	return nil
}

func (w *localWriter) entry(ctx context.Context, d *rootfs.Dir, name, at, out string, entry *layer.Entry) error {
	if entry.Type == layer.Dir {
		return w.dir(ctx, d, name, at, out, entry)
	}
	inode := w.view.Inode(at)
	if first, ok := w.links[inode]; ok {
		if err := w.clear(d, name); err != nil {
			return err
		}
		return w.root.Link(first, out)
	}
	made, err := w.file(d, name, at, out, entry)
	if made {
		w.links[inode] = out
	}
	return err
}

// file writes what is no directory, and reports whether it did. Devices are left out where it takes root to make them.
func (w *localWriter) file(d *rootfs.Dir, name, at, out string, entry *layer.Entry) (made bool, err error) {
	switch entry.Type {
	case layer.Regular:
		return true, w.regular(d, name, at, entry)
	case layer.Symlink:
		return true, w.place(d, name, entry, func(tmp string) error { return d.Symlink(entry.Link, tmp) })
	case layer.Fifo:
		return true, w.place(d, name, entry, func(tmp string) error { return d.Mknod(tmp, fifo|0o600, 0, 0) })
	case layer.Char, layer.Block:
		if !w.e.Devices {
			if !w.devices {
				w.e.warn("device files such as %s are left out: making them takes root", out)
			}
			w.devices = true
			return false, nil
		}
		kind := uint32(char)
		if entry.Type == layer.Block {
			kind = block
		}
		return true, w.place(d, name, entry, func(tmp string) error { return d.Mknod(tmp, kind|0o600, entry.Major, entry.Minor) })
	case layer.Dir, layer.Hardlink, layer.Whiteout, layer.Opaque: // a view shows none of the last
	}
	return false, fmt.Errorf("export %s: unexpected entry type %q", out, entry.Type)
}

// File types as mknod(2) takes them.
const (
	fifo  = 0o010000
	char  = 0o020000
	block = 0o060000
)

func (w *localWriter) dir(ctx context.Context, d *rootfs.Dir, name, at, out string, entry *layer.Entry) error {
	if err := w.mkdir(d, name); err != nil {
		return err
	}
	sub, err := d.Dir(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := w.fill(ctx, sub, at, out); err != nil {
		return err
	}
	return w.attributes(d, name, entry)
}

// mkdir makes a directory unless there is one. A file or a link in its place gives way. One that an earlier
// export shut to its owner is opened; it gets its mode back when it is filled.
func (w *localWriter) mkdir(d *rootfs.Dir, name string) error {
	st, err := d.Lstat(name)
	if err == nil && st.FileMode().IsDir() {
		if st.Mode&0o700 == 0o700 || w.e.Devices {
			return nil
		}
		return d.Chmod(name, st.Mode&0o7777|0o700)
	}
	if err == nil {
		err = d.Remove(name)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return d.Mkdir(name, 0o700)
}

// regular writes a regular file.
func (w *localWriter) regular(d *rootfs.Dir, name, at string, entry *layer.Entry) error {
	return w.place(d, name, entry, func(tmp string) error {
		f, err := d.Create(tmp, 0o600)
		if err != nil {
			return err
		}
		return errors.Join(w.content(f, at, entry), f.Close())
	})
}

func (w *localWriter) content(to io.Writer, at string, entry *layer.Entry) error {
	from, err := w.view.Open(at)
	if err != nil {
		return err
	}
	defer from.Close()
	n, err := io.Copy(to, from)
	if err == nil && n != entry.Size {
		err = fmt.Errorf("%s: %d bytes, want %d: %w", at, n, entry.Size, io.ErrUnexpectedEOF)
	}
	return err
}

// place makes something under a temporary name and renames it: what had the name is there until then.
func (w *localWriter) place(d *rootfs.Dir, name string, entry *layer.Entry, make func(tmp string) error) error {
	tmp, err := w.temp(d)
	if err != nil {
		return err
	}
	err = make(tmp)
	if err == nil {
		err = w.attributes(d, tmp, entry)
	}
	if err == nil {
		err = w.rename(d, tmp, name)
	}
	if err != nil {
		_ = d.Remove(tmp) // the first error is the one to tell
	}
	return err
}

func (w *localWriter) rename(d *rootfs.Dir, tmp, name string) error {
	if st, err := d.Lstat(name); err == nil && st.FileMode().IsDir() {
		if err := w.clear(d, name); err != nil {
			return err
		}
	}
	return d.Rename(tmp, d, name)
}

// clear makes way. A directory that has files is only removed if the user asked for deletion.
func (w *localWriter) clear(d *rootfs.Dir, name string) error {
	if w.remove {
		return d.RemoveAll(name)
	}
	err := d.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("a directory is in the way of a file: %w", err)
	}
	return nil
}

// temp returns a name that is free in d.
func (w *localWriter) temp(d *rootfs.Dir) (string, error) {
	for {
		w.temps++
		name := unfinished + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(w.temps)
		_, err := d.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			return name, nil
		}
		if err != nil {
			return "", err
		}
	}
}

// document writes a file that is not of the view.
func (w *localWriter) document(dir string, doc document, entry *layer.Entry) error {
	out := path.Join(dir, doc.name)
	if w.kept[out] {
		return taken(out)
	}
	w.kept[out] = true
	d, err := w.root.Dir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return w.place(d, doc.name, entry, func(tmp string) error {
		f, err := d.Create(tmp, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(doc.data)
		return errors.Join(err, f.Close())
	})
}

// attributes sets extended attributes, mode and time. As with other builders files belong to the caller, root or not.
func (w *localWriter) attributes(d *rootfs.Dir, name string, entry *layer.Entry) error {
	for k, v := range entry.Xattrs {
		if !strings.HasPrefix(k, "user.") || entry.Type == layer.Symlink {
			continue
		}
		if err := d.SetXattr(name, k, v); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return d.Set(name, rootfs.Attr{Mode: rootfs.Mode(entry.Mode), Time: &rootfs.Time{Sec: clamped(entry.ModTime, w.epoch)}})
}

// clamped is a time no later than the epoch, if there is one.
func clamped(sec int64, epoch *int64) int64 {
	if epoch != nil {
		return min(sec, *epoch)
	}
	return sec
}

// sweep removes what the images do not have.
func (w *localWriter) sweep(root *rootfs.Root) error {
	d, err := root.Dir(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return w.sweepDir(d, ".")
}

func (w *localWriter) sweepDir(d *rootfs.Dir, at string) error {
	names, err := d.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		out := path.Join(at, name)
		if !w.kept[out] {
			if err := d.RemoveAll(name); err != nil {
				return err
			}
			continue
		}
		st, err := d.Lstat(name)
		if err != nil {
			return err
		}
		if !st.FileMode().IsDir() {
			continue
		}
		if err := w.sweepInto(d, name, out, st); err != nil {
			return err
		}
	}
	return nil
}

// sweepInto sweeps a directory and gives it back the time that removing takes from it.
func (w *localWriter) sweepInto(d *rootfs.Dir, name, out string, st rootfs.Stat) error {
	sub, err := d.Dir(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := w.sweepDir(sub, out); err != nil {
		return err
	}
	return d.Chtimes(name, rootfs.Time{Sec: st.Sec, Nsec: st.Nsec})
}
