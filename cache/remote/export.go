package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"filo/cache/mounts"
	"filo/layer"
)

// target is a --cache-to.
type target struct {
	c     *Cache
	spec  Spec
	place place
	early errgroup.Group      // layers sent while the build runs
	turns *semaphore.Weighted // of which few at a time: the build itself needs the machine

	mu      sync.Mutex
	sent    map[digest.Digest]*sending // by diff ID
	known   *index                     // what was there when it was first read
	version string
	silent  error // that it did not answer: nobody waits for that twice
}

// sending is a layer on its way, or arrived.
type sending struct {
	mu   sync.Mutex
	done bool
	blob ocispec.Descriptor
}

// atOnce is how many layers of one target are compressed and sent side by side.
const atOnce = 4

// Offer says what a step made while the build still runs. Targets of mode=max begin to send it, unless it is a layer
// of the result: that is compressed as the result wants it, and sent with it.
func (c *Cache) Offer(ctx context.Context, m Made) {
	if m.Shipped {
		return
	}
	for _, t := range c.targets {
		if !t.spec.all {
			continue
		}
		t.early.Go(func() error {
			if err := t.turns.Acquire(ctx, 1); err != nil {
				return nil // the build ended
			}
			defer t.turns.Release(1)
			_, _ = t.send(ctx, m.Layer) // Export tries again what failed, and tells
			return nil
		})
	}
}

// Export writes what the build made, and where it is asked for the cache mounts that it had, to all targets. It is called
// when the result is exported, so that nothing that happens here delays or loses it. An error is that of the targets
// without ignore-error.
func (c *Cache) Export(ctx context.Context, made []Made, all []Mount) error {
	var errs []error
	for _, t := range c.targets {
		end := c.o.Report("exporting cache to " + t.spec.Type + " " + t.spec.Text)
		err := t.export(ctx, made, all)
		end(err)
		if err == nil {
			continue
		}
		err = fmt.Errorf("export cache to %s %s: %w", t.spec.Type, t.spec.Text, err)
		if t.spec.ignoreError && ctx.Err() == nil {
			c.o.Warn(err.Error())
			continue
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Wait waits for what [Cache.Offer] began; Export does so by itself.
func (c *Cache) Wait() {
	for _, t := range c.targets {
		_ = t.early.Wait() // never fails
	}
}

func (t *target) export(ctx context.Context, made []Made, all []Mount) error {
	if err := t.early.Wait(); err != nil {
		return err
	}
	old, version, err := t.read(ctx)
	if err != nil {
		return err
	}
	fresh, err := t.entries(ctx, made)
	if err != nil {
		return err
	}
	t.addMounts(ctx, fresh, old, all)
	for try := 1; ; try++ {
		next := t.merged(old, fresh)
		if old.contains(fresh) && next.size() == old.size() {
			return nil
		}
		lost, err := t.write(ctx, next, version)
		if err != nil || !lost {
			return err
		}
		if try == writes {
			t.c.o.Warn(fmt.Sprintf("cache-to %s: others write to it all the time; some records are lost", t.spec.Text))
			return nil
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
		if old, version, err = t.place.read(ctx); err != nil {
			return err
		}
	}
}

// writes is how often an index is written when others write to the same place. Of those who write at once to a place
// that refuses what is stale one gets through each time, so that as many may.
const writes = 60

// write writes the index and reports whether somebody else's came in between.
func (t *target) write(ctx context.Context, x *index, version string) (lost bool, err error) {
	err = t.place.write(ctx, x, version)
	if errors.Is(err, errStale) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	kept, err := t.place.kept(ctx)
	return !kept, err
}

// pause waits until whoever read before we wrote will have written: 20 to 80 ms were measured to be enough for a few.
// The more often it was tried the longer it may last, up to 1.3 s, so that many writers stop getting in each other's way.
func pause(ctx context.Context, try int) error {
	most := 80 * time.Millisecond << min(try/4, 4)
	timer := time.NewTimer(20*time.Millisecond + rand.N(most-20*time.Millisecond))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// read returns what the place holds, asking once. A place that does not answer soon is not written to.
func (t *target) read(ctx context.Context) (*index, string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known == nil && t.silent == nil {
		soon, cancel := context.WithTimeout(ctx, t.c.answer)
		defer cancel()
		x, version, err := t.place.read(soon)
		if err != nil && soon.Err() != nil && ctx.Err() == nil {
			t.silent = fmt.Errorf("no answer within %s", t.c.answer)
			err = t.silent
		}
		if err != nil {
			return nil, "", err
		}
		t.known, t.version = x, version
	}
	return t.known, t.version, t.silent
}

// entries sends the layers of what was made and returns their records.
func (t *target) entries(ctx context.Context, made []Made) (*index, error) {
	x := newIndex()
	today := t.c.o.Now().Unix() / day * day
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(t.spec.uploads, atOnce))
	for _, m := range made {
		if !t.spec.all && !m.Shipped {
			continue
		}
		g.Go(func() error {
			blob, err := t.send(ctx, m.Layer)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			x.entries[m.Key] = entry{diffID: m.Layer.DiffID, blob: blob, created: m.Created, used: today}
			return nil
		})
	}
	return x, g.Wait()
}

// merged is what is to be written.
func (t *target) merged(old, fresh *index) *index {
	next := newIndex()
	today := t.c.o.Now().Unix() / day * day
	for k, e := range old.entries {
		e.used = min(e.used, today)
		if !t.c.wasLost(e.blob.Digest) {
			next.entries[k] = e
		}
	}
	for k, e := range old.mounts {
		e.used = min(e.used, today)
		if !slices.ContainsFunc(e.parts, func(p mounts.Part) bool { return t.c.wasLost(p.Blob.Digest) }) {
			next.mounts[k] = e
		}
	}
	next = next.merge(fresh)
	age := t.spec.maxAge
	if age == 0 {
		age = defaultMaxAge
	}
	since := today - int64(age/time.Second)
	next.trim(since, t.spec.maxRecords)
	if t.spec.mounts {
		next.trimMounts(since, t.spec.mountsMax)
	}
	return next
}

// send makes the place hold the layer l, once, and returns its blob.
func (t *target) send(ctx context.Context, l layer.Layer) (ocispec.Descriptor, error) {
	t.mu.Lock()
	s := t.sent[l.DiffID]
	if s == nil {
		s = &sending{}
		t.sent[l.DiffID] = s
	}
	t.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return s.blob, nil
	}
	known, _, err := t.read(ctx)
	if err != nil {
		return s.blob, err
	}
	blob, err := t.c.o.Store.Blob(ctx, l, t.spec.compression, t.spec.force)
	if err != nil {
		return s.blob, err
	}
	if !t.has(known, blob.Digest) {
		err = t.place.put(ctx, blob, func(ctx context.Context) (io.ReadCloser, error) {
			r, _, err := t.c.o.Store.OpenBlob(ctx, blob.Digest)
			return r, err
		})
	}
	if err != nil {
		return s.blob, err
	}
	s.blob, s.done = blob, true
	return blob, nil
}

// has reports whether the place needs no call to hold a blob. A bucket must see that one is still used: rules for the
// life of objects go by their age.
func (t *target) has(known *index, blob digest.Digest) bool {
	if t.c.wasLost(blob) {
		return false
	}
	since := int64(0)
	if t.spec.touch > 0 {
		since = (t.c.o.Now().Unix() - int64(t.spec.touch/time.Second)) / day * day
	}
	return known.hasBlob(blob, since)
}

// forget drops what is known of a blob that could not be had.
func (t *target) forget(blob digest.Digest) {
	t.place.doubt(blob)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known != nil {
		t.known.dropBlob(blob)
	}
	for diffID, s := range t.sent {
		if s.blob.Digest == blob {
			delete(t.sent, diffID)
		}
	}
}

// bytesOf reads a document.
func bytesOf(d document) io.Reader { return bytes.NewReader(d.data) }
