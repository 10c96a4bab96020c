package registry

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	ggcr "github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// sessionKey names a right on a repository: what a bearer token is asked for.
type sessionKey struct {
	host, repo string
	push       bool
	from       string // repository of the host whose blobs may be mounted
}

// session is one signed-in HTTP client, made on first use.
type session struct {
	mu     sync.Mutex
	client *http.Client
	base   string // SCHEME://HOST/v2/
	hint   error  // why there are no credentials although some are configured
}

// door is how a host wants to be spoken to, found out once.
type door struct {
	mu     sync.Mutex
	known  bool
	host   string // as the registry is called on the network: docker.io has another name there
	scheme string
	wants  *transport.Challenge
}

// session returns the signed-in client for a right, signing in if need be.
func (c *Client) session(ctx context.Context, k sessionKey) (*session, error) {
	c.mu.Lock()
	s := c.sessions[k]
	if s == nil {
		s = &session{}
		c.sessions[k] = s
	}
	c.mu.Unlock()

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client != nil {
		return s, nil
	}
	if err := c.signIn(ctx, k, s); err != nil {
		return nil, err
	}
	return s, nil
}

func (c *Client) signIn(ctx context.Context, k sessionKey, s *session) error {
	d, err := c.door(ctx, k.host)
	if err != nil {
		return err
	}
	auth, hint := credentials(ctx, d.host, k.repo)
	config, err := authn.Authorization(ctx, auth)
	if err != nil {
		config, hint = &authn.AuthConfig{}, err
	}
	signed := &signing{
		next:   c.retry,
		host:   d.host,
		scheme: d.scheme,
		auth:   *config,
		agent:  c.o.UserAgent,
		clear:  c.retry.clear,
		scopes: k.scopes(),
	}
	if strings.EqualFold(d.wants.Scheme, "bearer") {
		signed.realm, signed.service = d.wants.Parameters["realm"], d.wants.Parameters["service"]
	}
	s.client = &http.Client{Transport: signed}
	s.base = d.scheme + "://" + d.host + "/v2/"
	s.hint = hint
	return nil
}

// door asks a host how it wants to be spoken to: encrypted, unless it only understands plain http and may, or is this
// machine and understands that.
func (c *Client) door(ctx context.Context, host string) (*door, error) {
	c.mu.Lock()
	d := c.doors[host]
	if d == nil {
		d = &door{}
		c.doors[host] = d
	}
	c.mu.Unlock()

	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known {
		return d, nil
	}
	opts := []ggcr.Option{ggcr.WeakValidation}
	if c.retry.clear(host) {
		opts = append(opts, ggcr.Insecure)
	}
	reg, err := ggcr.NewRegistry(host, opts...)
	if err != nil {
		return nil, err
	}
	wants, err := c.ping(ctx, reg)
	if err != nil {
		return nil, err
	}
	d.host, d.scheme, d.wants, d.known = reg.RegistryStr(), "https", wants, true
	if wants.Insecure {
		d.scheme = "http"
	}
	return d, nil
}

// ping asks the question itself. This machine is asked in the clear first, unless it has certificates, and once: nobody
// listens in there, a registry there rarely knows more, and the keys for a connection that it then refuses take longer than
// all else that it is asked.
func (c *Client) ping(ctx context.Context, reg ggcr.Registry) (*transport.Challenge, error) {
	via, err := c.retry.via(reg.RegistryStr())
	if err == nil && loopback(reg.RegistryStr()) && (via == c.retry.strict || via == c.retry.lax) {
		if wants, err := transport.Ping(ctx, reg, transport.NewUserAgent(inClear{Patient(via, c.retry.still)}, c.o.UserAgent)); err == nil {
			return wants, nil
		}
	}
	return transport.Ping(ctx, reg, transport.NewUserAgent(c.retry, c.o.UserAgent))
}

// inClear is a transport that does not encrypt, nor follow to where one has to.
type inClear struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (t inClear) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "http" {
		return nil, errEncrypted
	}
	return t.next.RoundTrip(req)
}

// errEncrypted refuses a request that would be encrypted.
var errEncrypted = errors.New("https is asked later")

func (k sessionKey) scopes() []string {
	right := transport.PullScope
	if k.push {
		right = transport.PushScope
	}
	scopes := []string{"repository:" + k.repo + ":" + right}
	if k.from != "" {
		scopes = append(scopes, "repository:"+k.from+":"+transport.PullScope)
	}
	return scopes
}

// do sends a request. Errors carry no reference yet.
func (s *session) do(req *http.Request) (*http.Response, error) {
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, withHint(err, s.hint)
	}
	if resp.StatusCode == http.StatusUnauthorized && s.hint != nil {
		defer resp.Body.Close()
		return nil, withHint(answered(resp), s.hint)
	}
	return resp, nil
}

// withHint adds to an "unauthorized" why there were no credentials.
func withHint(err, hint error) error {
	if hint == nil {
		return err
	}
	var e *Error
	if explained := explain(err, ""); errors.As(explained, &e) && e.Class == Unauthorized {
		e.Text = oneLine(e.Text + "; credentials: " + hint.Error())
		return e
	}
	return err
}

// place is what credentials are looked up by: a host, or a host and the beginning of a repository's path.
type place string

func (p place) String() string      { return string(p) }
func (p place) RegistryStr() string { return string(p) }

// credentials returns what Docker's configuration holds for a repository, the longest matching path first,
// then the host. A configuration that cannot be read means no credentials, and the reason is returned.
func credentials(ctx context.Context, host, repo string) (authn.Authenticator, error) {
	for path := repo; path != ""; {
		a, err := authn.Resolve(ctx, authn.DefaultKeychain, place(host+"/"+path))
		if err == nil && a != authn.Anonymous {
			return a, nil
		}
		i := strings.LastIndexByte(path, '/')
		if i < 0 {
			break
		}
		path = path[:i]
	}
	a, err := authn.Resolve(ctx, authn.DefaultKeychain, place(host))
	if err != nil {
		return authn.Anonymous, err
	}
	return a, nil
}
