package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/docker/cli/cli/config"
	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder"
	"filo/builder/sandbox"
	"filo/layer/registry"
)

// lookup finds an environment variable.
type lookup func(name string) (string, bool)

// policyVariable names a file of rules for sources. Not to heed it would be to use what somebody has forbidden.
const policyVariable = "EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"

// request turns flags into a request: all of it but the files that it is made of, which are not opened here.
func (f *buildFlags) request(env lookup) (builder.Request, error) {
	var req builder.Request
	if policy, _ := env(policyVariable); policy != "" {
		return req, fmt.Errorf("%s=%s: filo has no source policies; unset it to build without one", policyVariable, policy)
	}
	for _, set := range []func(*builder.Request, lookup) error{f.what.apply, f.steps.apply, f.results.apply} {
		if err := set(&req, env); err != nil {
			return builder.Request{}, err
		}
	}
	limits, err := f.limits.limits()
	req.Limits = limits
	return req, err
}

func (f *whatFlags) apply(req *builder.Request, env lookup) (err error) {
	req.Target = f.target
	args, err := readArgs(f.argFile)
	if err != nil {
		return err
	}
	if req.Args, err = buildArgs(append(args, f.args...), env); err != nil {
		return err
	}
	req.Epoch = epoch(req.Args)
	req.MultiPlatform = truthy(req.Args["BUILDKIT_MULTI_PLATFORM"])
	req.Labels = map[string]string{}
	for _, l := range f.labels {
		k, v, _ := strings.Cut(l, "=")
		if k == "" {
			return fmt.Errorf("--label %q: want KEY=VALUE", l)
		}
		req.Labels[k] = v
	}
	for _, c := range f.contexts {
		name, value, _ := strings.Cut(c, "=")
		if name == "" || value == "" {
			return fmt.Errorf("--build-context %q: want NAME=VALUE, like assets=../assets or base=docker-image://alpine", c)
		}
		name, _, _ = strings.Cut(name, "::") // what follows is a platform
		if _, err := registry.Normalize(name); err != nil {
			return fmt.Errorf("--build-context %s: no stage or image can have this name: %w", name, err)
		}
	}
	req.Platforms, err = parsePlatforms(f.platforms)
	return err
}

// readArgs reads the lines of --build-arg-file; "" is no file.
func readArgs(file string) ([]string, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--build-arg-file: %w", err)
	}
	var args []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimRight(line, "\r\n"); strings.TrimSpace(line) != "" && !strings.HasPrefix(line, "#") {
			args = append(args, line)
		}
	}
	return args, nil
}

// buildArgs reads --build-arg. An argument without a value takes it from the environment and is dropped if there is
// none; as buildx has it, SOURCE_DATE_EPOCH comes from the environment by itself, and proxies from Docker's configuration.
func buildArgs(args []string, env lookup) (map[string]string, error) {
	out := proxies(env)
	if v, ok := env("SOURCE_DATE_EPOCH"); ok && v != "" {
		out["SOURCE_DATE_EPOCH"] = v
	}
	for _, a := range args {
		k, v, ok := strings.Cut(a, "=")
		if k == "" {
			return nil, fmt.Errorf("--build-arg %q: want NAME=VALUE", a)
		}
		if !ok {
			if v, ok = env(k); !ok {
				continue
			}
		}
		out[k] = v
	}
	return out, nil
}

// proxies returns the proxy arguments that Docker's configuration has for every build. A configuration that cannot be read
// has none: what needs its credentials will say so.
func proxies(env lookup) map[string]string {
	out := map[string]string{}
	dir, _ := env("DOCKER_CONFIG")
	if home, ok := env("HOME"); ok && dir == "" {
		dir = filepath.Join(home, ".docker")
	}
	if dir == "" {
		return out
	}
	c, err := config.Load(dir)
	if err != nil {
		return out
	}
	for k, v := range c.ParseProxyConfig("", nil) {
		if v != nil {
			out[k] = *v
		}
	}
	return out
}

// epoch reads the argument that pins times. What is no number of seconds is left to the Dockerfile, which may know it.
func epoch(args map[string]string) *int64 {
	n, err := strconv.ParseInt(args["SOURCE_DATE_EPOCH"], 10, 64)
	if err != nil {
		return nil
	}
	return &n
}

func truthy(v string) bool {
	b, err := strconv.ParseBool(v)
	return err == nil && b
}

// splitCommas returns the values of a flag that may be repeated and may hold several with commas.
func splitCommas(values []string) []string {
	var out []string
	for s := range strings.SplitSeq(strings.Join(values, ","), ",") {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// parsePlatforms reads --platform: each value may hold several, with commas; the same one twice counts once.
func parsePlatforms(values []string) ([]ocispec.Platform, error) {
	var out []ocispec.Platform
	seen := map[string]bool{}
	for _, s := range splitCommas(values) {
		p, err := platforms.DefaultSpec(), error(nil)
		if s != "local" {
			p, err = platforms.Parse(s)
		}
		if err != nil {
			return nil, fmt.Errorf("--platform %q: %w", s, err)
		}
		p = platforms.Normalize(p)
		if key := platforms.FormatAll(p); !seen[key] {
			seen[key] = true
			out = append(out, p)
		}
	}
	return out, nil
}

func (f *stepFlags) apply(req *builder.Request, env lookup) (err error) {
	req.NoCache, req.Pull, req.Verify = f.noCache, f.pull, f.verify
	req.NoCacheFilter = splitCommas(f.filter)
	if req.Longest = f.longest; f.longest < 0 {
		return fmt.Errorf("--step-timeout %s: want a time, like 10m", f.longest)
	}
	if f.jobs < 0 {
		return fmt.Errorf("--jobs %d: want a number of steps", f.jobs)
	}
	if v, _ := env("FILO_KEEP_STORAGE"); f.keep == "" {
		f.keep = v
	}
	if _, err := storage(f.keep); err != nil {
		return err
	}
	req.Allow = slices.Clone(f.allow)
	for _, a := range req.Allow {
		if a != "network.host" && a != "security.insecure" {
			return fmt.Errorf("--allow %q: must be network.host or security.insecure", a)
		}
	}
	if err := f.applyNetwork(req); err != nil {
		return err
	}
	if f.shmSize != "" {
		if req.ShmSize, err = units.RAMInBytes(f.shmSize); err != nil {
			return fmt.Errorf("--shm-size: %w", err)
		}
	}
	for _, u := range f.ulimits {
		l, err := units.ParseUlimit(u)
		if err != nil {
			return fmt.Errorf("--ulimit %q: %w", u, err)
		}
		req.Ulimits = append(req.Ulimits, sandbox.Ulimit{Name: l.Name, Soft: l.Soft, Hard: l.Hard})
	}
	if req.Secrets, err = secrets(f.secrets, env); err != nil {
		return err
	}
	req.SSH, err = agents(f.ssh, env)
	return err
}

func (f *stepFlags) applyNetwork(req *builder.Request) error {
	switch f.network {
	case "default", "none", "":
	case "host": // asking for it on the command line allows it, as with buildx
		req.Allow = append(req.Allow, "network.host")
	default:
		return fmt.Errorf("--network %q: must be default, host or none", f.network)
	}
	req.Network = f.network
	for _, h := range f.hosts {
		line, err := parseHost(h)
		if err != nil {
			return err
		}
		req.Hosts = append(req.Hosts, line)
	}
	for _, ip := range f.dns.Servers {
		if _, err := netip.ParseAddr(ip); err != nil {
			return fmt.Errorf("--dns %q: no IP address", ip)
		}
	}
	for _, word := range slices.Concat(f.dns.Search, f.dns.Options) {
		if word == "" || strings.ContainsAny(word, " \t\r\n") {
			return fmt.Errorf("--dns-search, --dns-option %q: want one word", word)
		}
	}
	req.DNS = f.dns
	return nil
}

// parseHost reads NAME:IP or NAME=IP; an IPv6 address may stand in brackets. Steps share the network of the host, so
// Docker's "host-gateway" is the loopback address.
func parseHost(s string) (string, error) {
	i := strings.IndexAny(s, ":=")
	if i <= 0 {
		return "", fmt.Errorf("--add-host %q: want NAME:IP", s)
	}
	name, ip := s[:i], strings.TrimSuffix(strings.TrimPrefix(s[i+1:], "["), "]")
	if ip == "host-gateway" {
		ip = "127.0.0.1"
	}
	if _, err := netip.ParseAddr(ip); err != nil {
		return "", fmt.Errorf("--add-host %q: %q is no IP address", s, ip)
	}
	if strings.ContainsAny(name, " \t\n#") {
		return "", fmt.Errorf("--add-host %q: %q is no host name", s, name)
	}
	return name + ":" + ip, nil
}

func (f *resultFlags) apply(*builder.Request, lookup) error {
	_, err := f.names()
	return err
}

// names returns the values of -t in full form.
func (f *resultFlags) names() ([]string, error) {
	var out []string
	for _, t := range f.tags {
		full, err := registry.Normalize(t)
		if err != nil {
			return nil, fmt.Errorf("--tag %q: %w", t, err)
		}
		if strings.Contains(full, "@") {
			return nil, fmt.Errorf("--tag %q: a digest cannot be chosen; leave out what follows the @", t)
		}
		if !slices.Contains(out, full) {
			out = append(out, full)
		}
	}
	return out, nil
}
