// Package registry carries blobs and manifests to and from registries and their mirrors.
//
// It hands out plain readers and takes functions that open them. It knows no store, verifies manifests but
// leaves blobs to whoever stores them, and never speaks plain http to a host that is neither loopback nor
// listed as insecure. Credentials come from Docker's configuration and its helpers and are never printed.
//
// Start at [Open]. registry.go finds out what a reference means, name.go reads references and mirrors,
// config.go reads configurations, read.go fetches, push.go and upload.go send, stall.go watches transfers, current.go is for those who change what a tag
// names, session.go and token.go sign in, certs.go knows whom to trust, retry.go tries again, error.go says
// what went wrong.
package registry

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Client talks to registries. It is safe for concurrent use and remembers, for its life, what references
// resolved to, who is signed in where, and which blobs it knows to be in which repository.
type Client struct {
	o     Options
	plain map[string]bool // hosts that may be spoken to in the clear
	retry *retrying
	chunk int64 // size of the chunks in which uploads that broke go on

	mu       sync.Mutex
	doors    map[string]*door
	sessions map[sessionKey]*session
	resolved map[string]*resolution
	homes    map[string][]string // host@digest: repositories known to hold the blob
	told     map[home]bool       // which of them are known from hearsay, see [Client.Know]
	pulls    map[string]chan struct{}
	pushes   map[string]chan struct{}
}

// Options says where to look and whom to trust.
type Options struct {
	Mirrors   map[string][]string // registry domain: mirrors in the order to ask, each HOST[:PORT][/PATH], see [ParseMirrors]
	Insecure  []string            // HOST[:PORT] that may use plain http or an unverified certificate
	Certs     []string            // directories with certificates by host; nil: those of Docker and Podman
	Config    Config              // more of the same, see [ReadConfig]; what stands above comes first
	UserAgent string              // "filo" when empty
}

// parallel is the number of blob transfers in one direction that a host sees at once: BuildKit's figure,
// which registries are used to.
const parallel = 4

// Open returns a client. Nothing is contacted before the first request.
func Open(o Options) *Client {
	if o.UserAgent == "" {
		o.UserAgent = "filo"
	}
	if o.Certs == nil {
		o.Certs = certDirs
	}
	c := &Client{
		o:        o,
		plain:    map[string]bool{},
		doors:    map[string]*door{},
		sessions: map[sessionKey]*session{},
		resolved: map[string]*resolution{},
		homes:    map[string][]string{},
		told:     map[home]bool{},
		pulls:    map[string]chan struct{}{},
		pushes:   map[string]chan struct{}{},
		chunk:    firstChunk,
	}
	for _, h := range o.Insecure {
		c.plain[h] = true
	}
	for _, mirrors := range o.Mirrors {
		for _, m := range mirrors {
			if host, clear := clearMirror(m); clear {
				c.plain[host] = true
			}
		}
	}
	c.retry = newRetrying(c.plain, append(o.Certs[:len(o.Certs):len(o.Certs)], o.Config.certs...), 200*time.Millisecond)
	c.retry.hosts = o.Config.hosts
	return c
}

// resolution is one reference being resolved, once.
type resolution struct {
	mu   sync.Mutex
	done bool
	d    ocispec.Descriptor
}

// Resolve returns the descriptor (media type, digest, size) of the manifest or index that ref names. A
// reference is asked for once; later calls return what the first one found. Errors are not remembered.
func (c *Client) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	r, err := c.parse(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	full := r.String()
	c.mu.Lock()
	res := c.resolved[full]
	if res == nil {
		res = &resolution{}
		c.resolved[full] = res
	}
	c.mu.Unlock()

	res.mu.Lock()
	defer res.mu.Unlock()
	if res.done {
		return res.d, nil
	}
	d, err := c.resolve(ctx, r)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	res.d, res.done = d, true
	return d, nil
}

func (c *Client) resolve(ctx context.Context, r name) (ocispec.Descriptor, error) {
	var d ocispec.Descriptor
	err := c.read(ctx, r, func(e endpoint) error {
		var err error
		d, err = c.head(ctx, e, r.target())
		if err == nil && (d.Digest == "" || d.Size < 0) {
			d, _, err = c.get(ctx, e, r.target(), r.digest)
		}
		if err == nil && r.digest != "" && d.Digest != r.digest {
			return &Error{Text: "digest " + d.Digest.String() + " is not the one asked for"}
		}
		return err
	})
	return d, err
}

// settle records what a tag points at now.
func (c *Client) settle(r name, d ocispec.Descriptor) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resolved[r.String()] = &resolution{done: true, d: d}
}

// know records that a repository of a host holds a blob.
func (c *Client) know(e endpoint, d digest.Digest) {
	key := e.host + "@" + d.String()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, repo := range c.homes[key] {
		if repo == e.repo {
			return
		}
	}
	c.homes[key] = append(c.homes[key], e.repo)
}

// known returns the repositories of the host that hold the blob, as far as this client has seen.
func (c *Client) known(e endpoint, d digest.Digest) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.homes[e.host+"@"+d.String()]...)
}

// slot waits until the host may be sent one more blob transfer and returns the function that ends it.
func (c *Client) slot(ctx context.Context, of map[string]chan struct{}, host string) (func(), error) {
	c.mu.Lock()
	s := of[host]
	if s == nil {
		s = make(chan struct{}, parallel)
		of[host] = s
	}
	c.mu.Unlock()
	select {
	case s <- struct{}{}:
		return sync.OnceFunc(func() { <-s }), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// manifestTypes are the media types accepted where a manifest is asked for. Schema 1 is among them so that
// a registry which has nothing newer says so by its answer rather than by "not found".
var manifestTypes = []string{
	ocispec.MediaTypeImageIndex,
	ocispec.MediaTypeImageManifest,
	"application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.docker.distribution.manifest.v1+prettyjws",
	"application/vnd.docker.distribution.manifest.v1+json",
	"*/*",
}

func accept(req *http.Request) {
	req.Header.Set("Accept", strings.Join(manifestTypes, ", ")) // one header: proxies lose repeated ones
}

// Trusting returns a client with the same options that also lets the hosts of the given references use plain
// http or an unverified certificate. It shares nothing with c.
func (c *Client) Trusting(refs ...string) (*Client, error) {
	o := c.o
	o.Insecure = append([]string(nil), o.Insecure...)
	for _, ref := range refs {
		n, err := parse(ref)
		if err != nil {
			return nil, err
		}
		o.Insecure = append(o.Insecure, c.origin(n).host)
	}
	t := Open(o)
	t.retry.base = c.retry.base
	return t, nil
}
