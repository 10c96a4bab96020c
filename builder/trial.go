package builder

import (
	"context"
	"sync"
)

// trial holds back what steps made while the trees below them are still inspected: it is remembered when that has ended
// well. Else the build ends.
type trial struct {
	ctx  context.Context // of the build
	stop context.CancelCauseFunc
	work sync.WaitGroup

	mu   sync.Mutex
	last chan struct{} // closed when all that was awaited so far has ended
	err  error         // the first bad end
}

// newTrial makes the trial of a build that ends with parent. The caller calls stop in the end.
func newTrial(parent context.Context) *trial {
	t := &trial{last: make(chan struct{})}
	close(t.last)
	t.ctx, t.stop = context.WithCancelCause(parent)
	return t
}

// inspection is a [layer.Inspection].
type inspection interface {
	Wait(ctx context.Context) error
	Passed() bool
}

// await lets nothing count from here on before in has ended.
func (t *trial) await(in inspection) {
	if in.Passed() {
		return
	}
	t.mu.Lock()
	before, done := t.last, make(chan struct{})
	t.last = done
	t.mu.Unlock()
	t.work.Go(func() {
		defer close(done)
		if err := in.Wait(t.ctx); err != nil {
			t.fail(err)
		}
		<-before
	})
}

func (t *trial) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
		t.stop(err)
	}
}

// awaited is closed when all that was awaited so far has ended.
func (t *trial) awaited() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// verdict waits for all that was awaited so far. It returns the first bad end.
func (t *trial) verdict() error {
	<-t.awaited()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// then calls f with the verdict, at once if nothing is awaited.
func (t *trial) then(f func(verdict error)) {
	select {
	case <-t.awaited():
		f(t.verdict())
	default:
		t.work.Go(func() { f(t.verdict()) })
	}
}

// end waits for everything when all steps have ended, and returns the first bad end.
func (t *trial) end() error {
	t.work.Wait()
	return t.verdict()
}
