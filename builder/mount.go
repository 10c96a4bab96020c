package builder

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gofrs/flock"
	"github.com/opencontainers/go-digest"

	"filo/builder/sandbox"
	"filo/dockerfile"
	"filo/layer"
)

// mountKey is what of a mount goes into the key of its RUN: that it is there, where, and what it shows.
type mountKey struct {
	Type     dockerfile.MountType
	Target   string        `json:",omitempty"`
	ReadOnly bool          `json:",omitempty"`
	Content  digest.Digest `json:",omitempty"` // bind, cache: where it starts from
	Source   string        `json:",omitempty"` // cache without from: the directory in it that is shown, unless it is all
	ID       string        `json:",omitempty"` // secret, ssh
	Env      string        `json:",omitempty"`
	Size     int64         `json:",omitempty"`
	Mode     *uint32       `json:",omitempty"` // secret, ssh, cache
	UID, GID *int          `json:",omitempty"`
}

// mount is a RUN --mount whose content is found and keyed.
type mount struct {
	dockerfile.Mount
	key    mountKey
	source []picked      // bind, cache: what is shown
	layers []layer.Layer // bind, cache of a stage or image: where it is; nil for files that must be made a layer first
	cache  string        // cache: names its directory
}

// prepare finds what the mounts of op show.
func (w *walk) prepare(ctx context.Context, op *dockerfile.Run) (runStep, error) {
	r := runStep{op: op}
	for _, m := range op.Mounts {
		pm, err := w.prepareMount(ctx, m)
		if err != nil {
			return r, err
		}
		r.mounts = append(r.mounts, pm)
	}
	return r, nil
}

func (w *walk) prepareMount(ctx context.Context, m dockerfile.Mount) (mount, error) {
	pm := mount{Mount: m, key: mountKey{Type: m.Type, Target: m.Target, ReadOnly: m.ReadOnly}}
	switch m.Type {
	case dockerfile.MountTmpfs:
		pm.key.Size = m.Size
	case dockerfile.MountSecret, dockerfile.MountSSH:
		pm.key.ID, pm.key.Env, pm.key.Mode, pm.key.UID, pm.key.GID = m.ID, m.Env, m.Mode, m.UID, m.GID
	case dockerfile.MountBind:
		if err := w.prepareSource(ctx, &pm); err != nil {
			return pm, err
		}
		pm.key.Content = pm.source[0].shown()
	case dockerfile.MountCache: // what makes it another cache apart from its ID, see cacheName
		pm.key.Mode, pm.key.UID, pm.key.GID = m.Mode, m.UID, m.GID
		switch {
		case m.HasFrom:
			if err := w.prepareSource(ctx, &pm); err != nil {
				return pm, err
			}
			pm.key.Content = pm.source[0].shown()
		case m.Source != "/":
			pm.key.Source = m.Source
		}
		pm.cache = cacheName(pm)
	}
	return pm, nil
}

// shown names what a mount of p shows: of a directory, unlike a copy of its files, the mode as well.
func (p *picked) shown() digest.Digest {
	return digest.FromString(fmt.Sprintf("%s %o", p.digest(), p.top.Mode))
}

// cacheName names the cache of a mount: its ID and how it begins.
func cacheName(m mount) string {
	h := sha256.New()
	fmt.Fprintf(h, "%q %v %v %v\n", m.ID, deref(m.Mode, 0o755), deref(m.UID, 0), deref(m.GID, 0))
	if m.HasFrom {
		fmt.Fprintln(h, m.source[0].digest())
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func (w *walk) prepareSource(ctx context.Context, m *mount) error {
	from, err := w.origin(ctx, m.From)
	if err != nil {
		return err
	}
	m.layers = from.layers
	m.source, err = from.pick(ctx, selection{path: cmp.Or(m.Source, "/"), literal: true, contents: true})
	return err
}

// mount adds the mounts of r to p, whose root is view. The caller calls the function it returns, also after an error,
// when p has ended.
func (w *walk) mount(ctx context.Context, p *sandbox.Process, r runStep, view *layer.View) (release func(), err error) {
	var held []func()
	release = func() {
		for _, f := range slices.Backward(held) {
			f()
		}
	}
	caches := map[string]sandbox.Mount{}
	for _, m := range claimed(r.mounts) {
		sm, free, err := w.cacheMount(ctx, m)
		if free != nil {
			held = append(held, free)
		}
		if err != nil {
			return release, err
		}
		caches[m.cache] = sm
	}
	for _, m := range r.mounts {
		var sm sandbox.Mount
		var free func()
		switch m.Type {
		case dockerfile.MountBind:
			sm, free, err = w.bind(ctx, m)
		case dockerfile.MountCache:
			sm = caches[m.cache]
			if !m.HasFrom { // otherwise the cache began as the source
				sm.Subpath = m.Source
			}
		case dockerfile.MountTmpfs:
			sm = sandbox.Mount{Type: sandbox.Tmpfs, Size: m.Size, Mode: dirMode(view, m.Target)}
		case dockerfile.MountSecret:
			sm, err = w.secret(p, m)
		case dockerfile.MountSSH:
			sm, free, err = w.ssh(ctx, m)
		}
		if free != nil {
			held = append(held, free)
		}
		if err != nil {
			return release, err
		}
		if sm.Type == "" {
			continue
		}
		sm.Target, sm.ReadOnly = cmp.Or(sm.Target, m.Target), m.ReadOnly
		p.Mounts = append(p.Mounts, sm)
	}
	slices.SortStableFunc(p.Mounts, func(a, b sandbox.Mount) int { // a mount must not hide one below it
		return strings.Count(path.Clean(a.Target), "/") - strings.Count(path.Clean(b.Target), "/")
	})
	return release, nil
}

// dirMode returns the mode of the directory that v has at target: a tmpfs mounted on it has the same. 0 is none.
func dirMode(v *layer.View, target string) uint32 {
	name, err := v.Resolve(target, true)
	if err != nil {
		return 0
	}
	if e, ok := v.Entry(name); ok && e.Type == layer.Dir {
		return e.Mode
	}
	return 0
}

// claimed returns the cache mounts among mounts, each cache once and in one order for everybody: two steps must not wait
// for each other's. Of several mounts of one cache the strictest says how it is shared.
func claimed(mounts []mount) []mount {
	caches := slices.DeleteFunc(slices.Clone(mounts), func(m mount) bool { return m.Type != dockerfile.MountCache })
	slices.SortFunc(caches, func(a, b mount) int {
		return cmp.Or(strings.Compare(a.cache, b.cache), strings.Compare(a.Sharing, b.Sharing)) // locked, private, shared
	})
	return slices.CompactFunc(caches, func(a, b mount) bool { return a.cache == b.cache })
}

// lockPause is how often a busy lock of a cache mount is tried again.
const lockPause = 20 * time.Millisecond

// bind shows files of the context, a stage or an image; what is written to a writable one is thrown away.
func (w *walk) bind(ctx context.Context, m mount) (sandbox.Mount, func(), error) {
	layers, sub := m.layers, m.Source
	if layers == nil {
		l, at, err := w.materialise(ctx, m.source)
		if err != nil {
			return sandbox.Mount{}, nil, err
		}
		layers, sub = []layer.Layer{l}, at
	}
	o, err := w.Store.Part(ctx, layers, sub)
	if err != nil {
		return sandbox.Mount{}, nil, err
	}
	w.trial.await(o.Trees)
	root := rootOf(o)
	if m.ReadOnly {
		root.Upper, root.Work = "", ""
	}
	return sandbox.Mount{Type: sandbox.Overlay, Root: root, Subpath: sub, File: !m.source[0].isDir()}, func() { o.Close() }, nil
}

// materialise makes a layer of files that are in no layer yet and returns it with where in it they are.
func (w *walk) materialise(ctx context.Context, source []picked) (layer.Layer, string, error) {
	const at = "/source"
	q, err := ask(struct{ Source string }{"materialise"}, source[0].shown())
	if err != nil {
		return layer.Layer{}, "", err
	}
	m, err := w.remembered(ctx, nil, q, func(ctx context.Context, _ int64) (layer.Layer, error) {
		pl := newPlan(nil, 0)
		root := source[0].top
		if source[0].isDir() {
			root.Path = strings.TrimPrefix(at, "/")
			pl.put(node{Entry: root.Entry})
		}
		if err := pl.copy(&source[0], at, attributes{}); err != nil {
			return layer.Layer{}, err
		}
		return w.create(ctx, nil, pl, layer.Sinks{Tree: true})
	})
	return m.layer, at, err
}

// CacheMount is the directory of a RUN --mount=type=cache.
type CacheMount struct {
	ID       string                                                // as the Dockerfile has it
	Identity string                                                // what names it on any machine
	Dir      string                                                // where its files are
	Hold     func(ctx context.Context) (release func(), err error) // waits for the steps that use it, and keeps others away
}

// cacheMount shows a directory that outlives the build.
func (w *walk) cacheMount(ctx context.Context, m mount) (sandbox.Mount, func(), error) {
	if err := w.trial.verdict(); err != nil { // what is written there cannot be held back
		return sandbox.Mount{}, nil, err
	}
	dir, lock, err := w.readyMount(ctx, filepath.Join(w.Store.Dir(), "mounts"), m)
	if lock == nil {
		return sandbox.Mount{}, nil, fmt.Errorf("cache mount %s: %w", m.ID, err)
	}
	free := func() { lock.Unlock() }
	if err != nil {
		return sandbox.Mount{}, free, fmt.Errorf("cache mount %s: %w", m.ID, err)
	}
	if w.Used != nil && !m.ReadOnly && !m.HasFrom && filepath.Base(dir) == m.cache {
		w.Used(travelling(dir, m))
	}
	return sandbox.Mount{Type: sandbox.Bind, Source: filepath.Join(dir, "data")}, free, nil
}

// readyMount finds or makes the directory of a cache mount and claims it: the lock is not nil then.
func (w *walk) readyMount(ctx context.Context, parent string, m mount) (string, *flock.Flock, error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", nil, err
	}
	if m.Sharing != "private" && w.req.NoCache && w.firstUse(m.cache) {
		if err := w.renew(ctx, filepath.Join(parent, m.cache), m); err != nil {
			return "", nil, err
		}
	}
	if w.Restore != nil && !w.req.NoCache && !m.HasFrom {
		if err := w.restore(ctx, filepath.Join(parent, m.cache), m); err != nil {
			return "", nil, err
		}
	}
	dir, lock, err := w.claim(ctx, parent, m.cache, m.Sharing)
	if err != nil {
		return "", nil, err
	}
	anew := m.Sharing == "private" && w.req.NoCache && w.firstUse(filepath.Base(dir))
	return dir, lock, w.fill(ctx, dir, m, anew)
}

// restore gives the cache mount in dir what it holds elsewhere, if it is empty. If somebody uses it, they have done that.
func (w *walk) restore(ctx context.Context, dir string, m mount) error {
	if filled(dir) {
		return nil
	}
	lock := flock.New(dir + ".lock")
	if ok, err := lock.TryLock(); err != nil || !ok {
		return err
	}
	defer lock.Unlock()
	if filled(dir) {
		return nil
	}
	tmp, err := w.Store.Temp("mount-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	fresh := filepath.Join(tmp, "data")
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	if !w.Restore(ctx, travelling(dir, m), fresh) {
		return ctx.Err()
	}
	return errors.Join(w.dress(fresh, m), swap(fresh, dir, filepath.Join(tmp, "old")))
}

// filled reports whether there is anything in the cache mount in dir.
func filled(dir string) bool {
	d, err := os.Open(filepath.Join(dir, "data"))
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	defer d.Close()
	_, err = d.Readdirnames(1)
	return err != io.EOF
}

// holdTime is how long steps of other builds are waited for that use a cache mount.
const holdTime = 10 * time.Second

// travelling is the cache mount in dir as others are told of it.
func travelling(dir string, m mount) CacheMount {
	return CacheMount{ID: m.ID, Identity: m.cache, Dir: filepath.Join(dir, "data"), Hold: func(ctx context.Context) (func(), error) {
		ctx, cancel := context.WithTimeout(ctx, holdTime)
		defer cancel()
		lock := flock.New(dir + ".lock")
		if ok, err := lock.TryLockContext(ctx, lockPause); err != nil || !ok {
			return nil, errors.New("another build uses it")
		}
		return func() { lock.Unlock() }, nil
	}}
}

// renew makes the cache mount in dir anew, unless somebody uses it.
func (w *walk) renew(ctx context.Context, dir string, m mount) error {
	lock := flock.New(dir + ".lock")
	ok, err := lock.TryLock()
	if err != nil {
		return err
	}
	if !ok {
		w.warn("cache mount %s: another build uses it, so it is not emptied", m.ID)
		return nil
	}
	return errors.Join(w.fill(ctx, dir, m, true), lock.Unlock())
}

// claim returns the directory of the cache id, locked as sharing says: "shared" with others, "locked" alone after
// waiting, "private" alone, or else another directory.
func (w *walk) claim(ctx context.Context, parent, id, sharing string) (string, *flock.Flock, error) {
	for i := 0; ; i++ {
		name := id
		if i > 0 {
			name += "-" + strconv.Itoa(i)
		}
		dir := filepath.Join(parent, name)
		lock := flock.New(dir + ".lock")
		var ok bool
		var err error
		switch sharing {
		case "private":
			ok, err = lock.TryLock()
		case "locked":
			ok, err = lock.TryLockContext(ctx, lockPause)
		default:
			ok, err = lock.TryRLockContext(ctx, lockPause)
		}
		if err != nil || ok {
			return dir, lock, err
		}
	}
}

// fill makes the data of a cache mount if there is none, or makes it anew, and marks it as used now.
func (w *walk) fill(ctx context.Context, dir string, m mount, anew bool) error {
	data := filepath.Join(dir, "data")
	unlock, err := w.Store.Lock(ctx, "mount-"+filepath.Base(dir))
	if err != nil {
		return err
	}
	defer unlock()
	_, err = os.Lstat(data)
	if err == nil && !anew {
		now := w.Now()
		return os.Chtimes(dir, now, now) // for pruning by age
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	tmp, err := w.Store.Temp("mount-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	fresh := filepath.Join(tmp, "data")
	if err := w.begin(ctx, fresh, m); err != nil {
		return err
	}
	return swap(fresh, dir, filepath.Join(tmp, "old"))
}

// swap makes fresh the data of the cache mount in dir; what was there goes to old.
func swap(fresh, dir, old string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	data := filepath.Join(dir, "data")
	if err := os.Rename(data, old); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Rename(fresh, data)
}

// begin makes dir what a cache mount is at its beginning.
func (w *walk) begin(ctx context.Context, dir string, m mount) error {
	if m.HasFrom {
		if err := w.copyOut(ctx, &m.source[0], dir); err != nil {
			return err
		}
	} else if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return w.dress(dir, m)
}

// dress gives the root of a cache mount its owner and mode.
func (w *walk) dress(dir string, m mount) error {
	if m.UID != nil || m.GID != nil {
		if err := os.Chown(dir, deref(m.UID, 0), deref(m.GID, 0)); err != nil && !w.req.SingleID {
			return err
		}
	}
	if m.HasFrom && m.Mode == nil {
		return nil // the mode of the source
	}
	return os.Chmod(dir, fileMode(deref(m.Mode, 0o755)))
}

// copyOut writes the directory src to the new directory dir.
func (w *walk) copyOut(ctx context.Context, src *picked, dir string) error {
	if !src.isDir() {
		return fmt.Errorf("source %s: not a directory", src.name)
	}
	var dirs []*file
	for f := range src.files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.copyOutFile(src, *f, filepath.Join(dir, f.Path)); err != nil {
			return err
		}
		if f.Type == layer.Dir {
			dirs = append(dirs, f)
		}
	}
	for _, f := range slices.Backward(dirs) { // a directory's own mode may forbid to fill it
		if err := os.Chmod(filepath.Join(dir, f.Path), fileMode(f.Mode)); err != nil {
			return err
		}
	}
	return nil
}

// copyOutFile writes one file of src to at, where nothing is. Above it are only directories that copyOut made.
func (w *walk) copyOutFile(src *picked, f file, at string) error {
	switch f.Type {
	case layer.Dir:
		if err := os.Mkdir(at, 0o700); err != nil {
			return err
		}
	case layer.Symlink:
		if err := os.Symlink(f.Link, at); err != nil {
			return err
		}
	case layer.Regular:
		if err := writeFile(src, f, at); err != nil {
			return err
		}
	default:
		w.warn("cache mount: /%s is a special file and left out", f.Path)
		return nil
	}
	if w.req.SingleID {
		return nil
	}
	return os.Lchown(at, f.UID, f.GID)
}

func writeFile(src *picked, f file, at string) error {
	r, err := src.open(path.Join(src.root, f.Path))
	if err != nil {
		return err
	}
	defer r.Close()
	out, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, r)
	return errors.Join(err, out.Chmod(fileMode(f.Mode)), out.Close())
}

// firstUse reports whether this build has not used the cache mount of that name before.
func (w *walk) firstUse(name string) bool {
	_, used := w.cacheMounts.LoadOrStore(name, true)
	return !used
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

// secret shows a secret as a file, a variable, or both.
func (w *walk) secret(p *sandbox.Process, m mount) (sandbox.Mount, error) {
	get, ok := w.req.Secrets[m.ID]
	if !ok {
		if m.Required {
			return sandbox.Mount{}, fmt.Errorf("secret %s: %w: give it with --secret id=%s,src=FILE", m.ID, errNotFound, m.ID)
		}
		if m.Env != "" {
			p.Env = append(p.Env, m.Env+"=")
		}
		return sandbox.Mount{}, nil
	}
	data, err := get()
	if err != nil {
		return sandbox.Mount{}, fmt.Errorf("secret %s: %w", m.ID, err)
	}
	if m.Env != "" {
		p.Env = append(p.Env, m.Env+"="+string(data))
	}
	if m.Target == "" {
		return sandbox.Mount{}, nil
	}
	return sandbox.Mount{
		Type: sandbox.Data, Data: data, Mode: deref(m.Mode, 0o400), UID: deref(m.UID, 0), GID: deref(m.GID, 0), NoExec: true,
	}, nil
}
