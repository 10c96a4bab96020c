package main

import (
	"context"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder"
	"filo/builder/attest"
	"filo/builder/image"
	"filo/builder/source"
)

// origin is where the inputs of a build are from, for its provenance.
type origin struct {
	file     string // the Dockerfile
	here     bool   // and it is no file of a remote context
	contexts map[string]attest.Context

	vcs      map[string]string // of a local context
	finished time.Time

	mu     sync.Mutex
	nested []attest.Record // of stages that are contexts of this build
}

// opened notes what the context of a name is; "" is the main one.
func (o *origin) opened(name, ref string, src *source.Source) {
	if o.contexts == nil {
		o.contexts = map[string]attest.Context{}
	}
	c := attest.Context{Local: src.Local || ref == "-"}
	if !c.Local {
		c.Fetched = attest.Fetched{URL: ref, Commit: src.Commit}
		if src.Commit == "" {
			c.Fetched.Digest = digest.Digest(src.Identity)
		}
	}
	o.contexts[name] = c
}

// nest adds what went into another image that this build reads.
func (o *origin) nest(r attest.Record) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.nested = append(o.nested, r)
}

// statements returns what is stated about each image; nil if nothing is wanted.
func (j *job) statements(r builder.Result) func(int, []ocispec.Descriptor) ([]attest.Statement, error) {
	if j.wanted.Provenance == nil {
		if j.wanted.SBOM == nil {
			return nil
		}
		return func(n int, _ []ocispec.Descriptor) ([]attest.Statement, error) { return r.Scans[n], nil }
	}
	b := j.provenance(*j.wanted.Provenance, r)
	return func(n int, layers []ocispec.Descriptor) ([]attest.Statement, error) {
		s, err := b.Provenance(j.record(r, n), layers)
		return slices.Concat(r.Scans[n], []attest.Statement{s}), err
	}
}

// checkout notes the git checkout that a local context is in, as buildx does: for the provenance, but for
// BUILDX_GIT_INFO=false, and with BUILDX_GIT_LABELS as labels of the image. Labels that --label gives stay.
func (j *job) checkout(ctx context.Context, dir, dockerfile string) {
	v := j.getenv("BUILDX_GIT_INFO")
	info := j.wanted.Provenance != nil && (v == "" || truthy(v))
	v = j.getenv("BUILDX_GIT_LABELS")
	labels := v == "full" || truthy(v)
	if dir == "" || !info && !labels {
		return
	}
	c := source.FindCheckout(ctx, dir, truthy(j.getenv("BUILDX_GIT_CHECK_DIRTY")))
	if info {
		j.origin.vcs = present(map[string]string{"source": c.Remote, "revision": c.Commit})
	}
	if !labels {
		return
	}
	for k, v := range present(map[string]string{
		ocispec.AnnotationSource: c.Remote, ocispec.AnnotationRevision: c.Commit,
		"com.docker.image.source.entrypoint": inside(c.Top, dockerfile),
	}) {
		if _, ok := j.req.Labels[k]; !ok {
			j.req.Labels[k] = v
		}
	}
}

// present is m without its empty values, nil if that is nothing.
func present(m map[string]string) map[string]string {
	maps.DeleteFunc(m, func(_, v string) bool { return v == "" })
	if len(m) == 0 {
		return nil
	}
	return m
}

// inside is the path of a file relative to the directory top; "" if it is not in it, or one of them is "".
func inside(top, file string) string {
	if top == "" || file == "" {
		return ""
	}
	dir, err := filepath.Abs(filepath.Dir(file))
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return ""
	}
	rel, err := filepath.Rel(top, filepath.Join(dir, filepath.Base(file)))
	if err != nil || !filepath.IsLocal(rel) {
		return ""
	}
	return rel
}

// title is the first name of the result; "" for none.
func (j *job) title() string {
	names, err := j.flags.results.names()
	if err != nil || len(names) == 0 {
		return ""
	}
	return names[0]
}

// record is what went into an image.
func (j *job) record(r builder.Result, n int) attest.Record {
	rec := r.Records[n]
	for _, o := range j.origin.nested {
		rec = rec.With(o)
	}
	return rec
}

// provenance is what is known of the build as a whole. Where times are pinned nothing of it differs from one machine or
// day to the next.
func (j *job) provenance(o attest.Options, r builder.Result) attest.Build {
	b := attest.Build{
		Options: o, Version: version(), Platform: platforms.Format(platforms.Normalize(platforms.DefaultSpec())),
		Network: j.req.Network, Args: j.requested(), Contexts: j.origin.contexts,
		Path: j.req.FileName, Dockerfile: j.req.File, Here: j.origin.here, VCS: j.origin.vcs,
	}
	if !b.Here {
		b.Path = path.Clean(j.origin.file)
	}
	if r.Epoch != nil {
		return b
	}
	if j.origin.finished.IsZero() {
		j.origin.finished = j.now().UTC()
	}
	begin := j.begin.UTC()
	b.Invocation, b.Started, b.Finished = j.id, &begin, &j.origin.finished
	return b
}

// requested is the request as BuildKit names its parts.
func (j *job) requested() map[string]string {
	out := map[string]string{}
	for k, v := range j.req.Args {
		out["build-arg:"+k] = v
	}
	for k, v := range j.req.Labels {
		out["label:"+k] = v
	}
	for _, c := range j.flags.what.contexts {
		name, value, _ := strings.Cut(c, "=")
		if j.origin.contexts[name].Local {
			value = "local:" + name // where it lies on this machine is nobody's business
		}
		for _, kind := range []string{"oci-layout://", "target:"} {
			if at, ok := strings.CutPrefix(value, kind); ok {
				value = kind + path.Base(at)
			}
		}
		out["context:"+name] = value
	}
	f := j.flags.steps
	for k, v := range map[string]string{
		"target": j.req.Target, "no-cache-filter": strings.Join(j.req.NoCacheFilter, ","), "add-hosts": strings.Join(f.hosts, ","),
		"shm-size": f.shmSize, "ulimit": strings.Join(f.ulimits, ","),
	} {
		if v != "" {
			out[k] = v
		}
	}
	if f.network != "" && f.network != "default" {
		out["force-network-mode"] = f.network
	}
	if f.noCache {
		out["no-cache"] = ""
	}
	return out
}

// metadataProvenance puts the provenance into what --metadata-file gets, if there is any. As with buildx it is that of
// mode=min, unless BUILDX_METADATA_PROVENANCE says max or disabled.
func (j *job) metadataProvenance(metadata map[string]any, r builder.Result) error {
	mode, _ := j.env("BUILDX_METADATA_PROVENANCE")
	if j.wanted.Provenance == nil || mode == "disabled" || mode == "false" || j.flags.results.metadata == "" {
		return nil
	}
	o := *j.wanted.Provenance
	o.Max = o.Max && mode == "max"
	b := j.provenance(o, r)
	for n, img := range r.Images {
		s, err := b.Provenance(j.record(r, n), nil)
		if err != nil {
			return err
		}
		key := "buildx.build.provenance"
		if len(r.Images) > 1 {
			key = fmt.Sprintf("%s/%s", key, platforms.Format(platforms.Normalize(image.Platform(img.Config))))
		}
		metadata[key] = s.Body
	}
	return nil
}
