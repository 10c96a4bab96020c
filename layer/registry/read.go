package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxManifest is the largest manifest accepted: the limit that registries themselves keep to.
const maxManifest = 4 << 20

// Manifest returns a manifest or an index and its descriptor. If d is not empty the one with that digest is
// returned, whatever the tag of ref; the bytes are verified against it.
func (c *Client) Manifest(ctx context.Context, ref string, d digest.Digest) (ocispec.Descriptor, []byte, error) {
	n, err := c.parse(ref)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	if d != "" {
		n.digest = d
	}
	var (
		desc ocispec.Descriptor
		data []byte
	)
	err = c.read(ctx, n, func(e endpoint) error {
		var err error
		desc, data, err = c.get(ctx, e, n.target(), n.digest)
		return err
	})
	return desc, data, err
}

// Blob opens a blob. A connection that breaks is taken up again where it broke. The bytes are not verified:
// whoever stores them does that. The reader counts as a transfer until it is closed, and has a method Ref that tells
// what it reads.
func (c *Client) Blob(ctx context.Context, ref string, d ocispec.Descriptor) (io.ReadCloser, error) {
	n, err := c.parse(ref)
	if err != nil {
		return nil, err
	}
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	n.tag, n.digest = "", d.Digest
	var r io.ReadCloser
	err = c.read(ctx, n, func(e endpoint) error {
		var err error
		r, err = c.blob(ctx, e, n, d)
		return err
	})
	return r, err
}

// HasBlob reports whether the repository of ref at its own registry, not a mirror, holds a blob.
func (c *Client) HasBlob(ctx context.Context, ref string, d digest.Digest) (bool, error) {
	n, err := c.parse(ref)
	if err != nil {
		return false, err
	}
	has, err := c.hasBlob(ctx, c.origin(n), d)
	return has, explain(err, n.String())
}

// read calls f for each endpoint of n until one succeeds. When all fail, an origin that cannot be reached
// says less than a mirror that answered "not found".
func (c *Client) read(ctx context.Context, n name, f func(endpoint) error) error {
	var missing, err error
	for _, e := range c.endpoints(n) {
		if err = explain(f(e), n.String()); err == nil || ctx.Err() != nil {
			return err
		}
		if Is(err, NotFound) {
			missing = err
		}
	}
	if missing != nil && (Is(err, Unreachable) || Is(err, TLS)) {
		return missing
	}
	return err
}

// head returns the descriptor of a manifest without fetching it; Digest is empty or Size negative when the
// registry does not say.
func (c *Client) head(ctx context.Context, e endpoint, target string) (ocispec.Descriptor, error) {
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return s.head(ctx, e, target)
}

func (s *session) head(ctx context.Context, e endpoint, target string) (ocispec.Descriptor, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, s.base+e.repo+"/manifests/"+target, nil)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	accept(req)
	resp, err := s.do(req)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusMethodNotAllowed {
		return ocispec.Descriptor{}, nil
	}
	if err := answered(resp, http.StatusOK); err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType(resp), Size: resp.ContentLength}
	if dg := digest.Digest(resp.Header.Get("Docker-Content-Digest")); dg.Validate() == nil {
		d.Digest = dg
	}
	return d, nil
}

// get fetches a manifest and verifies it against want, if given.
func (c *Client) get(ctx context.Context, e endpoint, target string, want digest.Digest) (ocispec.Descriptor, []byte, error) {
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo})
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	for try := 1; ; try++ {
		d, data, err := s.get(ctx, e, target, want)
		if err == nil || try == tries || !broken(err) {
			return d, data, err
		}
		if err := sleep(ctx, c.pause(try)); err != nil {
			return ocispec.Descriptor{}, nil, err
		}
	}
}

func (s *session) get(ctx context.Context, e endpoint, target string, want digest.Digest) (ocispec.Descriptor, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+e.repo+"/manifests/"+target, nil)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	accept(req)
	resp, err := s.do(req)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusOK); err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	if len(data) > maxManifest {
		return ocispec.Descriptor{}, nil, &Error{Text: fmt.Sprintf("manifest is larger than %d MiB", maxManifest>>20)}
	}
	d := ocispec.Descriptor{MediaType: manifestType(resp, data), Digest: digest.FromBytes(data), Size: int64(len(data))}
	if want == "" {
		return d, data, nil
	}
	if d.Digest = want.Algorithm().FromBytes(data); d.Digest != want {
		return ocispec.Descriptor{}, nil, &Error{Text: fmt.Sprintf("manifest has digest %s, not %s", d.Digest, want)}
	}
	return d, data, nil
}

// manifestType prefers what the document says over the header: the document is what the digest covers.
func manifestType(resp *http.Response, data []byte) string {
	var m struct {
		MediaType string `json:"mediaType"`
	}
	if json.Unmarshal(data, &m) == nil && m.MediaType != "" {
		return m.MediaType
	}
	return mediaType(resp)
}

func mediaType(resp *http.Response) string {
	t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

func (c *Client) hasBlob(ctx context.Context, e endpoint, d digest.Digest) (bool, error) {
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo})
	if err != nil {
		return false, err
	}
	return s.hasBlob(ctx, e, d)
}

func (s *session) hasBlob(ctx context.Context, e endpoint, d digest.Digest) (bool, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, s.base+e.repo+"/blobs/"+d.String(), nil)
	if err != nil {
		return false, err
	}
	resp, err := s.do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	err = answered(resp, http.StatusOK)
	var no *Error
	if errors.As(err, &no) && no.Class == NotFound {
		return false, nil
	}
	return err == nil, err
}

// blob opens a blob at one endpoint.
func (c *Client) blob(ctx context.Context, e endpoint, n name, d ocispec.Descriptor) (io.ReadCloser, error) {
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo})
	if err != nil {
		return nil, err
	}
	release, err := c.slot(ctx, c.pulls, e.host)
	if err != nil {
		return nil, err
	}
	r := &download{ctx: ctx, c: c, s: s, url: s.base + e.repo + "/blobs/" + d.Digest.String(), ref: n.String(), size: d.Size, release: release}
	if d.Digest == digest.FromBytes(nil) {
		r.body = io.NopCloser(bytes.NewReader(nil))
		return r, nil
	}
	if err := r.open(); err != nil {
		release()
		return nil, err
	}
	c.know(e, d.Digest)
	return r, nil
}

// download reads a blob over as many connections as it takes.
type download struct {
	ctx     context.Context
	c       *Client
	s       *session
	url     string
	ref     string
	body    io.ReadCloser // nil between connections
	loose   bool          // the end of body cannot be told from a connection that broke
	off     int64
	size    int64 // as the descriptor says; 0 or less: unknown
	failed  int   // tries since the last byte
	release func()
}

// open asks for the blob from the current offset on.
func (d *download) open() error {
	req, err := http.NewRequestWithContext(d.ctx, http.MethodGet, d.url, nil)
	if err != nil {
		return err
	}
	// Without this a transport may unpack a gzip on the way, and offsets would mean nothing.
	req.Header.Set("Accept-Encoding", "identity")
	if d.off > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(d.off, 10)+"-")
	}
	resp, err := d.s.do(req)
	if err != nil {
		return err
	}
	ok := []int{http.StatusOK}
	if d.off > 0 {
		ok = append(ok, http.StatusPartialContent)
	}
	if err := answered(resp, ok...); err != nil {
		resp.Body.Close()
		return err
	}
	if d.off > 0 && resp.StatusCode == http.StatusOK {
		if _, err := io.CopyN(io.Discard, resp.Body, d.off); err != nil { // the registry knows no ranges
			resp.Body.Close()
			return err
		}
	}
	d.body = resp.Body
	d.loose = resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 && resp.ProtoMajor == 1
	return nil
}

// Read implements io.Reader.
func (d *download) Read(p []byte) (int, error) {
	for {
		if d.body == nil {
			if err := d.reopen(); err != nil {
				return 0, err
			}
		}
		n, err := d.body.Read(p)
		d.off += int64(n)
		if n > 0 {
			d.failed = 0
		}
		if d.size > 0 && d.off > d.size {
			return 0, &Error{Ref: d.ref, Text: fmt.Sprintf("blob is longer than its %d bytes", d.size)}
		}
		if err == nil || err == io.EOF && (d.size <= 0 || d.off == d.size) {
			return n, err
		}
		if d.ctx.Err() != nil {
			return n, d.ctx.Err()
		}
		if err == io.EOF && !d.loose {
			return n, &Error{Ref: d.ref, Text: fmt.Sprintf("blob has %d bytes, not %d, and another digest", d.off, d.size)}
		}
		d.body.Close()
		d.body = nil
		if n > 0 {
			return n, nil
		}
	}
}

// reopen continues a broken transfer.
func (d *download) reopen() error {
	for {
		d.failed++
		if d.failed > tries {
			return &Error{Ref: d.ref, Class: Unreachable, Text: fmt.Sprintf("transfer broke off at %d of %d bytes", d.off, d.size)}
		}
		if err := sleep(d.ctx, d.c.pause(d.failed)); err != nil {
			return err
		}
		err := d.open()
		if err == nil {
			return nil
		}
		if !broken(err) {
			return explain(err, d.ref)
		}
	}
}

// Ref names the blob in the errors of whoever verifies it.
func (d *download) Ref() string { return d.ref }

// Close implements io.Closer.
func (d *download) Close() error {
	d.release()
	if d.body == nil {
		return nil
	}
	return d.body.Close()
}

// pause spaces attempts that are made above the transport.
func (c *Client) pause(try int) (d time.Duration) {
	d, _ = c.retry.wait(try, nil)
	return d
}
