package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/platforms"

	"filo/builder"
	"filo/builder/export"
	"filo/cache/remote"
	"filo/layer"
	"filo/layer/registry"
)

// cacheSpecs are --cache-from and --cache-to.
type cacheSpecs struct{ from, to []remote.Spec }

// caches reads --cache-from, --cache-to and the build argument that stands for type=inline.
func (f *resultFlags) caches(args map[string]string) (c cacheSpecs, err error) {
	read := func(flag string, values []string, parse func(string) ([]remote.Spec, error)) (all []remote.Spec, err error) {
		for _, v := range values {
			specs, err := parse(v)
			if err != nil {
				return nil, fmt.Errorf("--%s: %w", flag, err)
			}
			all = append(all, specs...)
		}
		return all, nil
	}
	if c.from, err = read("cache-from", f.cacheFrom, remote.ParseFrom); err != nil {
		return c, err
	}
	to := f.cacheTo
	if truthy(args["BUILDKIT_INLINE_CACHE"]) {
		to = append(slices.Clone(to), "type=inline")
	}
	c.to, err = read("cache-to", to, remote.ParseTo)
	return c, err
}

// fit refuses type=inline in an image whose layers are other ones for those who pull it: the records would be of no use.
func (c cacheSpecs) fit(outputs []export.Output) error {
	for _, o := range outputs {
		if w := o.Compression(); remote.HasInline(c.to) && w != nil && w.Algorithm == layer.EStargz {
			return errors.New("--cache-to type=inline does not work with compression=estargz; use type=registry or type=local")
		}
	}
	return nil
}

// openCaches begins to read the shared caches and lets b ask them.
func (j *job) openCaches(ctx context.Context, b *builder.Builder) (*remote.Cache, error) {
	var mu sync.Mutex
	p := platforms.DefaultSpec()
	if len(j.req.Platforms) > 0 {
		p = j.req.Platforms[0]
	}
	shared, err := remote.Open(ctx, remote.Options{
		Store: j.store, Registry: j.registry, Now: j.now, Getenv: j.getenv, Platform: p,
		SingleID: j.ground.SingleID,
		Warn: func(text string) {
			mu.Lock()
			defer mu.Unlock()
			j.warn(text)
		},
		Report: j.beginTask,
	}, j.caches.from, j.caches.to)
	if err != nil {
		return nil, err
	}
	if len(j.caches.from) > 0 {
		b.Recall = shared.Recall
	}
	if len(j.caches.to) > 0 {
		b.Offer = func(ctx context.Context, m builder.Made) { shared.Offer(ctx, remote.Made(m)) }
	}
	if remote.HasMounts(j.caches.from) {
		b.Restore = func(ctx context.Context, m builder.CacheMount, dir string) bool {
			return shared.Restore(ctx, remote.Mount(m), dir)
		}
	}
	if remote.HasMounts(j.caches.to) {
		b.Used = func(m builder.CacheMount) {
			mu.Lock()
			defer mu.Unlock()
			if !slices.ContainsFunc(j.mounts, func(o remote.Mount) bool { return o.Identity == m.Identity }) {
				j.mounts = append(j.mounts, remote.Mount(m))
			}
		}
	}
	return shared, nil
}

// beginTask draws a piece of work that ends when the function it returns is called.
func (j *job) beginTask(name string) func(error) {
	e := builder.Event{Vertex: j.nextTask(), Name: name, State: builder.Started}
	j.display.Emit(e)
	return func(err error) {
		if e.State, e.Err = builder.Done, err; err != nil {
			e.State = builder.Failed
		}
		j.display.Emit(e)
	}
}

// maxLost bounds how often a build begins again because a layer of the store was damaged.
const maxLost = 20

// produce builds and exports. What a shared cache promised and does not have is done again without it.
func (j *job) produce(ctx context.Context, b *builder.Builder, shared *remote.Cache) (builder.Result, []export.Exported, error) {
	for try := 0; ; try++ {
		if try > 0 {
			j.display.Again()
		}
		result, err := b.Build(ctx, j.req)
		again := true
		var exported []export.Exported
		if err == nil {
			if err = j.inline(result); err == nil {
				exported, err = j.export(ctx, result)
			}
			again = !slices.ContainsFunc(j.outputs, export.Output.ToStdout) // a stream cannot be written twice
		}
		if err == nil || ctx.Err() != nil || !again {
			return result, exported, err
		}
		// What is lost is gone from the store now, so that the step which made it is done again; what is unsound is made anew.
		if (errors.Is(err, layer.ErrLost) || errors.Is(err, layer.ErrUnsound)) && try < maxLost {
			continue
		}
		// Forget is asked only after a failure, since it withdraws the promises that were tried.
		if !shared.Forget() && !registry.Is(err, registry.Incomplete) {
			return result, exported, err
		}
	}
}

// inline puts cache records into the images, if that is asked for.
func (j *job) inline(r builder.Result) error {
	if !remote.HasInline(j.caches.to) {
		return nil
	}
	made := madeOf(r)
	for _, img := range r.Images {
		records, err := remote.Inline(made, img.Layers)
		if err != nil {
			return err
		}
		img.Cache = records
	}
	return nil
}

func madeOf(r builder.Result) []remote.Made {
	made := make([]remote.Made, len(r.Made))
	for i, m := range r.Made {
		made[i] = remote.Made(m)
	}
	return made
}
