package export

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"time"

	"filo/layer"
)

// member is one entry of the tar: where it goes and where it is from.
type member struct {
	out   string
	at    string // in the view
	view  *layer.View
	entry *layer.Entry
	data  []byte // of what is not from a view
}

// tar writes root file systems as one tar, in canonical order.
func (e Exporter) tar(ctx context.Context, o Output, p plan, r Result) error {
	parts, err := e.parts(ctx, p, r)
	if err != nil {
		return err
	}
	members, err := listing(parts)
	if err != nil {
		return err
	}
	documents, err := e.documents(ctx, p, r, parts)
	if err != nil {
		return err
	}
	if members, err = withDocuments(members, parts, documents, r); err != nil {
		return err
	}
	done := e.begin("sending tarball")
	err = o.stream(func(w io.Writer) error { return writeTar(ctx, w, members, r.Epoch) })
	done(err)
	return err
}

// listing is all entries of all parts. A directory that several have is listed once, a file is an error.
func listing(parts []part) ([]member, error) {
	var all []member
	for _, p := range parts {
		if p.dir != "." {
			all = append(all, member{out: p.dir, entry: &layer.Entry{Type: layer.Dir, Mode: 0o755}})
		}
		if err := p.list(p.from, p.dir, &all); err != nil {
			return nil, err
		}
	}
	if len(parts) == 1 {
		return all, nil
	}
	slices.SortStableFunc(all, func(a, b member) int { return layer.ComparePaths(a.out, b.out) })
	merged := all[:0]
	for _, m := range all {
		if len(merged) == 0 || merged[len(merged)-1].out != m.out {
			merged = append(merged, m)
			continue
		}
		if m.entry.Type != layer.Dir || merged[len(merged)-1].entry.Type != layer.Dir {
			return nil, fmt.Errorf("platform-split=false: %s is in the images of several platforms", m.out)
		}
	}
	return merged, nil
}

// withDocuments adds the attestations of each part.
func withDocuments(members []member, parts []part, documents [][]document, r Result) ([]member, error) {
	added := 0
	for i, list := range documents {
		for _, d := range list {
			members = append(members, member{out: path.Join(parts[i].dir, d.name), entry: r.documentEntry(d), data: d.data})
			added++
		}
	}
	if added == 0 {
		return members, nil
	}
	slices.SortStableFunc(members, func(a, b member) int { return layer.ComparePaths(a.out, b.out) })
	for i := range members[1:] {
		if members[i].out == members[i+1].out {
			return nil, taken(members[i].out)
		}
	}
	return members, nil
}

func (p part) list(from, to string, all *[]member) error {
	list, err := p.view.ReadDir(from)
	if err != nil {
		return err
	}
	for _, item := range list {
		at := path.Join(from, item.Name())
		entry, ok := p.view.Entry(at)
		if !ok {
			return fmt.Errorf("read %s: %w", at, fs.ErrNotExist)
		}
		out := path.Join(to, item.Name())
		*all = append(*all, member{out: out, at: at, view: p.view, entry: entry})
		if entry.Type != layer.Dir {
			continue
		}
		if err := p.list(at, out, all); err != nil {
			return err
		}
	}
	return nil
}

func writeTar(ctx context.Context, w io.Writer, members []member, epoch *int64) error {
	t := tar.NewWriter(w)
	links := map[string]string{}
	for _, m := range members {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.write(t, links, epoch); err != nil {
			return fmt.Errorf("export %s: %w", m.out, err)
		}
	}
	return t.Close()
}

func (m member) write(t *tar.Writer, links map[string]string, epoch *int64) error {
	h := m.header(epoch)
	if m.entry.Type == layer.Dir {
		return t.WriteHeader(h)
	}
	if m.view == nil {
		h.Size = m.entry.Size
		err := t.WriteHeader(h)
		if err == nil {
			_, err = t.Write(m.data)
		}
		return err
	}
	// Platforms are separate file systems even where they share a layer.
	inode := fmt.Sprintf("%p %s", m.view, m.view.Inode(m.at))
	if first, ok := links[inode]; ok {
		h.Typeflag, h.Linkname, h.Size, h.Devmajor, h.Devminor = tar.TypeLink, first, 0, 0, 0
		return t.WriteHeader(h)
	}
	links[inode] = m.out
	h.Size = m.entry.Size
	if err := t.WriteHeader(h); err != nil || m.entry.Type != layer.Regular {
		return err
	}
	f, err := m.view.Open(m.at)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(t, f)
	if err == nil && n != h.Size {
		err = io.ErrUnexpectedEOF
	}
	return err
}

var typeflags = map[layer.Type]byte{
	layer.Regular: tar.TypeReg,
	layer.Dir:     tar.TypeDir,
	layer.Symlink: tar.TypeSymlink,
	layer.Char:    tar.TypeChar,
	layer.Block:   tar.TypeBlock,
	layer.Fifo:    tar.TypeFifo,
}

func (m member) header(epoch *int64) *tar.Header {
	h := &tar.Header{
		Typeflag: typeflags[m.entry.Type],
		Name:     m.out,
		Mode:     int64(m.entry.Mode),
		Uid:      m.entry.UID,
		Gid:      m.entry.GID,
		ModTime:  time.Unix(clamped(m.entry.ModTime, epoch), 0),
		Devmajor: int64(m.entry.Major),
		Devminor: int64(m.entry.Minor),
	}
	if m.entry.Type == layer.Dir {
		h.Name += "/"
	}
	if m.entry.Type == layer.Symlink {
		h.Linkname = m.entry.Link
	}
	for k, v := range m.entry.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	return h
}
