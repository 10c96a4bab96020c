// Package attest turns what is known of a build into statements about its result: SLSA provenance in the shape that
// BuildKit gives it, and what scanners say, as in-toto statements.
//
// It is pure: no files, network, clock or kernel; what it is given is all it knows. A statement never holds the value of
// a secret, nor the user and password of a URL; values of build arguments and the Dockerfile's text only with mode=max.
// The same build gives the same bytes if times and an invocation ID are not given.
//
// Start at [Build.Provenance]. option.go reads --provenance and --attest, record.go is what the builder tells of an
// image, provenance.go makes the predicate, steps.go describes the steps for mode=max, scan.go reads what a scanner found.
package attest

import (
	"encoding/json"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/package-url/packageurl-go"

	"filo/layer/registry/reference"
)

// Media types and annotations of attestations, BuildKit's.
const (
	MediaType           = "application/vnd.in-toto+json"                        // of a statement
	ArtifactType        = "application/vnd.docker.attestation.manifest.v1+json" // of the manifest that holds statements
	AnnotationPredicate = "in-toto.io/predicate-type"                           // of a statement's layer
	AnnotationType      = "vnd.docker.reference.type"                           // of a manifest in an index
	AnnotationDigest    = "vnd.docker.reference.digest"                         // the manifest that it speaks about
	TypeManifest        = "attestation-manifest"                                // value of AnnotationType
)

// Types of statements and predicates.
const (
	statement01  = "https://in-toto.io/Statement/v0.1"
	statement1   = "https://in-toto.io/Statement/v1"
	provenance02 = "https://slsa.dev/provenance/v0.2"
	provenance1  = "https://slsa.dev/provenance/v1"
)

// Statement is what is said about a result, but for the subject, which is known when the result is exported.
type Statement struct {
	Predicate string // type of the predicate
	File      string // base name where statements are files
	Images    bool   // inline-only: not where statements are files
	Body      json.RawMessage
	Subjects  []Subject // what it is about, if it is not about the result as a whole
}

// Subject is one thing that a statement is about.
type Subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// NewSubject returns a subject with one digest.
func NewSubject(name string, d digest.Digest) Subject {
	return Subject{name, digests(d)}
}

// Marshal returns the statement about subjects.
func (s Statement) Marshal(subjects []Subject) ([]byte, error) {
	kind := statement01
	if s.Predicate == provenance1 {
		kind = statement1
	}
	if s.Subjects != nil {
		subjects = s.Subjects
	} else if subjects == nil {
		subjects = []Subject{}
	}
	b, err := json.Marshal(struct {
		Type      string          `json:"_type"`
		Predicate string          `json:"predicateType"`
		Subject   []Subject       `json:"subject"`
		Body      json.RawMessage `json:"predicate"`
	}{kind, s.Predicate, subjects, s.Body})
	if err != nil {
		return nil, fmt.Errorf("encode statement %s: %w", s.Predicate, err)
	}
	return b, nil
}

// Names returns the subjects that stand for an image under its names. One without a name is called "_", as in-toto has
// it for what is known by its digest alone.
func Names(names []string, p ocispec.Platform, d digest.Digest) ([]Subject, error) {
	var out []Subject
	for _, n := range names {
		uri, err := imageURL(packageurl.TypeDocker, n, p)
		if err != nil {
			return nil, fmt.Errorf("name statement: %w", err)
		}
		out = append(out, NewSubject(uri, d))
	}
	if len(out) == 0 {
		out = append(out, NewSubject("_", d))
	}
	return out, nil
}

// imageURL is the package URL of an image for a platform, as BuildKit writes it.
func imageURL(kind, ref string, p ocispec.Platform) (string, error) {
	n, err := reference.Parse(ref)
	if err != nil {
		return "", fmt.Errorf("invalid reference %q: %w", ref, err)
	}
	var qualifiers packageurl.Qualifiers
	if n.Digest != "" {
		qualifiers = append(qualifiers, packageurl.Qualifier{Key: "digest", Value: n.Digest.String()})
	}
	qualifiers = append(qualifiers, packageurl.Qualifier{Key: "platform", Value: platforms.Format(platforms.Normalize(p))})
	space, name := path.Split(n.FamiliarPath())
	return packageurl.NewPackageURL(kind, strings.TrimSuffix(space, "/"), name, n.Tagged().Tag, qualifiers, "").ToString(), nil
}

// digests is a digest as statements write it.
func digests(d digest.Digest) map[string]string {
	return map[string]string{d.Algorithm().String(): d.Encoded()}
}
