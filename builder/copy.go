package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"

	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/dchapes-mode"

	"filo/dockerfile"
	"filo/layer"
)

// copyKey is what of a COPY or ADD goes into its key, apart from the layers below and the content of its sources.
type copyKey struct {
	Copy    string // names the op among others
	Dest    string
	Chown   string `json:",omitempty"`
	Chmod   string `json:",omitempty"`
	Parents bool   `json:",omitempty"`
	Link    bool   `json:",omitempty"`
	Epoch   *int64 `json:",omitempty"`
}

// copyStep is a COPY or ADD with its sources found.
type copyStep struct {
	op     *dockerfile.Copy
	source []picked
	close  []func() error // what was fetched for it
}

// link reports whether the layer is made on an empty root and put on top. As in BuildKit --chmod turns that off.
func (c copyStep) link() bool { return c.op.Link && c.op.Chmod == "" }

// Close lets go of what was fetched.
func (c copyStep) Close() error {
	var errs []error
	for _, f := range c.close {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// find finds and digests the sources of op.
func (w *walk) find(ctx context.Context, op *dockerfile.Copy) (c copyStep, err error) {
	c.op = op
	var from *origin
	for _, src := range op.Sources {
		var p []picked
		switch {
		case src.Inline != nil:
			p = []picked{pickInline(*src.Inline)}
		case src.URL != "":
			p, err = w.fetch(ctx, &c, src)
		default:
			if from == nil {
				var of *layered
				if of, err = w.origin(ctx, op.From); err != nil {
					return c, err
				}
				from = &of.origin
			}
			p, err = from.pick(ctx, selection{
				path: src.Path, pivot: src.Pivot, exclude: op.Exclude, contents: true,
				unpack: op.Add && deref(op.Unpack, true),
			})
		}
		if err != nil {
			return c, err
		}
		c.source = append(c.source, p...)
	}
	return c, nil
}

// fetch gets what ADD names by a URL.
func (w *walk) fetch(ctx context.Context, c *copyStep, src dockerfile.Source) ([]picked, error) {
	if w.req.Open == nil {
		return nil, fmt.Errorf("ADD %s: this build fetches nothing", src.URL)
	}
	f, err := w.req.Open(ctx, src.URL, c.op.Checksum, c.op.KeepGitDir)
	if err != nil {
		return nil, err
	}
	if f.Close != nil {
		c.close = append(c.close, f.Close)
	}
	w.inputs.fetched(src.URL, f)
	o := &origin{fs: f.FS}
	s := selection{path: "/" + f.Name, literal: true, exclude: c.op.Exclude, unpack: f.Name != "" && deref(c.op.Unpack, false)}
	return o.pick(ctx, s)
}

// pickInline makes a source of a here-document.
func pickInline(in dockerfile.Inline) picked {
	e := layer.Entry{Path: ".", Type: layer.Regular, Mode: 0o644, Size: int64(len(in.Data)), Digest: digest.FromBytes(in.Data)}
	return picked{
		name: in.Name, made: true, top: file{Entry: e},
		open: func(string) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(in.Data)), nil },
	}
}

// key returns the op and the inputs of the key of c.
func (c copyStep) key(epoch *int64) (copyKey, []digest.Digest) {
	op := c.op
	k := copyKey{"copy", op.Dest, op.Chown, op.Chmod, op.Parents, c.link(), epoch}
	var inputs []digest.Digest
	for _, p := range c.source {
		inputs = append(inputs, p.digest())
	}
	return k, inputs
}

// copy does a COPY or ADD on the layers below and returns the layer of what it changed.
func (w *walk) copy(ctx context.Context, v *vertex, c copyStep, below []layer.Layer, created int64, sinks layer.Sinks) (layer.Layer, error) {
	var view *layer.View
	if !c.link() {
		var err error
		if view, err = w.Store.View(ctx, below); err != nil {
			return layer.Layer{}, err
		}
	}
	a, err := attributesOf(c.op, view)
	if err != nil {
		return layer.Layer{}, err
	}
	p := newPlan(view, created)
	sp := &spool{store: w.Store}
	defer sp.Close()
	for i := range c.source {
		if err := p.copyOrUnpack(&c.source[i], c.op.Dest, a, sp); err != nil {
			return layer.Layer{}, err
		}
	}
	return w.create(ctx, v, p, sinks)
}

func (p *plan) copyOrUnpack(src *picked, dest string, a attributes, sp *spool) error {
	if src.unpack && src.top.Type == layer.Regular {
		if done, err := p.unpack(src, dest, a, sp); done || err != nil {
			return err
		}
	}
	return p.copy(src, dest, a)
}

// create makes a layer of what p changes. Bytes that are not those keyed are an error that wraps [layer.ErrChanged].
func (w *walk) create(ctx context.Context, v *vertex, p *plan, sinks layer.Sinks) (layer.Layer, error) {
	if err := w.turn(ctx, v); err != nil {
		return layer.Layer{}, err
	}
	defer w.jobs.Release(1)
	defer v.phase(Copying)()
	lw, err := w.Store.Create(ctx, sinks)
	if err != nil {
		return layer.Layer{}, err
	}
	if err := p.write(lw); err != nil {
		lw.Abort()
		return layer.Layer{}, err
	}
	return lw.Close()
}

// turn waits until one more step may be done.
func (w *walk) turn(ctx context.Context, v *vertex) error {
	defer v.phase(Waiting)()
	return w.jobs.Acquire(ctx, 1)
}

// attributesOf works out --chown and --chmod of op; names are looked up in v.
func attributesOf(op *dockerfile.Copy, v *layer.View) (a attributes, err error) {
	if op.Chown != "" {
		acc, err := readAccounts(v)
		if err != nil {
			return a, err
		}
		o, err := acc.chown(op.Chown)
		if err != nil {
			return a, err
		}
		a.chown = &o
	}
	if op.Chmod == "" {
		return a, nil
	}
	if n, err := strconv.ParseUint(op.Chmod, 8, 32); err == nil {
		m := uint32(n)
		a.octal = &m
		a.chmod = func(uint32, bool) uint32 { return m }
		return a, nil
	}
	set, err := mode.ParseWithUmask(op.Chmod, 0)
	if err != nil {
		return a, fmt.Errorf("--chmod=%s: %w", op.Chmod, err)
	}
	a.chmod = func(m uint32, isDir bool) uint32 {
		fm := fileMode(m)
		if isDir {
			fm |= fs.ModeDir
		}
		return unixMode(set.Apply(fm))
	}
	return a, nil
}

// modeBits pairs the bits above the permissions as the kernel and as io/fs write them.
func modeBits() map[uint32]fs.FileMode {
	return map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky}
}

// fileMode returns the permissions m, 07777, as io/fs writes them.
func fileMode(m uint32) fs.FileMode {
	out := fs.FileMode(m & 0o777)
	for k, v := range modeBits() {
		if m&k != 0 {
			out |= v
		}
	}
	return out
}

// unixMode is the inverse of fileMode.
func unixMode(m fs.FileMode) uint32 {
	out := uint32(m.Perm())
	for k, v := range modeBits() {
		if m&v != 0 {
			out |= k
		}
	}
	return out
}

// mkdir does a WORKDIR: what is missing of the path is made and belongs to the step's user.
func (w *walk) mkdir(ctx context.Context, v *vertex, op *dockerfile.Mkdir, below []layer.Layer, created int64, sinks layer.Sinks) (layer.Layer, error) {
	view, err := w.Store.View(ctx, below)
	if err != nil {
		return layer.Layer{}, err
	}
	acc, err := readAccounts(view)
	if err != nil {
		return layer.Layer{}, err
	}
	if len(below) == 0 {
		if _, err := acc.chown(op.User); err != nil {
			return layer.Layer{}, fmt.Errorf("USER %s: the image is empty, only numbers can be users", op.User)
		}
	}
	p := newPlan(view, created)
	dir, err := p.resolve(".", op.Path)
	if err != nil {
		return layer.Layer{}, err
	}
	if err := p.mkdirAll(dir, 0o755, acc.maker(op.User)); err != nil {
		return layer.Layer{}, err
	}
	return w.create(ctx, v, p, sinks)
}
