package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/opencontainers/go-digest"
)

// Config says for registries where else to read, how to connect, and whom to trust. The zero Config says nothing.
type Config struct {
	rules []rule
	hosts map[string]trust // by HOST[:PORT]
	certs []string         // directories with certificates by host
}

// rule is what holds for references that begin with prefix: a domain, or a domain and a path.
type rule struct {
	prefix   string
	location string // stands in place of prefix; "" is prefix itself
	blocked  bool
	mirrors  []mirror
}

// mirror is a place to read from before the registry itself.
type mirror struct {
	location string // HOST[:PORT][/PATH], put in place of the rule's prefix
	digests  bool   // asked for references by digest
	tags     bool   // asked for references by tag
}

// trust is how to connect to a host.
type trust struct {
	plain  bool // plain http
	lax    bool // its certificate is not verified
	ca     []string
	client [][2]string // files of a certificate and its key
}

// ReadConfig reads a configuration in one of the forms in use: a directory of HOST/hosts.toml as containerd has it
// (also with Docker's HOST/*.crt), or a file: the registries.conf of Podman and Skopeo, the registry tables of
// BuildKit's buildkitd.toml, or one hosts.toml that names its server.
func ReadConfig(path string) (Config, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return Config{}, err
	}
	c := Config{hosts: map[string]trust{}}
	if fi.IsDir() {
		return c, c.readDir(path)
	}
	err = c.readFile(path)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return c, err
}

func (c *Config) readFile(path string) error {
	var probe map[string]any
	if _, err := toml.DecodeFile(path, &probe); err != nil {
		return err
	}
	_, rules := probe["registry"].([]map[string]any)
	_, tables := probe["registry"].(map[string]any)
	switch {
	case rules || probe["unqualified-search-registries"] != nil:
		return c.readRegistries(path)
	case tables:
		return c.readBuildKit(path)
	case probe["host"] != nil || probe["server"] != nil:
		server, _ := probe["server"].(string)
		u, err := url.Parse(server)
		if err != nil || u.Host == "" {
			return errors.New("server is needed: the URL of the registry that the hosts stand for")
		}
		return c.readHosts(path, dockerDomain(u.Host))
	}
	return errors.New("neither registries.conf nor hosts.toml: no [[registry]], [registry.NAME], [host.URL] or server")
}

// readRegistries reads the form of registries.conf.
func (c *Config) readRegistries(path string) error {
	type place struct {
		Location string
		Insecure bool
		PullFrom string `toml:"pull-from-mirror"`
	}
	var doc struct {
		Registry []struct {
			place
			Prefix         string
			Blocked        bool
			MirrorByDigest bool `toml:"mirror-by-digest-only"`
			Mirror         []place
		}
	}
	if _, err := toml.DecodeFile(path, &doc); err != nil {
		return err
	}
	for _, r := range doc.Registry {
		to := rule{prefix: r.Prefix, location: r.Location, blocked: r.Blocked}
		if to.prefix == "" {
			to.prefix = to.location
		}
		if err := checkMirror(to.prefix); err != nil || strings.HasPrefix(to.prefix, "*") {
			return fmt.Errorf("registry %q: %w", to.prefix, errors.Join(errors.New("want HOST[:PORT][/PATH]"), err))
		}
		if to.location == "" {
			to.location = to.prefix
		}
		c.connect(to.location, trust{plain: r.Insecure, lax: r.Insecure})
		for _, m := range r.Mirror {
			if err := checkMirror(m.Location); err != nil {
				return fmt.Errorf("mirror %q of %s: %w", m.Location, to.prefix, err)
			}
			by := mirror{location: m.Location, digests: m.PullFrom != "tag-only", tags: m.PullFrom != "digest-only" && !r.MirrorByDigest}
			to.mirrors = append(to.mirrors, by)
			c.connect(m.Location, trust{plain: m.Insecure, lax: m.Insecure})
		}
		c.rules = append(c.rules, to)
	}
	return nil
}

// readBuildKit reads the registry tables of buildkitd.toml.
func (c *Config) readBuildKit(path string) error {
	var doc struct {
		Registry map[string]struct {
			Mirrors  []string
			HTTP     *bool
			Insecure *bool
			CA       []string
			Keypair  []struct{ Key, Cert string }
		}
	}
	if _, err := toml.DecodeFile(path, &doc); err != nil {
		return err
	}
	for host, r := range doc.Registry {
		to := rule{prefix: host, location: host}
		for _, m := range r.Mirrors {
			if err := checkMirror(m); err != nil {
				return fmt.Errorf("mirror %q of %s: %w", m, host, err)
			}
			to.mirrors = append(to.mirrors, mirror{bareMirror(m), true, true})
		}
		t := trust{plain: r.HTTP != nil && *r.HTTP, lax: r.Insecure != nil && *r.Insecure, ca: r.CA}
		t.plain = t.plain || t.lax
		for _, p := range r.Keypair {
			t.client = append(t.client, [2]string{p.Cert, p.Key})
		}
		c.connect(host, t)
		if len(to.mirrors) > 0 {
			c.rules = append(c.rules, to)
		}
	}
	return nil
}

// readDir reads the form of containerd's certs.d.
func (c *Config) readDir(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	c.certs = append(c.certs, dir)
	for _, d := range list {
		file := filepath.Join(dir, d.Name(), "hosts.toml")
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) || !d.IsDir() {
			continue
		}
		if err := c.readHosts(file, d.Name()); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	return nil
}

// hostTable is a table of hosts.toml.
type hostTable struct {
	Capabilities []string
	CA           any  // a path or several
	Client       any  // a path, several, or pairs of certificate and key
	SkipVerify   bool `toml:"skip_verify"`
	OverridePath bool `toml:"override_path"`
	Header       map[string]any
}

// readHosts reads a hosts.toml for a registry domain; _default is all that have no file of their own.
func (c *Config) readHosts(path, domain string) error {
	var doc struct {
		Server string
		hostTable
		Host map[string]hostTable
	}
	meta, err := toml.DecodeFile(path, &doc)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	to := rule{prefix: domain}
	if doc.Server != "" && domain != anyHost {
		if to.location, err = c.address(doc.Server, doc.hostTable, dir); err != nil {
			return err
		}
		to.location = dockerDomain(to.location)
	}
	seen := map[string]bool{}
	for _, key := range meta.Keys() { // in the order of the file, which is that of asking
		if len(key) < 2 || key[0] != "host" || seen[key[1]] {
			continue
		}
		seen[key[1]] = true
		h := doc.Host[key[1]]
		at, err := c.address(key[1], h, dir)
		if err != nil {
			return err
		}
		m := mirror{location: at, digests: has(h.Capabilities, "pull"), tags: has(h.Capabilities, "resolve")}
		if m.digests || m.tags {
			to.mirrors = append(to.mirrors, m)
		}
	}
	c.rules = append(c.rules, to)
	return nil
}

// anyHost is how containerd calls what holds for all registries without a table of their own.
const anyHost = "_default"

// dockerDomain returns the domain that references have for a host of docker.io, else the host.
func dockerDomain(host string) string {
	if host == "registry-1."+dockerIO || host == "index."+dockerIO {
		return dockerIO
	}
	return host
}

const dockerIO = "docker.io"

// has reports whether a capability is there; none said is all.
func has(capabilities []string, c string) bool {
	if len(capabilities) == 0 {
		return true
	}
	for _, x := range capabilities {
		if x == c {
			return true
		}
	}
	return false
}

// address reads the URL of a host and notes how to connect to it.
func (c *Config) address(raw string, h hostTable, dir string) (string, error) {
	if !strings.Contains(raw, "://") {
		raw = "https://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return "", fmt.Errorf("host %q: want a URL", raw)
	}
	if len(h.Header) > 0 {
		return "", fmt.Errorf("host %q: header is not supported", raw)
	}
	path := strings.Trim(strings.TrimPrefix(strings.Trim(u.Path, "/"), "v2"), "/")
	if h.OverridePath && u.Path != "" && !strings.HasPrefix(strings.Trim(u.Path, "/")+"/", "v2/") {
		return "", fmt.Errorf("host %q: override_path: only paths that begin with /v2 are supported", raw)
	}
	t := trust{plain: u.Scheme == "http", lax: h.SkipVerify}
	if t.ca, err = paths(h.CA, dir); err != nil {
		return "", fmt.Errorf("host %q: ca: %w", raw, err)
	}
	if t.client, err = pairs(h.Client, dir); err != nil {
		return "", fmt.Errorf("host %q: client: %w", raw, err)
	}
	c.connect(u.Host, t)
	if path == "" {
		return u.Host, nil
	}
	return u.Host + "/" + path, checkMirror(u.Host + "/" + path)
}

// paths reads one path or a list of them, relative to dir.
func paths(v any, dir string) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		if !filepath.IsAbs(v) {
			v = filepath.Join(dir, v)
		}
		return []string{v}, nil
	case []any:
		var all []string
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return nil, errors.New("want paths")
			}
			one, err := paths(s, dir)
			if err != nil {
				return nil, err
			}
			all = append(all, one...)
		}
		return all, nil
	}
	return nil, errors.New("want a path or a list of paths")
}

// pairs reads the forms of a client certificate: a file with both, several such, or pairs of files.
func pairs(v any, dir string) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
		if v == nil {
			return nil, nil
		}
	}
	var all [][2]string
	for _, x := range list {
		files, err := paths(x, dir)
		switch {
		case err != nil:
			return nil, err
		case len(files) == 1 || len(files) == 2 && strings.HasSuffix(files[1], string(filepath.Separator)):
			all = append(all, [2]string{files[0], files[0]})
		case len(files) == 2:
			all = append(all, [2]string{files[0], files[1]})
		default:
			return nil, errors.New("want a certificate and its key")
		}
	}
	return all, nil
}

// connect notes how to connect to the host of a location.
func (c *Config) connect(location string, t trust) {
	host, _, _ := strings.Cut(bareMirror(location), "/")
	old := c.hosts[host]
	c.hosts[host] = trust{
		plain: old.plain || t.plain, lax: old.lax || t.lax,
		ca: append(old.ca, t.ca...), client: append(old.client, t.client...),
	}
}

// rule returns what holds for a name: the longest prefix.
func (c *Config) rule(n name) (rule, bool) {
	full := n.domain + "/" + n.path
	var best rule
	found := false
	for _, r := range c.rules {
		if r.prefix == anyHost && !found || strings.HasPrefix(full+"/", r.prefix+"/") && (!found || best.prefix == anyHost || len(r.prefix) > len(best.prefix)) {
			best, found = r, true
		}
	}
	return best, found
}

// replaced puts location in place of the rule's prefix.
func (r rule) replaced(n name, location string) endpoint {
	full := n.domain + "/" + n.path
	if r.prefix == anyHost {
		full = n.path
	} else {
		full = strings.TrimPrefix(strings.TrimPrefix(full, r.prefix), "/")
	}
	host, path, _ := strings.Cut(location, "/")
	return endpoint{host: host, repo: strings.Trim(path+"/"+full, "/"), domain: n.domain}
}

// serves reports whether the mirror is asked for a reference of that kind.
func (m mirror) serves(d digest.Digest) bool {
	return d != "" && m.digests || d == "" && m.tags
}
