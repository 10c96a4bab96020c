package registry

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/opencontainers/go-digest"

	"filo/layer/registry/reference"
)

// name is a normalised reference: never without a tag or a digest.
type name struct {
	domain, path string
	tag          string
	digest       digest.Digest
}

// endpoint is a repository on a host that can be asked: a registry itself or one of its mirrors.
type endpoint struct {
	host, repo string
	domain     string // the registry it stands for
}

// Normalize returns the full form of a reference: "busybox" becomes docker.io/library/busybox:latest.
// A reference with a digest keeps its tag if it has one and gets none otherwise.
func Normalize(ref string) (string, error) {
	n, err := parse(ref)
	if err != nil {
		return "", err
	}
	return n.String(), nil
}

// Repository returns the repository part of a reference in its full form, docker.io/library/busybox.
func Repository(ref string) (string, error) {
	n, err := parse(ref)
	if err != nil {
		return "", err
	}
	return n.domain + "/" + n.path, nil
}

func parse(ref string) (name, error) {
	n, err := reference.Parse(ref)
	if err != nil {
		return name{}, fmt.Errorf("invalid reference %q: %w", ref, err)
	}
	n = n.Tagged()
	return name{domain: n.Domain, path: n.Path, tag: n.Tag, digest: n.Digest}, nil
}

func (n name) String() string {
	s := n.domain + "/" + n.path
	if n.tag != "" {
		s += ":" + n.tag
	}
	if n.digest != "" {
		s += "@" + n.digest.String()
	}
	return s
}

// target is what a manifest is read by: a digest is exact, so the tag beside it does not count.
func (n name) target() string {
	if n.digest != "" {
		return n.digest.String()
	}
	return n.tag
}

// origin is the registry itself, where the configuration says it is.
func (c *Client) origin(n name) endpoint {
	if r, ok := c.o.Config.rule(n); ok && r.location != "" {
		return r.replaced(n, r.location)
	}
	return endpoint{host: n.domain, repo: n.path, domain: n.domain}
}

// parse reads a reference and refuses one that the configuration blocks.
func (c *Client) parse(ref string) (name, error) {
	n, err := parse(ref)
	if err != nil {
		return name{}, err
	}
	if r, ok := c.o.Config.rule(n); ok && r.blocked {
		return name{}, &Error{Ref: n.String(), Class: Denied, Text: "the registry configuration blocks " + r.prefix}
	}
	return n, nil
}

// ParseMirrors reads "docker.io=HOST:PORT,docker.io=HOST/PATH,other.example=…": for each registry domain the
// mirrors to read from, in the order given. A mirror may start with http:// to allow plain http for it.
func ParseMirrors(s string) (map[string][]string, error) {
	mirrors := map[string][]string{}
	for item := range strings.SplitSeq(s, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		domain, mirror, ok := strings.Cut(item, "=")
		domain, mirror = strings.TrimSpace(domain), strings.TrimSuffix(strings.TrimSpace(mirror), "/")
		if !ok || domain == "" {
			return nil, fmt.Errorf("mirror %q: want REGISTRY=HOST[:PORT][/PATH]", item)
		}
		if err := checkMirror(mirror); err != nil {
			return nil, fmt.Errorf("mirror %q: %w", item, err)
		}
		mirrors[domain] = append(mirrors[domain], mirror)
	}
	return mirrors, nil
}

func checkMirror(m string) error {
	bare := bareMirror(m)
	if strings.Contains(bare, "://") {
		return fmt.Errorf("unknown scheme in %q", m)
	}
	host, path, _ := strings.Cut(bare, "/")
	probe := "library/x"
	if path != "" {
		probe = path + "/" + probe
	}
	n, err := reference.ParseFull(host + "/" + probe)
	if err != nil {
		return err
	}
	if n.Domain != host {
		return fmt.Errorf("%q is not a host", host)
	}
	return nil
}

func bareMirror(m string) string {
	return strings.TrimPrefix(strings.TrimPrefix(m, "https://"), "http://")
}

// clearMirror returns the host of a mirror and whether it was given with http://.
func clearMirror(m string) (string, bool) {
	host, _, _ := strings.Cut(bareMirror(m), "/")
	return host, strings.HasPrefix(m, "http://")
}

// endpoints returns where n may be read from: its registry's mirrors, then the registry.
func (c *Client) endpoints(n name) []endpoint {
	var all []endpoint
	for _, m := range c.o.Mirrors[n.domain] {
		host, path, _ := strings.Cut(bareMirror(m), "/")
		repo := n.path
		if path != "" {
			repo = path + "/" + repo
		}
		all = append(all, endpoint{host: host, repo: repo, domain: n.domain})
	}
	if r, ok := c.o.Config.rule(n); ok {
		for _, m := range r.mirrors {
			if m.serves(n.digest) {
				all = append(all, r.replaced(n, m.location))
			}
		}
	}
	return append(all, c.origin(n))
}

// loopback reports whether a host, with or without port, is this machine by its own spelling. Names are not
// looked up: what a resolver answers is not ours to trust.
func loopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}
