// Package remote shares what build steps made: --cache-from and --cache-to. An import reads one small index a source
// and nothing more until a step needs the bytes of a layer; an export sends what the place lacks and merges its
// records into what is there. It never decides what a step is, and no trouble with an import fails a build.
//
// The index is BuildKit's cache config (media type application/vnd.buildkit.cacheconfig.v0), held by an OCI image
// manifest of which it is the config and the layers are the layers; in a bucket it stands alone. Each record is a
// root, without inputs: its digest is a [cache.Key], its one result a layer without a parent, createdAt when the step
// ran. Keys are made by other rules than BuildKit's, so each ignores the records of the other. One more field says
// what BuildKit does not need:
//
//	"filo": {"format": 1, "used": [seconds, …],   for each record, the day on which a build last had use for it
//	  "mounts": [{"key": …, "layers": [0, …], "bytes": …, "created": …, "used": …}]}   cache-mounts=true
//
// and in it "estargz", by digest, what the store needs to know of blobs with a table of contents.
// A cache mount is an archive of filo/cache/mounts, the list first, under a key of its identity; it is fetched when a
// step that runs has it and it is empty here. Of two that export one, the later one's counts.
//
// type=inline puts the records into the image's config, as base64 under moby.buildkit.cache.v0; their results name
// layers of the image. There is nothing but records in it.
//
// Records are trusted as far as whoever may write to the place; blobs are verified by the store. A layer that cannot
// be had is forgotten: see [Cache.Forget].
//
// Start at [Open]. spec.go reads the flags, index.go has the format, export.go writes, mounts.go has cache mounts,
// registry.go, image.go (inline), local.go and s3.go are the places.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"filo/cache"
	"filo/layer"
	"filo/layer/registry"
)

// Cache is the shared caches of one build. Its methods may be called from any goroutine.
type Cache struct {
	o       Options
	sources []*source
	targets []*target
	reading errgroup.Group
	answer  time.Duration // how long a target has to tell what it holds

	mu      sync.Mutex
	fetched map[digest.Digest]fetched // promised layers of which somebody wanted the bytes, by diff ID
	lost    map[digest.Digest]bool    // blobs that could not be had
}

// fetched is a blob that was asked for.
type fetched struct {
	blob  digest.Digest
	cause error // nil if its bytes came, right or wrong
}

// Options is what shared caches work with. All fields but Report and Getenv are needed.
type Options struct {
	Store    *layer.Store
	Registry *registry.Client
	Now      func() time.Time
	Warn     func(text string)
	Report   func(text string) func(error) // called when something begins, the result when it ends; nil for none
	Getenv   func(name string) string      // credentials of type=s3 that the flag does not hold
	Platform ocispec.Platform              // of an image that is imported from
	SingleID bool                          // owners are not put on disk
}

// readTime is how long a place has to tell what it holds; after that the build goes on without it.
const readTime = 10 * time.Second

// Open begins to read the sources. Targets are not written before [Cache.Offer] or [Cache.Export].
func Open(ctx context.Context, o Options, from, to []Spec) (*Cache, error) {
	if o.Getenv == nil {
		o.Getenv = func(string) string { return "" }
	}
	if o.Report == nil {
		o.Report = func(string) func(error) { return func(error) {} }
	}
	c := &Cache{o: o, answer: readTime, fetched: map[digest.Digest]fetched{}, lost: map[digest.Digest]bool{}}
	for _, s := range from {
		p, err := c.place(s, false)
		if err != nil {
			return nil, err
		}
		c.sources = append(c.sources, &source{spec: s, place: p, done: make(chan struct{})})
	}
	for _, s := range to {
		if s.Type == inline {
			continue
		}
		p, err := c.place(s, true)
		if err != nil {
			return nil, err
		}
		c.targets = append(c.targets, &target{c: c, spec: s, place: p, sent: map[digest.Digest]*sending{}, turns: semaphore.NewWeighted(2)})
	}
	for _, s := range c.sources {
		c.reading.Go(func() error {
			c.load(ctx, s)
			return nil
		})
	}
	return c, nil
}

// Close waits for what [Open] began.
func (c *Cache) Close() error {
	return c.reading.Wait()
}

// place is where a cache is kept.
type place interface {
	// read returns the index; of a place that has none an empty one. version names the state that was read.
	read(ctx context.Context) (x *index, version string, err error)
	// open opens a blob that the index lists.
	open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
	// put makes the place hold a blob.
	put(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) error
	// write makes x the index. A place that can tell returns errStale if another version than the one given is there.
	write(ctx context.Context, x *index, version string) error
	// kept reports whether the place still has the x that was written. Places that never lose a write say yes.
	kept(ctx context.Context) (bool, error)
	// doubt takes back that the place holds a blob of the index that was read.
	doubt(d digest.Digest)
}

// errStale says that somebody else wrote first.
var errStale = errors.New("somebody else wrote the cache first")

func (c *Cache) place(s Spec, written bool) (place, error) {
	switch s.Type {
	case kindRegistry:
		return newRegistryPlace(c.o, s, written)
	case kindLocal:
		return newLocalPlace(s)
	case kindS3:
		return newBucket(c.o, s, registry.Stillness)
	}
	return nil, fmt.Errorf("unknown cache type %q", s.Type)
}

// source is a --cache-from.
type source struct {
	spec  Spec
	place place
	done  chan struct{} // closed when index is final

	mu    sync.Mutex
	index *index
}

// load reads the index of s. Without one the source is empty.
func (c *Cache) load(ctx context.Context, s *source) {
	defer close(s.done)
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	end := c.o.Report("importing cache manifest from " + s.spec.Text)
	x, _, err := s.place.read(ctx)
	if err == nil && x.missing {
		err = errors.New("not found")
	}
	end(err)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("no answer within %s", readTime)
		}
		c.o.Warn(fmt.Sprintf("cache-from %s: %v; going on without it", s.spec.Text, err))
		x = newIndex()
	}
	if s.spec.maxAge > 0 {
		x.dropOlder(c.o.Now().Add(-s.spec.maxAge).Unix())
	}
	s.mu.Lock()
	s.index = x
	s.mu.Unlock()
}

// find returns what the source has for k, waiting until its index is read.
func (s *source) find(ctx context.Context, k cache.Key) (entry, bool) {
	select {
	case <-s.done:
	case <-ctx.Done():
		return entry{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.index.entries[k]
	return e, ok
}

// forget drops all that a blob is the layer of.
func (s *source) forget(blob digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index.dropBlob(blob)
	s.place.doubt(blob)
}

// Recall looks k up in the sources, in their order. The layer of what it finds is promised to the store.
func (c *Cache) Recall(ctx context.Context, k cache.Key) (cache.Record, bool) {
	for _, s := range c.sources {
		if e, ok := s.find(ctx, k); ok {
			c.promise(e)
			return cache.Record{Layer: e.diffID, Created: e.created}, true
		}
	}
	return cache.Record{}, false
}

// promise lets the store fetch the layer of e from any source that has it.
func (c *Cache) promise(e entry) {
	c.o.Store.Promise(layer.Layer{DiffID: e.diffID}, e.blob, func(ctx context.Context) (io.ReadCloser, error) {
		var errs []error
		for _, s := range c.sources {
			if !s.holds(ctx, e.blob.Digest) {
				continue
			}
			r, err := s.place.open(ctx, e.blob)
			if err == nil {
				return &watched{ReadCloser: r, ctx: ctx, c: c, e: e}, nil
			}
			errs = append(errs, fmt.Errorf("cache %s: %w", s.spec.Text, err))
		}
		if len(errs) == 0 {
			errs = []error{fmt.Errorf("no cache has blob %s", e.blob.Digest)}
		}
		err := errors.Join(errs...)
		c.note(ctx, e, err)
		return nil, err
	})
}

func (s *source) holds(ctx context.Context, blob digest.Digest) bool {
	select {
	case <-s.done:
	case <-ctx.Done():
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.hasBlob(blob, math.MinInt64)
}

// watched is a blob on its way to the store. Whether it was the right one is known later: see [Cache.Forget].
type watched struct {
	io.ReadCloser
	ctx context.Context
	c   *Cache
	e   entry
	err error
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		w.err = err
	}
	return n, err
}

func (w *watched) Close() error {
	w.c.note(w.ctx, w.e, w.err)
	return w.ReadCloser.Close()
}

// note remembers that the bytes of e were asked for. Who stopped asking has not learned anything.
func (c *Cache) note(ctx context.Context, e entry, cause error) {
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fetched[e.diffID] = fetched{e.blob.Digest, cause}
}

// Forget drops the records of layers that turned out not to be there, or not to be what they should, and reports
// whether there were any since it was last called. If there were, the build or export that failed may be done again:
// steps that had been found are then done anew, all others are in the local cache.
func (c *Cache) Forget() bool {
	c.Wait()
	c.mu.Lock()
	asked := c.fetched
	c.fetched = map[digest.Digest]fetched{}
	c.mu.Unlock()
	any := false
	for diffID, f := range asked {
		c.o.Store.Withdraw(layer.Layer{DiffID: diffID}, f.blob)
		if f.cause == nil && c.o.Store.Has(layer.Layer{DiffID: diffID}) {
			continue
		}
		any = true
		if f.cause == nil {
			f.cause = errors.New("its content is not what its record says")
		}
		c.o.Warn(fmt.Sprintf("cache: layer %s: %v; its step is done again", f.blob, f.cause))
		c.mu.Lock()
		c.lost[f.blob] = true
		c.mu.Unlock()
		for _, s := range c.sources {
			s.forget(f.blob)
		}
		for _, t := range c.targets {
			t.forget(f.blob)
		}
	}
	return any
}

// wasLost reports whether a blob could not be had, so that its being listed somewhere means nothing.
func (c *Cache) wasLost(blob digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost[blob]
}

// Made is a layer that a step of the build made or found.
type Made struct {
	Key     cache.Key
	Layer   layer.Layer
	Created int64 // seconds since the epoch
	Shipped bool  // the layer is one of the result's
}

// HasInline reports whether specs ask for records in the image itself.
func HasInline(specs []Spec) bool {
	return slices.ContainsFunc(specs, func(s Spec) bool { return s.Type == inline })
}
