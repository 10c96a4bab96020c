package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PushBlob makes the repository of ref hold a blob: it is there already, or it is mounted from another
// repository of the same host, or open is called (again for every attempt) and its bytes are sent. mountFrom
// are references that may hold the blob; those of other hosts are passed over. Pushes go to the registry
// itself, never to a mirror.
func (c *Client) PushBlob(ctx context.Context, ref string, d ocispec.Descriptor, mountFrom []string, open func(context.Context) (io.ReadCloser, error)) error {
	n, err := c.parse(ref)
	if err != nil {
		return err
	}
	n.tag, n.digest = "", d.Digest
	return explain(c.pushBlob(ctx, c.origin(n), d, mountFrom, open), n.String())
}

func (c *Client) pushBlob(ctx context.Context, e endpoint, d ocispec.Descriptor, mountFrom []string, open func(context.Context) (io.ReadCloser, error)) error {
	if slices.Contains(c.known(e, d.Digest), e.repo) {
		return nil
	}
	release, err := c.slot(ctx, c.pushes, e.host)
	if err != nil {
		return err
	}
	defer release()
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo, push: true})
	if err != nil {
		return err
	}
	has, err := s.hasBlob(ctx, e, d.Digest)
	if err != nil {
		return err
	}
	if !has {
		if err := c.send(ctx, s, e, d, mountFrom, open); err != nil {
			return err
		}
	}
	c.know(e, d.Digest)
	return nil
}

func (c *Client) send(ctx context.Context, s *session, e endpoint, d ocispec.Descriptor, mountFrom []string, open func(context.Context) (io.ReadCloser, error)) error {
	for _, from := range c.candidates(e, d.Digest, mountFrom) {
		if c.mount(ctx, e, d.Digest, from) {
			return nil
		}
	}
	u := &upload{s: s, e: e, d: d, open: open, first: c.chunk}
	for try, arrived := 1, int64(0); ; try++ {
		err := u.attempt(ctx)
		if u.off > arrived { // it goes on, slowly
			try, arrived = 1, u.off
		}
		if err == nil || try == tries || ctx.Err() != nil || !worthResending(err) {
			return err
		}
		wait, ok := told(err)
		if !ok {
			return err
		}
		if err := sleep(ctx, max(wait, c.pause(try))); err != nil {
			return err
		}
		if has, err := s.hasBlob(ctx, e, d.Digest); err == nil && has { // only the answer was lost
			return nil
		}
	}
}

// candidates are the repositories of the host from which a mount may succeed.
func (c *Client) candidates(e endpoint, d digest.Digest, mountFrom []string) []string {
	repos := c.known(e, d)
	for _, ref := range mountFrom {
		n, err := parse(ref)
		if err != nil {
			continue
		}
		for _, at := range c.endpoints(n) { // the host may be a mirror of where the blob is from
			if at.host == e.host && at.repo != e.repo && !slices.Contains(repos, at.repo) {
				repos = append(repos, at.repo)
			}
		}
	}
	return repos
}

// mount asks the registry to link a blob from another repository. Any refusal means that it is uploaded.
func (c *Client) mount(ctx context.Context, e endpoint, d digest.Digest, from string) bool {
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo, push: true, from: from})
	if err != nil {
		return false
	}
	at := s.base + e.repo + "/blobs/uploads/?mount=" + d.String() + "&from=" + from // neither has what needs escaping
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, at, nil)
	if err != nil {
		return false
	}
	resp, err := s.do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	if at, err := resp.Location(); err == nil && resp.StatusCode == http.StatusAccepted {
		s.cancel(ctx, at)
	}
	return resp.StatusCode == http.StatusCreated
}

// cancel gives up an upload, so that the registry keeps nothing waiting. Not all registries know how.
func (s *session) cancel(ctx context.Context, at *url.URL) {
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, at.String(), nil)
	if err != nil {
		return
	}
	if resp, err := s.client.Do(req); err == nil {
		resp.Body.Close()
	}
}

// MayPush says whether a push to the repository of ref would be let in, before there is anything to push: it
// begins an upload and takes it back.
func (c *Client) MayPush(ctx context.Context, ref string) error {
	n, err := c.parse(ref)
	if err != nil {
		return err
	}
	return explain(c.mayPush(ctx, c.origin(n)), n.String())
}

func (c *Client) mayPush(ctx context.Context, e endpoint) error {
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo, push: true})
	if err != nil {
		return err
	}
	at, _, err := s.begin(ctx, e)
	if err != nil {
		return err
	}
	s.cancel(ctx, at)
	return nil
}

// HasManifest says whether the repository of ref holds a manifest or index, in the registry itself. Whatever keeps it
// from being known is a no.
func (c *Client) HasManifest(ctx context.Context, ref string, d digest.Digest) bool {
	n, err := c.parse(ref)
	if err != nil {
		return false
	}
	e := c.origin(n)
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo, push: true})
	if err != nil {
		return false
	}
	there, err := s.head(ctx, e, d.String())
	return err == nil && there.Digest == d
}

// PushManifest makes ref, a tag or a digest, name a manifest or index. Everything it refers to must be there
// already. If the registry says that it is so already nothing is sent.
func (c *Client) PushManifest(ctx context.Context, ref string, d ocispec.Descriptor, data []byte) error {
	n, err := c.parse(ref)
	if err != nil {
		return err
	}
	if len(data) > maxManifest {
		return &Error{Ref: n.String(), Text: fmt.Sprintf("manifest of %d bytes: registries take %d MiB", len(data), maxManifest>>20)}
	}
	if err := c.pushManifest(ctx, n, d, data); err != nil {
		return explain(err, n.String())
	}
	c.settle(n, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
	return nil
}

func (c *Client) pushManifest(ctx context.Context, n name, d ocispec.Descriptor, data []byte) error {
	e := c.origin(n)
	target := n.tag
	if target == "" {
		target = d.Digest.String()
	}
	s, err := c.session(ctx, sessionKey{host: e.host, repo: e.repo, push: true})
	if err != nil {
		return err
	}
	if there, err := s.head(ctx, e, target); err == nil && there.Digest == d.Digest {
		return nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, s.base+e.repo+"/manifests/"+target, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", d.MediaType)
	resp, err := s.do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusCreated, http.StatusOK, http.StatusAccepted); err != nil {
		if no := new(Error); errors.As(err, &no) && (no.Status == http.StatusBadRequest || no.Status == http.StatusNotFound) && c.disown(e) {
			no.Class = Incomplete
		}
		return err
	}
	if got := digest.Digest(strings.TrimSpace(resp.Header.Get("Docker-Content-Digest"))); got != "" && got != d.Digest {
		return &Error{Text: fmt.Sprintf("the registry stored digest %s, not %s", got, d.Digest)}
	}
	return nil
}
