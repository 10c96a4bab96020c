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
// which every registry knows best; later ones go on where the registry says that it stopped, if it can tell.
type upload struct {
	s    *session
	e    endpoint
	d    ocispec.Descriptor
	open func(context.Context) (io.ReadCloser, error)

	at  *url.URL // where the registry takes the next bytes; nil before the first attempt
	off int64    // from where on the blob was sent in the last attempt
}

// attempt sends what is left of the blob.
func (u *upload) attempt(ctx context.Context) error {
	body, err := u.open(ctx)
	if err != nil {
		return errOpen{err}
	}
	defer body.Close()
	off, err := u.begin(ctx)
	if err != nil {
		return err
	}
	if off == 0 {
		return u.put(ctx, body, u.d.Size)
	}
	u.off = off
	if _, err := io.CopyN(io.Discard, body, off); err != nil {
		return errOpen{err}
	}
	if err := u.patch(ctx, body, off); err != nil {
		return err
	}
	if err := u.put(ctx, http.NoBody, 0); err != nil {
		return u.restart(err)
	}
	return nil
}

// restart gives the upload up if the registry does not like how it went on: it may like starting again.
func (u *upload) restart(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Status < 500 && e.Class == Other || Is(err, NotFound) {
		u.at = nil
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
		if at, off := u.s.status(ctx, u.at); off > 0 && off < u.d.Size {
			u.at = at
			return off, nil
		}
	}
	at, err := u.s.begin(ctx, u.e)
	u.at = at
	return 0, err
}

// begin starts an upload.
func (s *session) begin(ctx context.Context, e endpoint) (*url.URL, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+e.repo+"/blobs/uploads/", nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusAccepted); err != nil {
		return nil, err
	}
	return resp.Location()
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
	_, last, ok := strings.Cut(resp.Header.Get("Range"), "-")
	n, err := strconv.ParseInt(last, 10, 64)
	if !ok || err != nil || n <= 0 { // "0-0" stands for one byte and for none
		return nil, 0
	}
	if next, err := resp.Location(); err == nil {
		at = next
	}
	return at, n + 1
}

// patch sends the rest of the blob, from off on.
func (u *upload) patch(ctx context.Context, body io.Reader, off int64) error {
	resp, err := u.send(ctx, http.MethodPatch, u.at, body, u.d.Size-off, fmt.Sprintf("%d-%d", off, u.d.Size-1))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusAccepted, http.StatusNoContent, http.StatusCreated); err != nil {
		return u.restart(err)
	}
	if next, err := resp.Location(); err == nil {
		u.at = next
	}
	return nil
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
