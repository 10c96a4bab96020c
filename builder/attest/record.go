package attest

import (
	"cmp"
	"slices"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/dockerfile"
)

// Record is what went into one image.
type Record struct {
	Images   []Image
	Fetched  []Fetched
	Contexts []string // names of the contexts that files were taken from; "" is the main one
	Stages   []Stage  // each after those that it needs
	Nested   []Stage  // of other Dockerfiles, whose result this one reads
}

// Image is an image that was read.
type Image struct {
	Name     string // as the Dockerfile has it
	Ref      string // what it was looked for as: a reference, or docker-image://REF, oci-layout://DIR…, target:STAGE
	Platform ocispec.Platform
	Digest   digest.Digest // of its manifest or index; "" if it has none
}

// Fetched is something that was fetched from a URL.
type Fetched struct {
	URL    string
	Commit string        // of a git repository
	Digest digest.Digest // of anything else
}

// Stage is a stage that was built.
type Stage struct {
	Stage    *dockerfile.Stage
	Platform ocispec.Platform
	Steps    []dockerfile.Step
	Below    int  // how many layers lie below its first step
	Result   bool // its layers are in the image
}

// With returns r with what went into another image that it reads.
func (r Record) With(o Record) Record {
	r.Images = slices.Concat(r.Images, o.Images)
	r.Fetched = slices.Concat(r.Fetched, o.Fetched)
	r.Contexts = slices.Concat(r.Contexts, o.Contexts)
	r.Nested = slices.Concat(r.Nested, o.Stages, o.Nested)
	r.Sort()
	return r
}

// Sort puts everything but the stages into an order of its own, each thing once.
func (r *Record) Sort() {
	byImage := func(a, b Image) int {
		return cmp.Or(cmp.Compare(a.Ref, b.Ref), cmp.Compare(platforms.FormatAll(a.Platform), platforms.FormatAll(b.Platform)),
			cmp.Compare(a.Digest, b.Digest), cmp.Compare(a.Name, b.Name))
	}
	byURL := func(a, b Fetched) int {
		return cmp.Or(cmp.Compare(a.URL, b.URL), cmp.Compare(a.Commit, b.Commit), cmp.Compare(a.Digest, b.Digest))
	}
	slices.SortFunc(r.Images, byImage)
	r.Images = slices.CompactFunc(r.Images, func(a, b Image) bool { return byImage(a, b) == 0 })
	slices.SortFunc(r.Fetched, byURL)
	r.Fetched = slices.Compact(r.Fetched)
	slices.Sort(r.Contexts)
	r.Contexts = slices.Compact(r.Contexts)
}
