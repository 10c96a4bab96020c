package attest

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/util/purl"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/package-url/packageurl-go"

	"filo/dockerfile"
)

func TestParse(t *testing.T) {
	def := Options{File: "provenance.json"}
	changed := func(change func(*Options)) Wanted {
		o := def
		change(&o)
		return Wanted{Provenance: &o}
	}
	for _, tt := range []struct {
		attests          []string
		provenance, sbom string
		want             Wanted
	}{
		{nil, "", "", Wanted{}},
		{nil, "false", "0", Wanted{}},
		{nil, "true", "", Wanted{Provenance: &def}},
		{nil, "mode=max", "false", changed(func(o *Options) { o.Max = true })},
		{nil, "mode=min,version=v0.2,builder-id=https://b/1", "", changed(func(o *Options) { o.Old, o.BuilderID = true, "https://b/1" })},
		{nil, "reproducible=true,inline-only=1,filename=p.json,capture-usage=false", "", changed(func(o *Options) { o.Reproducible, o.Images, o.File = true, true, "p.json" })},
		{[]string{"type=provenance,complete-materials=true"}, "", "", changed(func(o *Options) { o.Complete = true })},
		{[]string{"type=provenance,mode=odd,disabled=true"}, "", "", Wanted{}},
		{[]string{"type=sbom,generator=x,select=a b"}, "", "", Wanted{SBOM: &Scanner{"x", []string{"BUILDKIT_SCAN_SELECT=a b"}}}},
		{nil, "", "true", Wanted{SBOM: &Scanner{}}},
		{nil, "", "generator=r/x:1", Wanted{SBOM: &Scanner{Generator: "r/x:1"}}},
	} {
		got, err := Parse(tt.attests, tt.provenance, tt.sbom)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("Parse(%q, %q, %q) = %v, %v, want %v", tt.attests, tt.provenance, tt.sbom, got, err, tt.want)
		}
	}
	for _, tt := range []struct {
		attest, provenance, sbom, want string
	}{
		{"mode=max", "", "", "type is required"},
		{"type=provenence", "", "", "did you mean provenance"},
		{"type=provenance", "true", "", "twice"},
		{"type=provenance,disabled=maybe", "", "", "true or false"},
		{"", "max", "", "KEY=VALUE"},
		{"", "mode=full", "", "min or max"},
		{"", "version=2", "", "v1 or v0.2"},
		{"", "moda=max", "", "did you mean mode"},
		{"", "filename=../x", "", "file name"},
		{"", "capture-usage=true", "", "not supported"},
		{"", "reproducible=perhaps", "", "true or false"},
		{"", "", "select=x", "generator=IMAGE"},
	} {
		var attests []string
		if tt.attest != "" {
			attests = []string{tt.attest}
		}
		if got, err := Parse(attests, tt.provenance, tt.sbom); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Parse(%v) = %v, %v, want %q", tt, got, err, tt.want)
		}
	}
}

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

// build is what a Dockerfile and a request say, without a builder.
func build(t *testing.T, text string) (Build, Record) {
	t.Helper()
	f, err := dockerfile.Parse(strings.NewReader(text), dockerfile.Args{
		Name: "Dockerfile", BuildPlatform: amd64, TargetPlatform: amd64, Build: map[string]string{"TOKEN": "hush", "INDEX": "https://me:pw@h/simple"},
	})
	if err != nil {
		t.Fatal(err)
	}
	stages, err := f.Plan("")
	if err != nil {
		t.Fatal(err)
	}
	r := Record{Contexts: []string{""}}
	for _, s := range stages {
		steps, err := s.Steps(dockerfile.Config{}, amd64)
		if err != nil {
			t.Fatal(err)
		}
		below := 0
		if s.Base.Stage == nil && s.Base.Name != "scratch" {
			below = 1
			r.Images = append(r.Images, Image{s.Base.Name, "docker.io/library/" + s.Base.Name + ":latest", amd64, digest.FromString(s.Base.Name)})
		}
		r.Stages = append(r.Stages, Stage{Stage: s, Platform: amd64, Steps: steps, Below: below, Result: s == stages[len(stages)-1]})
	}
	r.Sort()
	return Build{
		Options: Options{File: "provenance.json"}, Version: "v9", Platform: "linux/amd64", Here: true, Path: "Dockerfile", Dockerfile: []byte(text),
		Args:     map[string]string{"build-arg:TOKEN": "hush", "build-arg:INDEX": "https://me:pw@h/simple", "label:l": "lll", "target": "end", "context:x": "https://me:pw@h/x.tar"},
		Contexts: map[string]Context{"": {Local: true}},
		VCS:      map[string]string{"source": "https://me:pw@g/r.git", "revision": "abc"},
	}, r
}

const text = `FROM base AS one
ARG TOKEN INDEX
RUN --mount=type=secret,id=k,required=true --mount=type=ssh --mount=type=cache,target=/c,sharing=locked <<EOF
#!/bin/x
cat /run/secrets/k
EOF
FROM base AS end
ENV A=1
COPY --from=one --chown=7:staff --chmod=go-w /hi /h/
COPY <<X /doc
text
X
ADD https://me:pw@h/f.tar#x /d/
COPY --link --from=one /hi /l
WORKDIR /w
RUN --network=none --mount=from=one,target=/m true
`

func provenance(t *testing.T, b Build, r Record, layers ...ocispec.Descriptor) (Statement, types.ProvenancePredicateSLSA1) {
	t.Helper()
	s, err := b.Provenance(r, layers)
	if err != nil {
		t.Fatal(err)
	}
	var p types.ProvenancePredicateSLSA1
	if err := json.Unmarshal(s.Body, &p); err != nil {
		t.Fatal(err)
	}
	return s, p
}

func TestMinTellsLittle(t *testing.T) {
	b, r := build(t, text)
	s, p := provenance(t, b, r)
	for _, secret := range []string{"hush", "lll", "pw@", "/run/secrets", `"k"`} {
		if strings.Contains(string(s.Body), secret) {
			t.Errorf("mode=min tells %q:\n%s", secret, s.Body)
		}
	}
	want := map[string]string{"target": "end", "context:x": "https://xxxxx:xxxxx@h/x.tar"}
	if got := p.BuildDefinition.ExternalParameters.Request.Args; !reflect.DeepEqual(got, want) {
		t.Errorf("args: %v, want %v", got, want)
	}
	m := p.RunDetails.Metadata
	if m.Completeness.Request || m.Completeness.ResolvedDependencies || m.Hermetic || m.StartedOn != nil || m.FinishedOn != nil {
		t.Errorf("metadata: %+v", m)
	}
	if vcs := m.BuildKitMetadata.VCS; vcs["source"] != "https://xxxxx:xxxxx@g/r.git" || vcs["revision"] != "abc" {
		t.Errorf("checkout: %v", vcs)
	}
	if p.RunDetails.Builder.ID != "pkg:generic/filo@v9" {
		t.Errorf("builder: %s", p.RunDetails.Builder.ID)
	}
}

// With mode=max each step names steps before it, and the values of secrets are nowhere, as nobody tells them.
func TestMaxDescribesSteps(t *testing.T) {
	b, r := build(t, text)
	b.Max = true
	r.Fetched = []Fetched{{URL: "https://me:pw@h/f.tar#x", Digest: digest.FromString("f")}}
	layers := []ocispec.Descriptor{{Digest: "sha256:1"}, {Digest: "sha256:2"}, {Digest: "sha256:3"}, {Digest: "sha256:4"}, {Digest: "sha256:5"}, {Digest: "sha256:6"}, {Digest: "sha256:7"}}
	s, p := provenance(t, b, r, layers...)
	if strings.Contains(string(s.Body), "pw@") {
		t.Errorf("tells a password:\n%s", s.Body)
	}
	if !strings.Contains(string(s.Body), "INDEX=https://xxxxx:xxxxx@h/simple") {
		t.Errorf("lacks the environment:\n%s", s.Body)
	}
	req := p.BuildDefinition.ExternalParameters.Request
	if req.Args["build-arg:TOKEN"] != "hush" || len(req.Secrets) != 1 || req.Secrets[0].ID != "k" || req.Secrets[0].Optional || len(req.SSH) != 1 || !req.SSH[0].Optional {
		t.Errorf("request: %+v", req)
	}
	if !p.RunDetails.Metadata.Completeness.Request {
		t.Error("the request is not complete")
	}
	var kinds []string
	seen := map[string]bool{}
	for _, st := range p.BuildDefinition.InternalParameters.BuildConfig.Definition {
		for _, in := range st.Inputs {
			if !seen[strings.TrimSuffix(in, ":0")] {
				t.Errorf("%s has the input %s, which is not before it", st.ID, in)
			}
		}
		seen[st.ID] = true
		kinds = append(kinds, strings.TrimPrefix(fmt.Sprintf("%T", st.Op.Op), "*pb.Op_"))
	}
	want := []string{"Source", "File", "Exec", "File", "File", "Source", "File", "File", "Merge", "File", "Exec"}
	if !slices.Equal(kinds, want) {
		t.Errorf("steps: %v, want %v", kinds, want)
	}
	m := p.RunDetails.Metadata.BuildKitMetadata
	if string(m.Source.Infos[0].Data) != text || m.Source.Infos[0].Filename != "Dockerfile" {
		t.Errorf("source: %+v", m.Source.Infos)
	}
	if n := len(m.Layers["step10:0"]); n != 1 || len(m.Layers["step10:0"][0]) != 7 || len(m.Layers["step0:0"][0]) != 1 || m.Layers["step2:0"] != nil {
		t.Errorf("layers: %v", m.Layers)
	}
	if got := m.Source.Locations["step2"].Locations[0].Ranges[0]; got.Start.Line != 3 || got.End.Line != 6 {
		t.Errorf("place of step2: %v", got)
	}
}

// Without times and an ID the same build says the same, and another build something else.
func TestProvenanceIsReproducible(t *testing.T) {
	for _, old := range []bool{false, true} {
		b, r := build(t, text)
		b.Max, b.Old = true, old
		first, _ := b.Provenance(r, nil)
		again, err := b.Provenance(r, nil)
		if err != nil || string(first.Body) != string(again.Body) {
			t.Errorf("%v\n%s", err, cmp.Diff(string(first.Body), string(again.Body)))
		}
		if !strings.Contains(string(first.Body), `nvocationI`) {
			t.Errorf("no invocation ID: %s", first.Body)
		}
		b.Args["target"] = "other"
		if other, _ := b.Provenance(r, nil); invocation(t, other) == invocation(t, first) {
			t.Error("another build has the same ID")
		}
		now := time.Unix(5, 0)
		b.Invocation, b.Started = "me", &now
		if named, _ := b.Provenance(r, nil); invocation(t, named) != "me" || !strings.Contains(string(named.Body), "1970-01-01T") {
			t.Errorf("named: %s", named.Body)
		}
	}
}

func invocation(t *testing.T, s Statement) string {
	t.Helper()
	var p struct {
		Metadata   struct{ BuildInvocationID string }
		RunDetails struct{ Metadata struct{ InvocationID string } }
	}
	if err := json.Unmarshal(s.Body, &p); err != nil {
		t.Fatal(err)
	}
	return p.Metadata.BuildInvocationID + p.RunDetails.Metadata.InvocationID
}

// What comes from elsewhere has a digest; a build of nothing else without a network is hermetic.
func TestDependencies(t *testing.T) {
	b, r := build(t, "FROM base\nRUN --network=none true\n")
	b.Here, b.Complete = false, true
	b.Contexts = map[string]Context{
		"":       {Fetched: Fetched{URL: "https://me:pw@g/r.git#v1:sub", Commit: strings.Repeat("a", 40)}},
		"used":   {Fetched: Fetched{URL: "https://h/x.tar", Digest: digest.FromString("x")}},
		"unused": {Fetched: Fetched{URL: "https://h/y.tar", Digest: digest.FromString("y")}},
	}
	r.Contexts = append(r.Contexts, "used")
	r.Images = append(r.Images, Image{"l", "oci-layout:///home/me/Lay_out:7@sha256:1", amd64, digest.FromString("l")}, Image{"t", "target:x", amd64, ""})
	_, p := provenance(t, b, r)
	var got []string
	for _, d := range p.BuildDefinition.ResolvedDependencies {
		got = append(got, d.URI)
		if len(d.Digest) != 1 {
			t.Errorf("%s has the digests %v", d.URI, d.Digest)
		}
	}
	want := []string{
		"pkg:docker/base@latest?platform=linux%2Famd64", "pkg:oci/layout@7?platform=linux%2Famd64",
		"https://xxxxx:xxxxx@g/r.git#v1", "https://h/x.tar",
	}
	if !slices.Equal(got, want) {
		t.Errorf("dependencies: %q, want %q", got, want)
	}
	src := p.BuildDefinition.ExternalParameters.ConfigSource
	if src.URI != "https://xxxxx:xxxxx@g/r.git#v1:sub" || src.Digest["sha1"] == "" || src.Path != "Dockerfile" {
		t.Errorf("config source: %+v", src)
	}
	m := p.RunDetails.Metadata
	if !m.Hermetic || !m.Completeness.ResolvedDependencies {
		t.Errorf("metadata: %+v", m)
	}
	b.Network = "none"
	if _, p := provenance(t, b, r.With(r)); !p.RunDetails.Metadata.Hermetic {
		t.Error("read through another image it is not hermetic")
	}
	online, _ := build(t, "FROM base\nRUN true\n")
	online.Here, online.Contexts = false, b.Contexts
	_, or := build(t, "FROM base\nRUN true\n")
	if _, p := provenance(t, online, r.With(or)); p.RunDetails.Metadata.Hermetic {
		t.Error("a step of another Dockerfile used the network")
	}
	b.Contexts[""] = Context{Local: true}
	if _, err := b.Provenance(r, nil); err == nil || !strings.Contains(err.Error(), "complete-materials") {
		t.Errorf("complete-materials with a local context: %v", err)
	}
}

func TestMarshal(t *testing.T) {
	for predicate, kind := range map[string]string{provenance1: statement1, provenance02: statement01, "https://spdx.dev/Document": statement01} {
		data, err := Statement{Predicate: predicate, Body: json.RawMessage(`{"a":1}`)}.Marshal(nil)
		want := `{"_type":"` + kind + `","predicateType":"` + predicate + `","subject":[],"predicate":{"a":1}}`
		if err != nil || string(data) != want {
			t.Errorf("%s, %v, want %s", data, err, want)
		}
	}
}

func TestNames(t *testing.T) {
	d := digest.FromString("m")
	got, err := Names([]string{"docker.io/q/w:1", "h:5/x@" + d.String()}, ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, d)
	if err != nil || len(got) != 2 || got[0].Name != "pkg:docker/q/w@1?platform=linux%2Farm%2Fv7" || got[0].Digest["sha256"] != d.Encoded() {
		t.Errorf("Names = %v, %v", got, err)
	}
	if got, err := Names(nil, amd64, d); err != nil || len(got) != 1 || got[0].Name != "_" {
		t.Errorf("Names of none = %v, %v", got, err)
	}
}

// TestImageURL compares with BuildKit.
func TestImageURL(t *testing.T) {
	const sum = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for _, ref := range []string{"a", "a:1", "a" + sum, "a:1" + sum, "b/a", "c/b/a:x.y", "example.com:5000/a", "example.com/c/b/a:1" + sum, "docker.io/library/a", "A", ""} {
		for _, kind := range []string{packageurl.TypeDocker, packageurl.TypeOCI} {
			for _, p := range []ocispec.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "arm", Variant: "v7"}, {OS: "windows", Architecture: "x86_64"}} {
				want, wantErr := purl.RefToPURL(kind, ref, &p)
				if got, err := imageURL(kind, ref, p); got != want || (err == nil) != (wantErr == nil) {
					t.Errorf("imageURL(%s, %q, %v) = %q, %v, want %q, %v", kind, ref, p, got, err, want, wantErr)
				}
			}
		}
	}
}
