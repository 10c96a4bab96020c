package registry

import (
	"context"
	"errors"
	"io"
	"time"
)

// errStalled says that a connection stood still although it was open, as behind a proxy that has forgotten it.
var errStalled = errors.New("nothing moved for too long")

// stillness is how long that is: longer than a registry takes to fetch a blob from a slow store.
const stillness = 2 * time.Minute

// watchdog gives a transfer up that stands still. Only time in which the other side is waited for counts.
type watchdog struct {
	cancel context.CancelCauseFunc
	limit  time.Duration
	timer  *time.Timer
}

// watch returns a context that ends with errStalled when the watchdog bites. It sleeps until [watchdog.wait].
func watch(ctx context.Context, limit time.Duration) (context.Context, *watchdog) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watchdog{cancel: cancel, limit: limit}
	w.timer = time.AfterFunc(limit, func() { cancel(errStalled) })
	w.timer.Stop()
	return ctx, w
}

// wait begins to count.
func (w *watchdog) wait() { w.timer.Reset(w.limit) }

// rest stops counting.
func (w *watchdog) rest() { w.timer.Stop() }

// end ends the context, too.
func (w *watchdog) end() {
	w.timer.Stop()
	w.cancel(nil)
}

// stalled returns errStalled if err is what came of the watchdog's bite, else err.
func stalled(ctx context.Context, err error) error {
	if err != nil && err != io.EOF && errors.Is(context.Cause(ctx), errStalled) {
		return errStalled
	}
	return err
}

// watched is the body of a response under a watchdog.
type watched struct {
	io.ReadCloser
	ctx context.Context
	dog *watchdog
}

// Read implements io.Reader.
func (w *watched) Read(p []byte) (int, error) {
	w.dog.wait()
	n, err := w.ReadCloser.Read(p)
	w.dog.rest()
	return n, stalled(w.ctx, err)
}

// Close implements io.Closer.
func (w *watched) Close() error {
	err := w.ReadCloser.Close()
	w.dog.end()
	return err
}
