package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/cache"
	"filo/dockerfile"
	"filo/layer"
)

// task is an op with everything it reads found: what keys it and what does it.
type task struct {
	op     any             // for the key
	inputs []digest.Digest // for the key, after the chain ID of the layers below
	alone  bool            // the layers below do not count: COPY --link
	do     func(ctx context.Context, v *vertex, created int64) (layer.Layer, error)
	close  func() error
}

// step does one step of a stage, or finds what it made before. What changed under the build while it was read makes
// it start over, once.
func (w *walk) step(ctx context.Context, r *stageRun, st dockerfile.Step) error {
	if st.Op == nil {
		r.add(st, nil, 0)
		return nil
	}
	name := r.vertexName(st.Text)
	err := w.try(ctx, r, st, name)
	if errors.Is(err, layer.ErrChanged) {
		err = w.try(ctx, r, st, name)
	}
	if errors.Is(err, layer.ErrChanged) {
		err = fmt.Errorf("%w: files changed while the build read them, twice: build again when nothing writes to the context", err)
	}
	return w.file.Locate(st, err)
}

// try keys a step, gets its layer or does it, and puts it on the stage. Steps of one build with the same key are one
// vertex.
func (w *walk) try(ctx context.Context, r *stageRun, st dockerfile.Step, name string) error {
	v := w.vertex(name)
	err := w.await(ctx, v, st.Op)
	var k keyed
	if err == nil {
		k, err = w.keyed(ctx, v, r, st)
	}
	if err != nil {
		v.emit(Event{State: Started})
		return v.end(ctx, w.file.Locate(st, err))
	}
	if k.found != nil {
		v.emit(Event{State: Started})
		v.emit(Event{State: Cached})
		w.put(ctx, v, r, st, *k.found, k.sketch.key, k.found.same)
		return nil
	}
	defer k.task.close()
	m, err := w.steps.do(ctx, k.own.key, func() (memory, error) {
		v.emit(Event{State: Started})
		m, err := w.remembered(ctx, v, k.own, func(ctx context.Context, created int64) (layer.Layer, error) {
			return k.task.do(ctx, v, created)
		})
		if err == nil && m.hit {
			v.emit(Event{State: Cached})
			return m, nil
		}
		return m, v.end(ctx, w.file.Locate(st, err))
	})
	if err != nil {
		w.steps.forget(k.own.key) // it may be tried again
		return err
	}
	if k.sketch.key != "" {
		w.keep(k.sketch, cache.Record{Layer: m.layer.DiffID, Created: m.created, Same: k.own.key}, nothing)
	}
	w.put(ctx, v, r, st, m, k.own.key, k.sketch.key)
	return nil
}

// keyed is a step with what the cache is asked about it.
type keyed struct {
	sketch question // by the layers that the step reads from; the zero question if there is none
	found  *memory  // what the cache has under the sketch; nil for nothing, and then there is what follows
	task   task
	own    question
}

// keyed asks the cache for the sketch of a step. If it has nothing, it finds what the step reads, and its own key.
func (w *walk) keyed(ctx context.Context, v *vertex, r *stageRun, st dockerfile.Step) (k keyed, err error) {
	defer v.phase(Keying)()
	if k.sketch, err = w.sketch(ctx, r, st); err != nil {
		return k, err
	}
	if m, ok := w.known(ctx, k.sketch); ok {
		k.found = &m
		return k, nil
	}
	if k.task, err = w.prepared(ctx, r, st); err != nil {
		return k, err
	}
	inputs := k.task.inputs
	if !k.task.alone {
		inputs = append([]digest.Digest{r.chain}, inputs...)
	}
	if k.own, err = ask(k.task.op, inputs...); err != nil {
		return k, errors.Join(err, k.task.close())
	}
	k.own.fresh = r.fresh
	if w.req.Explain != nil {
		w.req.Explain(v.name, fmt.Sprintf("%s %s %v", k.own.key, k.own.op, k.own.inputs))
	}
	return k, nil
}

// known looks q up here and in the shared caches. The zero question has no answer.
func (w *walk) known(ctx context.Context, q question) (memory, bool) {
	if q.key == "" {
		return memory{}, false
	}
	if m, ok := w.recall(q.key); ok {
		return m, true
	}
	return w.recallShared(ctx, q)
}

// put puts what a step made on its stage and tells of it under its keys; "" is none.
func (w *walk) put(ctx context.Context, v *vertex, r *stageRun, st dockerfile.Step, m memory, keys ...cache.Key) {
	r.add(st, &m.layer, m.created)
	for _, k := range keys {
		if k == "" {
			continue
		}
		made := Made{Key: k, Layer: m.layer, Created: m.created, Shipped: w.inResult(r.stage)}
		w.made.add(made)
		if w.Offer != nil {
			w.Offer(ctx, made)
		}
	}
	if r.ships {
		w.ship(v, m.layer)
	}
}

// await waits for the stages that a step reads from.
func (w *walk) await(ctx context.Context, v *vertex, op dockerfile.Op) error {
	var from []dockerfile.Ref
	switch op := op.(type) {
	case *dockerfile.Copy:
		from = append(from, op.From)
	case *dockerfile.Run:
		for _, m := range op.Mounts {
			from = append(from, m.From)
		}
	}
	defer v.phase(Waiting)()
	for _, ref := range from {
		if ref.Stage == nil {
			continue
		}
		if _, err := w.stage(ctx, ref.Stage); err != nil {
			return err
		}
	}
	return nil
}

// prepared finds all that a step reads.
func (w *walk) prepared(ctx context.Context, r *stageRun, st dockerfile.Step) (task, error) {
	below, sinks := r.layers, w.sinks(r, st)
	switch op := st.Op.(type) {
	case *dockerfile.Run:
		return w.preparedRun(ctx, r, op)
	case *dockerfile.Copy:
		c, err := w.find(ctx, op)
		if err != nil {
			return task{}, errors.Join(err, c.Close())
		}
		k, inputs := c.key(w.clamp())
		return task{op: k, inputs: inputs, alone: c.link(), close: c.Close,
			do: func(ctx context.Context, v *vertex, created int64) (layer.Layer, error) {
				return w.copy(ctx, v, c, below, created, sinks)
			}}, nil
	case *dockerfile.Mkdir:
		k := struct {
			Mkdir, User string
			Epoch       *int64 `json:",omitempty"`
		}{op.Path, op.User, w.clamp()}
		return task{op: k, close: func() error { return nil },
			do: func(ctx context.Context, v *vertex, created int64) (layer.Layer, error) {
				return w.mkdir(ctx, v, op, below, created, sinks)
			}}, nil
	}
	panic(fmt.Sprintf("unknown op %T", st.Op))
}

func (w *walk) preparedRun(ctx context.Context, r *stageRun, op *dockerfile.Run) (task, error) {
	if err := w.allowed(op); err != nil {
		return task{}, err
	}
	run, err := w.prepare(ctx, op)
	if err != nil {
		return task{}, err
	}
	run.more, run.sinks, run.based = r.runs(r.next+1), w.runSinks(r), r.based
	below := r.layers
	return task{op: w.runKey(run, r.platformName()), close: func() error { return nil },
		do: func(ctx context.Context, v *vertex, created int64) (layer.Layer, error) {
			return w.run(ctx, v, run, below)
		}}, nil
}

// question is what the cache is asked: a key, and what went into it.
type question struct {
	key    cache.Key
	op     json.RawMessage
	inputs []digest.Digest
	fresh  bool // the answer does not count, but the layer is kept
}

// ask makes the question for op with inputs. Keys chain by what the inputs hold of the layers below: see package cache.
func ask(op any, inputs ...digest.Digest) (question, error) {
	b, err := json.Marshal(op)
	if err != nil {
		return question{}, fmt.Errorf("encode step: %w", err)
	}
	key, err := cache.Key("").Next(json.RawMessage(b), inputs...)
	return question{key: key, op: b, inputs: inputs}, err
}

// memory is a layer that a step made, now or before.
type memory struct {
	layer   layer.Layer
	created int64
	hit     bool
	same    cache.Key // another key of the step; "" if none is known
}

// remembered returns the layer kept for q, or makes it with do and keeps it. Of several that want the same layer, in this
// process or others, one makes it.
func (w *walk) remembered(ctx context.Context, v *vertex, q question, do func(context.Context, int64) (layer.Layer, error)) (memory, error) {
	if m, ok := w.recall(q.key); ok && !q.fresh {
		return m, w.verify(ctx, m, do)
	}
	waited := v.phase(Waiting)
	unlock, err := w.Store.Lock(ctx, "step-"+digest.Digest(q.key).Encoded())
	waited()
	if err != nil {
		return memory{}, err
	}
	m, made, err := w.recallOrMake(ctx, q, do)
	if !made {
		unlock()
		return m, err
	}
	w.keep(q, cache.Record{Layer: m.layer.DiffID, Created: m.created}, unlock)
	return m, nil
}

// recallOrMake is remembered for who holds the lock of q. It reports whether the layer was made now.
func (w *walk) recallOrMake(ctx context.Context, q question, do func(context.Context, int64) (layer.Layer, error)) (memory, bool, error) {
	if m, ok := w.recall(q.key); ok && !q.fresh {
		return m, false, nil
	}
	if m, ok := w.recallShared(ctx, q); ok && !q.fresh {
		return m, false, nil
	}
	created := w.Now().Unix()
	l, err := do(ctx, created)
	return memory{layer: l, created: created}, err == nil, err
}

// verify does a hit again, if the build asks for that, and compares. What a RUN makes may well depend on more than its
// key holds, so a difference is told and no error.
func (w *walk) verify(ctx context.Context, m memory, do func(context.Context, int64) (layer.Layer, error)) error {
	if !w.req.Verify {
		return nil
	}
	l, err := do(ctx, m.created)
	if err != nil {
		return fmt.Errorf("verify: the cache has a layer, but doing the step again: %w", err)
	}
	at, err := w.Store.Difference(ctx, m.layer, l)
	if err != nil {
		return err
	}
	if at != "" {
		w.warn("verify: the cached layer %s and that of doing the step again, %s, differ at /%s", m.layer.DiffID, l.DiffID, at)
	}
	return nil
}

// recall looks key up. Whatever is wrong with a record or its layer makes it a miss.
func (w *walk) recall(key cache.Key) (memory, bool) {
	rec, err := w.Cache.Get(key)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, cache.ErrDamaged) {
			w.warn("cache: %v", err)
		}
		return memory{}, false
	}
	l := layer.Layer{DiffID: rec.Layer}
	if !w.Store.Has(l) {
		return memory{}, false
	}
	w.Cache.Touch(key)
	return memory{layer: l, created: rec.Created, hit: true, same: rec.Same}, true
}

// recallShared looks q up in the shared caches and keeps what it finds.
func (w *walk) recallShared(ctx context.Context, q question) (memory, bool) {
	if w.Recall == nil {
		return memory{}, false
	}
	rec, ok := w.Recall(ctx, q.key)
	if !ok || !w.Store.Has(layer.Layer{DiffID: rec.Layer}) {
		return memory{}, false
	}
	w.keep(q, rec, nothing)
	return memory{layer: layer.Layer{DiffID: rec.Layer}, created: rec.Created, hit: true}, true
}

// keep remembers rec for q, as soon as it is sure that it holds, and calls then. The build is right without it.
func (w *walk) keep(q question, rec cache.Record, then func()) {
	rec.Op, rec.Inputs = q.op, q.inputs
	w.trial.then(func(verdict error) {
		defer then()
		if verdict != nil {
			return
		}
		if err := w.Cache.Put(q.key, rec); err != nil {
			w.warn("cache: %v", err)
		}
	})
}

func nothing() {}

// madeList collects what steps made.
type madeList struct {
	mu   sync.Mutex
	all  []Made
	seen map[cache.Key]int
}

func (l *madeList) add(m Made) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen == nil {
		l.seen = map[cache.Key]int{}
	}
	if i, ok := l.seen[m.Key]; ok {
		l.all[i].Shipped = l.all[i].Shipped || m.Shipped
		return
	}
	l.seen[m.Key] = len(l.all)
	l.all = append(l.all, m)
}

// add puts what a step did on the stage: its config, its history entry and, if it made one, its layer.
func (r *stageRun) add(st dockerfile.Step, l *layer.Layer, created int64) {
	r.config = st.Config
	if l != nil {
		r.layers, r.chain = append(r.layers[:len(r.layers):len(r.layers)], *l), l.On(r.chain)
		if r.epoch != nil {
			created = *r.epoch
		}
		t := time.Unix(created, 0).UTC()
		r.created = &t
	}
	if st.History == "" {
		return
	}
	r.history = append(r.history[:len(r.history):len(r.history)], ocispec.History{
		Created: r.created, CreatedBy: st.History, Comment: "buildkit.dockerfile.v0", EmptyLayer: l == nil,
	})
}
