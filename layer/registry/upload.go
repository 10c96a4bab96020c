package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// upload is a blob on its way to a registry, over as many attempts as it takes: the first one sends it with one PUT,
// which every registry knows best; later ones go on where the registry says that it stopped, if it can tell. After a
// large one broke, or was too large for what stands before the registry (413), it is sent in chunks, each of which
// counts as arrived.
type upload struct {
	s     *session
	e     endpoint
	d     ocispec.Descriptor
	open  func(context.Context) (io.ReadCloser, error)
	first int64 // size of the first chunks

	at    *url.URL // where the registry takes the next bytes; nil before the first attempt
	off   int64    // how much of the blob is known to have arrived
	chunk int64    // 0: all that is left is sent at once
	least int64    // the registry takes no smaller chunk, but the last
	whole bool     // the registry does not like chunks
}

// Sizes of chunks: small enough to be sent again without regret, large enough to fill a line; and what the strictest
// proxies let through.
const (
	firstChunk = 16 << 20
	leastChunk = 256 << 10
)

// attempt sends what is left of the blob.
func (u *upload) attempt(ctx context.Context) error {
	off, err := u.begin(ctx)
	if err != nil {
		return err
	}
	if off > 0 || u.chunk > 0 {
		return u.rest(ctx, off)
	}
	body, err := u.from(ctx, 0)
	if err != nil {
		return err
	}
	defer body.Close()
	return u.learn(u.put(ctx, body, u.d.Size))
}

// from opens the blob at an offset.
func (u *upload) from(ctx context.Context, off int64) (io.ReadCloser, error) {
	body, err := u.open(ctx)
	if err != nil {
		return nil, errOpen{err}
	}
	if _, err := io.CopyN(io.Discard, body, off); err != nil {
		body.Close()
		return nil, errOpen{err}
	}
	return body, nil
}

// learn chooses the size of chunks for the next attempt by how this one failed.
func (u *upload) learn(err error) error {
	var e *Error
	switch {
	case err == nil:
	case errors.As(err, &e) && e.Status == http.StatusRequestEntityTooLarge:
		next := u.first
		if u.chunk > 0 {
			next = u.chunk / 4
		}
		if next < max(leastChunk, u.least) || u.whole {
			return err
		}
		u.chunk = next
		return errAgain{err}
	case u.chunk == 0 && !u.whole && u.d.Size > u.first && worthResending(err):
		u.chunk = max(u.first, u.least)
	}
	return err
}

// rest sends the blob from off on and ends the upload.
func (u *upload) rest(ctx context.Context, off int64) error {
	body, err := u.from(ctx, off)
	if err != nil {
		return err
	}
	defer func() { body.Close() }()
	for off < u.d.Size {
		n := u.d.Size - off
		if u.chunk > 0 {
			n = min(n, u.chunk)
		}
		next, err := u.patch(ctx, io.LimitReader(body, n), off, n)
		if err != nil {
			return u.learn(err)
		}
		if next != off+n { // the registry kept less than it was sent
			body.Close()
			if body, err = u.from(ctx, next); err != nil {
				return err
			}
		}
		off = next
		u.off = max(u.off, off)
	}
	if err := u.put(ctx, http.NoBody, 0); err != nil {
		return u.restart(err)
	}
	return nil
}

// restart gives the upload up if the registry does not like how it went on: it may like starting again, with one PUT.
func (u *upload) restart(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusRequestEntityTooLarge {
		return err
	}
	if errors.As(err, &e) && e.Status < 500 && e.Class == Other || Is(err, NotFound) {
		u.at, u.chunk, u.whole = nil, 0, u.chunk > 0 || u.whole
		return errAgain{err}
	}
	return err
}

// errAgain marks an error after which starting again may help.
type errAgain struct{ error }

func (e errAgain) Unwrap() error { return e.error }

// begin starts the upload, or finds out how much of it has arrived.
func (u *upload) begin(ctx context.Context) (int64, error) {
	if u.at != nil {
		if at, off := u.s.status(ctx, u.at); off > 0 && off <= u.d.Size {
			u.at = at
			u.off = max(u.off, off)
			return off, nil
		}
	}
	at, least, err := u.s.begin(ctx, u.e)
	u.at, u.least = at, least
	return 0, err
}

// begin starts an upload and returns where it goes and the least size of its chunks, 0 for any.
func (s *session) begin(ctx context.Context, e endpoint) (*url.URL, int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+e.repo+"/blobs/uploads/", nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := s.do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusAccepted); err != nil {
		return nil, 0, err
	}
	least, _ := strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64) // 0 if it does not say
	at, err := resp.Location()
	return at, least, err
}

// status returns how many bytes of an upload the registry has and where it takes the next; 0 if it cannot tell.
func (s *session) status(ctx context.Context, at *url.URL) (*url.URL, int64) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, 0
	}
	resp, err := s.do(req)
	if err != nil {
		return nil, 0
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusAccepted {
		return nil, 0
	}
	if next, err := resp.Location(); err == nil {
		at = next
	}
	return at, arrived(resp)
}

// arrived returns how many bytes of an upload have arrived; 0 if the response does not say.
func arrived(resp *http.Response) int64 {
	_, last, ok := strings.Cut(resp.Header.Get("Range"), "-")
	n, err := strconv.ParseInt(last, 10, 64)
	if !ok || err != nil || n <= 0 { // "0-0" stands for one byte and for none
		return 0
	}
	return n + 1
}

// patch sends the next n bytes of the blob, which begin at off, and returns how many have arrived since the beginning.
func (u *upload) patch(ctx context.Context, body io.Reader, off, n int64) (int64, error) {
	resp, err := u.send(ctx, http.MethodPatch, u.at, body, n, fmt.Sprintf("%d-%d", off, off+n-1))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusAccepted, http.StatusNoContent, http.StatusCreated); err != nil {
		if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && off > 0 { // ask again where it stopped
			return 0, errAgain{err}
		}
		return 0, u.restart(err)
	}
	if next, err := resp.Location(); err == nil {
		u.at = next
	}
	if got := arrived(resp); got > off && got < off+n {
		return got, nil
	}
	return off + n, nil
}

// put sends size bytes, the last ones, and ends the upload.
func (u *upload) put(ctx context.Context, body io.Reader, size int64) error {
	at := *u.at
	q := at.Query()
	q.Set("digest", u.d.Digest.String())
	at.RawQuery = q.Encode()
	resp, err := u.send(ctx, http.MethodPut, &at, body, size, "")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return answered(resp, http.StatusCreated, http.StatusNoContent)
}

func (u *upload) send(ctx context.Context, method string, at *url.URL, body io.Reader, size int64, part string) (*http.Response, error) {
	src := &source{Reader: body}
	req, err := http.NewRequestWithContext(ctx, method, at.String(), io.NopCloser(src))
	if err != nil {
		return nil, err
	}
	if req.ContentLength = size; size == 0 {
		req.Body = http.NoBody
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	if part != "" {
		req.Header.Set("Content-Range", part)
	}
	resp, err := u.s.do(req)
	if src.err == nil {
		return resp, err
	}
	if resp != nil {
		resp.Body.Close()
	}
	return nil, errOpen{src.err}
}

// errOpen marks that the blob could not be read here, which no repetition mends.
type errOpen struct{ error }

func (e errOpen) Unwrap() error { return e.error }

// source remembers that reading the blob failed, which the HTTP client reports like a broken connection.
type source struct {
	io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

func worthResending(err error) bool {
	var local errOpen
	var again errAgain
	if errors.As(err, &local) || errors.As(err, &again) {
		return errors.As(err, &again)
	}
	var e *Error
	if errors.As(err, &e) {
		// 401: the token may have run out in the middle of the body; the next try gets a new one.
		return passingStatus(e.Status) || e.Class == Unauthorized && e.Status == http.StatusUnauthorized
	}
	return broken(err)
}
