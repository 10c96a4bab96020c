package remote

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"filo/cache"
	"filo/cache/mounts"
)

// Mount is a cache mount of a step: see [Cache.Restore] and [Cache.Export].
type Mount struct {
	ID       string                                                // as the Dockerfile has it
	Identity string                                                // what names it on any machine
	Dir      string                                                // where its files are
	Hold     func(ctx context.Context) (release func(), err error) // keeps steps from changing them
}

// key names a cache mount in an index.
func (m Mount) key() (cache.Key, error) {
	return cache.Key("").Next(struct{ CacheMount string }{m.Identity})
}

// mountEntry is what an index has of a cache mount.
type mountEntry struct {
	parts   []mounts.Part // the list first
	bytes   int64         // of the files
	created int64         // seconds since the epoch
	used    int64         // the same, whole days
}

func (e mountEntry) has(blob digest.Digest) bool {
	return slices.ContainsFunc(e.parts, func(p mounts.Part) bool { return p.Blob.Digest == blob })
}

// trimMounts drops cache mounts that were used before the given time, and those used longest ago if all hold more than
// so many bytes.
func (x *index) trimMounts(since, most int64) {
	maps.DeleteFunc(x.mounts, func(_ cache.Key, e mountEntry) bool { return e.used < since-day })
	keys := slices.SortedFunc(maps.Keys(x.mounts), func(a, b cache.Key) int {
		ea, eb := x.mounts[a], x.mounts[b]
		return cmp.Or(cmp.Compare(eb.used, ea.used), cmp.Compare(eb.created, ea.created), cmp.Compare(a, b))
	})
	for _, k := range keys {
		if most -= x.mounts[k].bytes; most < 0 {
			delete(x.mounts, k)
		}
	}
}

// HasMounts reports whether one of specs has cache-mounts=true.
func HasMounts(specs []Spec) bool {
	return slices.ContainsFunc(specs, func(s Spec) bool { return s.mounts })
}

// Restore fills the empty directory dir with the files of a cache mount and reports whether a source had them. What
// goes wrong is told, and the directory to be thrown away.
func (c *Cache) Restore(ctx context.Context, m Mount, dir string) bool {
	k, err := m.key()
	if err != nil {
		return false
	}
	for _, s := range c.sources {
		e, ok := s.findMount(ctx, k)
		if !ok {
			continue
		}
		end := c.o.Report(fmt.Sprintf("importing cache mount %s from %s", m.ID, s.spec.Text))
		err := c.unpack(ctx, s, e, dir)
		end(err)
		if err == nil {
			return true
		}
		if ctx.Err() == nil {
			c.o.Warn(fmt.Sprintf("cache-from %s: cache mount %s: %v; it begins empty", s.spec.Text, m.ID, err))
			c.loseMount(e)
		}
		return false
	}
	return false
}

// findMount returns what the source has of a cache mount, waiting until its index is read.
func (s *source) findMount(ctx context.Context, k cache.Key) (mountEntry, bool) {
	if !s.spec.mounts {
		return mountEntry{}, false
	}
	select {
	case <-s.done:
	case <-ctx.Done():
		return mountEntry{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.index.mounts[k]
	return e, ok
}

func (c *Cache) unpack(ctx context.Context, s *source, e mountEntry, dir string) error {
	list, err := readList(ctx, s.place, e)
	if err != nil {
		return err
	}
	if n := list.Bytes(); n > s.spec.mountsMax {
		return fmt.Errorf("it holds %s, more than cache-mounts-max=%s", size(n), size(s.spec.mountsMax))
	}
	return list.Unpack(ctx, mounts.Target{Dir: dir, SingleID: c.o.SingleID}, s.place.open)
}

func size(n int64) string { return units.HumanSize(float64(n)) }

// readList reads what a place says of the files of a cache mount.
func readList(ctx context.Context, p place, e mountEntry) (*mounts.List, error) {
	r, err := p.open(ctx, e.parts[0].Blob)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return mounts.ReadList(r, e.parts[0])
}

// loseMount makes nobody rely on the blobs of e any more.
func (c *Cache) loseMount(e mountEntry) {
	for _, p := range e.parts {
		c.mu.Lock()
		c.lost[p.Blob.Digest] = true
		c.mu.Unlock()
		for _, s := range c.sources {
			s.forget(p.Blob.Digest)
		}
		for _, t := range c.targets {
			t.forget(p.Blob.Digest)
		}
	}
}

// addMounts sends the cache mounts that the build had and puts them into x. One that cannot be sent is told of: that is
// no reason to lose the records of the steps.
func (t *target) addMounts(ctx context.Context, x, old *index, all []Mount) {
	if !t.spec.mounts {
		return
	}
	for _, m := range all {
		k, err := m.key()
		if err != nil {
			continue
		}
		end := t.c.o.Report(fmt.Sprintf("exporting cache mount %s to %s", m.ID, t.spec.Text))
		e, err := t.sendMount(ctx, m, old.mounts[k])
		end(err)
		if err != nil {
			t.c.o.Warn(fmt.Sprintf("cache-to %s: cache mount %s: %v; left out", t.spec.Text, m.ID, t.explainMount(err)))
			continue
		}
		if len(e.parts) > 0 {
			x.mounts[k] = e
		}
	}
}

func (t *target) explainMount(err error) error {
	var large *mounts.TooLargeError
	if errors.As(err, &large) {
		return fmt.Errorf("it holds %s, more than cache-mounts-max=%s", size(large.Bytes), size(t.spec.mountsMax))
	}
	return err
}

// sendMount makes the place hold the files of a cache mount; was is what it has of them. An empty one has no parts.
func (t *target) sendMount(ctx context.Context, m Mount, was mountEntry) (mountEntry, error) {
	var old *mounts.List
	if len(was.parts) > 0 {
		old, _ = readList(ctx, t.place, was) // without it all is sent
	}
	a, err := t.packMount(ctx, m, old)
	if errors.Is(err, mounts.ErrOld) { // the place has lost what was there
		a, err = t.packMount(ctx, m, nil)
	}
	if err != nil || len(a.Parts) == 0 {
		return mountEntry{}, err
	}
	now := t.c.o.Now().Unix()
	e := mountEntry{parts: a.Parts, bytes: a.Bytes, created: now, used: now / day * day}
	if old != nil && was.parts[0].Blob.Digest == e.parts[0].Blob.Digest {
		e.created = was.created
	}
	return e, nil
}

// packMount makes blobs of the files of a cache mount and sends those that the place lacks.
func (t *target) packMount(ctx context.Context, m Mount, old *mounts.List) (*mounts.Archive, error) {
	temp, err := t.c.o.Store.Temp("mounts-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(temp)
	release, err := m.Hold(ctx)
	if err != nil {
		return nil, err
	}
	a, err := mounts.Pack(ctx, m.Dir, temp, t.spec.mountsMax, old)
	release()
	if err != nil {
		return nil, err
	}
	known, _, err := t.read(ctx)
	if err != nil {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(t.spec.uploads, atOnce))
	for _, p := range a.Parts {
		if t.has(known, p.Blob.Digest) {
			continue
		}
		g.Go(func() error {
			return t.place.put(ctx, p.Blob, func(context.Context) (io.ReadCloser, error) { return a.Open(p.Blob.Digest) })
		})
	}
	return a, g.Wait()
}
