package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"
)

// errStalled says that a connection stood still although it was open, as behind a proxy that has forgotten it.
var errStalled = errors.New("nothing moved for too long")

// Stillness is how long that is: longer than a registry takes to fetch a blob from a slow store.
const Stillness = 2 * time.Minute

// Patient returns a transport like next under which neither the body of a request nor that of its answer stands still for
// longer than still. How long the answer begins to come is next's business.
func Patient(next http.RoundTripper, still time.Duration) http.RoundTripper {
	return patient{next, still}
}

type patient struct {
	next  http.RoundTripper
	still time.Duration
}

// RoundTrip implements http.RoundTripper.
func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, dog := watch(req.Context(), p.still)
	req = req.WithContext(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		req.Body = &sent{req.Body, dog}
	}
	resp, err := p.next.RoundTrip(req)
	if err != nil {
		err = stalled(ctx, err)
		dog.end()
		return nil, err
	}
	resp.Body = &watched{resp.Body, ctx, dog}
	return resp, nil
}

// sent is the body of a request under a watchdog. Between two reads, and from the last one to the answer, the other side is
// waited for.
type sent struct {
	io.ReadCloser
	dog *watchdog
}

// Read implements io.Reader.
func (s *sent) Read(p []byte) (int, error) {
	s.dog.rest()
	n, err := s.ReadCloser.Read(p)
	if err == nil {
		s.dog.wait()
	}
	return n, err
}

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
