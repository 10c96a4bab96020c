package dockerfile

import (
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

const (
	epochArg    = "SOURCE_DATE_EPOCH"
	hostnameArg = "BUILDKIT_SANDBOX_HOSTNAME"
	cacheNSArg  = "BUILDKIT_CACHE_MOUNT_NS"
	checkArg    = "BUILDKIT_DOCKERFILE_CHECK"

	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// env is the variables in scope. One that is set again moves to the end.
type env struct {
	keys   []string
	values map[string]string
}

func newEnv() *env { return &env{values: map[string]string{}} }

func (e *env) clone() *env {
	c := &env{keys: slices.Clone(e.keys), values: make(map[string]string, len(e.values))}
	for k, v := range e.values {
		c.values[k] = v
	}
	return c
}

func (e *env) set(k, v string) {
	if _, ok := e.values[k]; ok {
		e.keys = slices.DeleteFunc(e.keys, func(key string) bool { return key == k })
	}
	e.keys = append(e.keys, k)
	e.values[k] = v
}

// Get makes env a [shell.EnvGetter].
func (e *env) Get(k string) (string, bool) {
	v, ok := e.values[k]
	return v, ok
}

// Keys makes env a [shell.EnvGetter].
func (e *env) Keys() []string { return e.keys }

func (e *env) list() []string {
	out := make([]string, len(e.keys))
	for i, k := range e.keys {
		out[i] = k + "=" + e.values[k]
	}
	return out
}

// predefinedArgs returns the arguments that every file has in its global scope.
func predefinedArgs(args Args, target string) *env {
	if target == "" {
		target = "default"
	}
	bp, tp := args.BuildPlatform, args.TargetPlatform
	e := newEnv()
	for _, kv := range [][2]string{
		{"BUILDPLATFORM", platforms.Format(bp)},
		{"BUILDOS", bp.OS},
		{"BUILDOSVERSION", bp.OSVersion},
		{"BUILDARCH", bp.Architecture},
		{"BUILDVARIANT", bp.Variant},
		{"TARGETPLATFORM", platforms.FormatAll(tp)},
		{"TARGETOS", tp.OS},
		{"TARGETOSVERSION", tp.OSVersion},
		{"TARGETARCH", tp.Architecture},
		{"TARGETVARIANT", tp.Variant},
		{"TARGETSTAGE", target},
	} {
		v := kv[1]
		if given, ok := args.Build[kv[0]]; ok {
			v = given
		}
		e.set(kv[0], v)
	}
	return e
}

// globalArgs adds the arguments above the first FROM to the predefined ones. given are the build arguments to use.
func (f *File) globalArgs(predefined *env, cmds []instructions.ArgCommand, given map[string]string) (*env, []Argument, error) {
	e := predefined.clone()
	lex := f.lex()
	var out []Argument
	for _, c := range cmds {
		for _, kv := range c.Args {
			value, ok := given[kv.Key]
			var deps []string
			switch {
			case ok:
			case kv.Value == nil:
				out = append(out, argument(kv, c.Location(), nil))
				continue
			default:
				res, err := lex.expand(*kv.Value, e)
				if err != nil {
					return nil, nil, f.at(err, c.Location())
				}
				value, deps = res.Result, sortedKeys(res.Matched)
			}
			e.set(kv.Key, value)
			a := argument(kv, c.Location(), &value)
			a.deps = deps
			out = append(out, a)
		}
	}
	return e, out, nil
}

// proxyEnv returns the proxy settings among the build arguments, each name in both cases.
func proxyEnv(build map[string]string) []string {
	var out []string
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"} {
		var value string
		for _, k := range sortedKeys(build) { // of several spellings the last one wins, whatever the map's order
			if strings.EqualFold(k, name) {
				value = build[k]
			}
		}
		if value != "" {
			out = append(out, name+"="+value, strings.ToLower(name)+"="+value)
		}
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
