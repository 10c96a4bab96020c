package main

import (
	"sync"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder"
)

// pulls draws the layers that come from registries and caches: as long as some do, there is a vertex, with a line for each.
// Layers come when a step needs them, which may be one of any stage.
type pulls struct {
	mu    sync.Mutex
	emit  func(builder.Event) // nil as long as nobody looks
	next  func() int          // a number for a vertex
	now   func() time.Time
	under int  // how many come
	id    int  // of the vertex
	torn  bool // one of them did not come to its end
}

// pullEvery is how often the count of a layer is told.
const pullEvery = 100 * time.Millisecond

// show has layers drawn from now on.
func (p *pulls) show(emit func(builder.Event), next func() int, now func() time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.emit, p.next, p.now = emit, next, now
}

// begin is a [layer.Pulling].
func (p *pulls) begin(d ocispec.Descriptor) (moved func(int), done func(error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.emit == nil {
		return func(int) {}, func(error) {}
	}
	if p.under++; p.under == 1 {
		p.id, p.torn = p.next(), false
		p.emit(builder.Event{Vertex: p.id, Name: "[internal] pull layers", State: builder.Started})
	}
	one := &pull{of: p, event: builder.Event{Vertex: p.id, State: builder.Moving, Data: []byte(d.Digest), Of: d.Size}, told: p.now()}
	p.emit(one.event)
	return one.moved, one.done
}

// pull is a layer that comes.
type pull struct {
	of    *pulls
	event builder.Event // without the bytes
	bytes atomic.Int64
	told  time.Time   // by moved, which only the one who reads calls
	over  atomic.Bool // who reads may find out late
}

func (l *pull) moved(n int) {
	e := l.event
	e.Bytes = l.bytes.Add(int64(n))
	if now := l.of.now(); now.Sub(l.told) >= pullEvery && !l.over.Load() {
		l.told = now
		l.of.emit(e)
	}
}

// done tells that the layer is there, or will not be, and with the last one the vertex ends.
func (l *pull) done(err error) {
	p := l.of
	p.mu.Lock()
	defer p.mu.Unlock()
	l.over.Store(true)
	p.torn = p.torn || err != nil
	if err == nil {
		e := l.event
		e.State, e.Bytes = builder.Moved, l.bytes.Load()
		p.emit(e)
	}
	if p.under--; p.under > 0 {
		return
	}
	last := builder.Event{Vertex: p.id, State: builder.Done}
	if p.torn { // why is what the step says that waits for it
		last.State = builder.Canceled
	}
	p.emit(last)
}
