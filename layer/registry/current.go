package registry

import (
	"context"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Current returns what ref names at its registry itself at this moment: no mirror is asked and nothing
// remembered. Digest is empty if the registry does not tell without sending the document.
func (c *Client) Current(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	n, err := c.parse(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := c.head(ctx, c.origin(n), n.target())
	return d, explain(err, n.String())
}

// Latest fetches what ref names at its registry itself at this moment, like [Client.Current].
func (c *Client) Latest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	n, err := c.parse(ref)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	d, data, err := c.get(ctx, c.origin(n), n.target(), n.digest)
	return d, data, explain(err, n.String())
}

// Know says that the repository of ref holds blobs, for instance since a manifest there lists them: they are
// not asked for before a push and mounted from there into other repositories. Of a registry with mirrors
// nothing is believed, since the manifest may be a mirror's. If a push shows that the registry lacks one
// after all, all that was only said is forgotten
// and the error is of class [Incomplete].
func (c *Client) Know(ref string, blobs ...digest.Digest) {
	n, err := parse(ref)
	if err != nil || len(c.endpoints(n)) > 1 {
		return
	}
	e := c.origin(n)
	for _, d := range blobs {
		c.know(e, d)
		c.mu.Lock()
		c.told[home{e.host, e.repo, d}] = true
		c.mu.Unlock()
	}
}

// Doubt takes back that the repository of ref holds a blob.
func (c *Client) Doubt(ref string, d digest.Digest) {
	n, err := parse(ref)
	if err != nil {
		return
	}
	e := c.origin(n)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unknow(home{e.host, e.repo, d})
}

// home is a place where a blob is.
type home struct {
	host, repo string
	blob       digest.Digest
}

// unknow needs c.mu.
func (c *Client) unknow(h home) {
	key := h.host + "@" + h.blob.String()
	c.homes[key] = slices.DeleteFunc(slices.Clone(c.homes[key]), func(repo string) bool { return repo == h.repo })
	delete(c.told, h)
}

// disown forgets what was only told of a repository and reports whether there was anything.
func (c *Client) disown(e endpoint) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	any := false
	for h := range c.told {
		if h.host == e.host && h.repo == e.repo {
			c.unknow(h)
			any = true
		}
	}
	return any
}
