package builder

import (
	"context"
	"sync"
)

// once does a thing at most once per key and gives everybody who asks the one result.
type once[K comparable, V any] struct {
	mu      sync.Mutex
	results map[K]*result[V]
}

type result[V any] struct {
	done chan struct{}
	v    V
	err  error
}

func newOnce[K comparable, V any]() *once[K, V] {
	return &once[K, V]{results: map[K]*result[V]{}}
}

// do returns the result of f for k. The first caller runs f; the others wait for it, or for the end of their context.
func (o *once[K, V]) do(ctx context.Context, k K, f func() (V, error)) (V, error) {
	o.mu.Lock()
	r, ok := o.results[k]
	if !ok {
		r = &result[V]{done: make(chan struct{})}
		o.results[k] = r
	}
	o.mu.Unlock()
	if !ok {
		defer close(r.done)
		r.v, r.err = f()
		return r.v, r.err
	}
	select {
	case <-r.done:
		return r.v, r.err
	case <-ctx.Done():
		var zero V
		return zero, ctx.Err()
	}
}

// forget lets the next caller for k run again what failed.
func (o *once[K, V]) forget(k K) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if r, ok := o.results[k]; ok {
		select {
		case <-r.done:
			delete(o.results, k)
		default: // somebody tries again already
		}
	}
}

// all returns the results that are there and no errors.
func (o *once[K, V]) all() []V {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []V
	for _, r := range o.results {
		select {
		case <-r.done:
		default:
			continue
		}
		if r.err == nil {
			out = append(out, r.v)
		}
	}
	return out
}
