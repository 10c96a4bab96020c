package attest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/util/urlutil"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/package-url/packageurl-go"

	"filo/dockerfile"
)

// Build is what is known of a build as a whole.
type Build struct {
	Options
	Version    string     // of filo
	Platform   string     // of the machine
	Invocation string     // names this build and no other; "" takes it from what is said, so that the same build says the same
	Started    *time.Time // nil leaves the time out
	Finished   *time.Time
	Network    string            // of RUN that says nothing: "default", "none" or "host"
	Args       map[string]string // the request, with BuildKit's names: "target", "build-arg:NAME", "label:KEY", "context:NAME"
	VCS        map[string]string // of a local context: source, revision
	Contexts   map[string]Context
	Path       string // of the Dockerfile: a name, or where it is in a context that was fetched
	Dockerfile []byte
	Here       bool // the Dockerfile is a local file, not one of the main context
}

// Context is where the files of a build context are from. One that is neither local nor fetched is an image.
type Context struct {
	Local   bool // a directory, or what came by standard input: its content is not described
	Fetched Fetched
}

// Provenance says how an image was made. layers are those of its manifest, nil if it has none.
func (b Build) Provenance(r Record, layers []ocispec.Descriptor) (Statement, error) {
	r = b.withContexts(r)
	p, err := b.predicate(r, layers)
	if err != nil {
		return Statement{}, fmt.Errorf("make provenance: %w", err)
	}
	s := Statement{Predicate: provenance1, File: b.File, Images: b.Images}
	if b.Old {
		s.Predicate = provenance02
	}
	if s.Body, err = b.encode(p); err != nil {
		return Statement{}, fmt.Errorf("make provenance: %w", err)
	}
	if b.Invocation == "" {
		p.RunDetails.Metadata.InvocationID = digest.FromBytes(s.Body).Encoded()[:25]
		s.Body, err = b.encode(p)
	}
	return s, err
}

func (b Build) encode(p *types.ProvenancePredicateSLSA1) ([]byte, error) {
	if b.Old {
		return json.Marshal(p.ConvertToSLSA02())
	}
	return json.Marshal(p)
}

// withContexts adds what contexts were fetched: the main one always, since the Dockerfile or what it says is of it.
func (b Build) withContexts(r Record) Record {
	r = r.With(Record{}) // a copy, to be changed
	for name, c := range b.Contexts {
		if c.Fetched.URL != "" && (name == "" || slices.Contains(r.Contexts, name)) {
			r.Fetched = append(r.Fetched, c.Fetched)
		}
	}
	r.Sort()
	return r
}

func (b Build) predicate(r Record, layers []ocispec.Descriptor) (*types.ProvenancePredicateSLSA1, error) {
	deps, err := dependencies(r)
	if err != nil {
		return nil, err
	}
	p := &types.ProvenancePredicateSLSA1{}
	def := &p.BuildDefinition
	def.BuildType = types.BuildKitBuildType1
	def.ResolvedDependencies = slices.Grow(def.ResolvedDependencies, len(deps))[:len(deps)]
	for i, d := range deps {
		def.ResolvedDependencies[i].URI, def.ResolvedDependencies[i].Digest = d.uri, d.digest
	}
	def.ExternalParameters.ConfigSource = b.configSource()
	def.ExternalParameters.Request = b.request(r)
	def.InternalParameters.BuilderPlatform = b.Platform
	locals := def.ExternalParameters.Request.Locals
	if b.Complete && len(locals) > 0 {
		return nil, fmt.Errorf("complete-materials: nothing is known of the local %s; build from a git repository or a URL", locals[0].Name)
	}
	p.RunDetails.Builder.ID = cmp.Or(b.BuilderID, "pkg:generic/filo@"+url.PathEscape(b.Version))
	p.RunDetails.Builder.Version = map[string]string{"filo": b.Version}
	m := &types.ProvenanceMetadataSLSA1{Reproducible: b.Reproducible}
	m.InvocationID, m.StartedOn, m.FinishedOn = b.Invocation, b.Started, b.Finished
	m.Completeness.Request = b.Max || !slices.ContainsFunc(slices.Collect(maps.Keys(b.Args)), private)
	m.Completeness.ResolvedDependencies = len(locals) == 0
	m.Hermetic = len(locals) == 0 && !b.online(r)
	for k, v := range b.VCS {
		if m.BuildKitMetadata.VCS == nil {
			m.BuildKitMetadata.VCS = map[string]string{}
		}
		m.BuildKitMetadata.VCS[k] = redacted(v)
	}
	p.RunDetails.Metadata = m
	if b.Max {
		b.describe(p, r, layers)
	}
	return p, nil
}

// private reports whether the value of an argument is for mode=max only.
func private(name string) bool {
	return strings.HasPrefix(name, "build-arg:") || strings.HasPrefix(name, "label:")
}

func (b Build) configSource() types.ProvenanceConfigSourceSLSA1 {
	c := types.ProvenanceConfigSourceSLSA1{Path: b.Path}
	main := b.Contexts[""].Fetched
	if main.URL == "" || b.Here {
		return c
	}
	c.URI, c.Digest = redacted(main.URL), main.digests()
	if uri, ok := dfgitutil.FragmentFormat(main.URL, true); ok && main.Commit != "" {
		c.URI = redacted(uri)
	}
	return c
}

// request is what the user asked for.
func (b Build) request(r Record) types.Parameters {
	p := types.Parameters{Frontend: "dockerfile.v0", Args: map[string]string{}}
	for k, v := range b.Args {
		if b.Max || !private(k) {
			p.Args[k] = redacted(v)
		}
	}
	if b.Max {
		p.Secrets, p.SSH = secrets(r)
	}
	names := []string{}
	if b.Here {
		names = append(names, "dockerfile")
	}
	for _, name := range r.Contexts {
		if b.Contexts[name].Local {
			names = append(names, cmp.Or(name, "context"))
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		p.Locals = append(p.Locals, &types.LocalSource{Name: name})
	}
	return p
}

// runs calls do with every RUN of a record.
func (r Record) runs(do func(*dockerfile.Run)) {
	for _, s := range slices.Concat(r.Stages, r.Nested) {
		for _, st := range s.Steps {
			if run, ok := st.Op.(*dockerfile.Run); ok {
				do(run)
			}
		}
	}
}

// online reports whether a step could use the network.
func (b Build) online(r Record) (yes bool) {
	r.runs(func(run *dockerfile.Run) {
		n := run.Network
		if n == "" || n == "default" {
			n = b.Network
		}
		yes = yes || n != "none"
	})
	return yes
}

// secrets lists what steps were given: names, never values. What one step needs is not optional.
func secrets(r Record) (all []*types.Secret, agents []*types.SSH) {
	needed := map[dockerfile.MountType]map[string]bool{dockerfile.MountSecret: {}, dockerfile.MountSSH: {}}
	r.runs(func(run *dockerfile.Run) {
		for _, m := range run.Mounts {
			if ids, ok := needed[m.Type]; ok {
				ids[m.ID] = ids[m.ID] || m.Required
			}
		}
	})
	for _, id := range slices.Sorted(maps.Keys(needed[dockerfile.MountSecret])) {
		all = append(all, &types.Secret{ID: id, Optional: !needed[dockerfile.MountSecret][id]})
	}
	for _, id := range slices.Sorted(maps.Keys(needed[dockerfile.MountSSH])) {
		agents = append(agents, &types.SSH{ID: id, Optional: !needed[dockerfile.MountSSH][id]})
	}
	return all, agents
}

// dependency is an input from elsewhere.
type dependency struct {
	uri    string
	digest map[string]string
}

// dependencies are the inputs from elsewhere, each with its digest.
func dependencies(r Record) ([]dependency, error) {
	var images, git, rest []dependency
	for _, img := range r.Images {
		d, ok, err := img.dependency()
		if err != nil {
			return nil, err
		}
		if ok && !slices.ContainsFunc(images, func(o dependency) bool { return o.uri == d.uri && maps.Equal(o.digest, d.digest) }) {
			images = append(images, d)
		}
	}
	for _, f := range r.Fetched {
		d := dependency{redacted(f.URL), f.digests()}
		if f.Commit == "" {
			rest = append(rest, d)
			continue
		}
		if uri, ok := dfgitutil.FragmentFormat(f.URL, false); ok {
			d.uri = redacted(uri)
		}
		git = append(git, d)
	}
	return slices.Concat(images, git, rest), nil
}

// dependency names an image. Those that the same build made are none.
func (img Image) dependency() (dependency, bool, error) {
	if strings.HasPrefix(img.Ref, "target:") || img.Digest == "" {
		return dependency{}, false, nil
	}
	kind, ref := packageurl.TypeDocker, strings.TrimPrefix(img.Ref, "docker-image://")
	if dir, ok := strings.CutPrefix(img.Ref, "oci-layout://"); ok {
		kind, ref = packageurl.TypeOCI, layoutName(dir)
	}
	uri, err := imageURL(kind, ref, img.Platform)
	if err != nil {
		return dependency{}, false, err
	}
	return dependency{uri, digests(img.Digest)}, true, nil
}

// layoutName is what an image of an OCI layout is called: where the layout lies is nobody's business.
func layoutName(dir string) string {
	dir, _, _ = strings.Cut(dir, "@")
	name, tag, ok := strings.Cut(dir[strings.LastIndexByte(dir, '/')+1:], ":")
	var b strings.Builder
	for _, c := range strings.ToLower(name) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b.WriteRune(c)
		}
	}
	name = cmp.Or(b.String(), "layout")
	if ok && tag != "" {
		name += ":" + tag
	}
	return name
}

// digests is what names the content.
func (f Fetched) digests() map[string]string {
	switch {
	case f.Commit == "":
		return digests(f.Digest)
	case len(f.Commit) == 64:
		return map[string]string{"sha256": f.Commit}
	}
	return map[string]string{"sha1": f.Commit}
}

// redacted hides user and password of a URL; what is none stays as it is.
func redacted(s string) string {
	if u, err := url.Parse(s); err != nil || u.User == nil {
		return s
	}
	return urlutil.RedactCredentials(s)
}
