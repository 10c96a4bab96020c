// Package sbom lists the software in a root file system as an SPDX 2.3 document in JSON: packages of dpkg and apk, the
// modules that Go programs say they were built of, packages of npm and Python.
//
// It reads what package managers and compilers wrote and guesses nothing: neither licences nor what nobody recorded. It
// runs nothing, asks no network and needs no database of its own; files that it cannot read are left out. The same files,
// name and time give the same bytes. All that it reads is a stranger's, so every read is bounded.
//
// Start at [Scan]. find.go knows where packages are recorded, parse.go reads the records.
package sbom

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/package-url/packageurl-go"
)

// Subject is what a document is about and who makes it.
type Subject struct {
	Name    string    // of the image; "" if it has none
	Tool    string    // "filo-v1.2.3"
	Created time.Time // as the document says
}

// Scan lists the software in root, which has to resolve links inside itself. unlisted says of which kind there is some
// that Scan cannot read; "" for none.
func Scan(ctx context.Context, root fs.FS, about Subject) (document []byte, unlisted string, err error) {
	s := &scan{ctx: ctx, root: root, found: map[string]pkg{}}
	if err := s.all(); err != nil {
		return nil, "", fmt.Errorf("list packages: %w", err)
	}
	d := s.document(about)
	if s.rpm {
		unlisted = "RPM packages"
		d.Comment = "There is an RPM database, whose packages are not listed."
	}
	data, err := json.Marshal(d)
	if err != nil {
		return nil, "", fmt.Errorf("list packages: %w", err)
	}
	// The namespace has to be another for another document.
	d.Namespace = "urn:sha256:" + digest.FromBytes(data).Encoded()
	data, err = json.Marshal(d)
	return data, unlisted, err
}

// pkg is a package that was found.
type pkg struct {
	url     packageurl.PackageURL
	at      string // the file that says so
	license string // as that file has it; "" if it has none
}

// The parts of a document, by the names of the specification.
type (
	spdxDocument struct {
		Version   string       `json:"spdxVersion"`
		License   string       `json:"dataLicense"`
		ID        string       `json:"SPDXID"`
		Name      string       `json:"name"`
		Namespace string       `json:"documentNamespace"`
		Comment   string       `json:"comment,omitempty"`
		Creation  spdxCreation `json:"creationInfo"`
		Packages  []spdxPkg    `json:"packages"`
		Relations []spdxRel    `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPkg struct {
		Name      string    `json:"name"`
		ID        string    `json:"SPDXID"`
		Version   string    `json:"versionInfo,omitempty"`
		Location  string    `json:"downloadLocation"`
		Analyzed  bool      `json:"filesAnalyzed"`
		Source    string    `json:"sourceInfo,omitempty"`
		Concluded string    `json:"licenseConcluded"`
		Declared  string    `json:"licenseDeclared"`
		Comments  string    `json:"licenseComments,omitempty"`
		Copyright string    `json:"copyrightText"`
		Purpose   string    `json:"primaryPackagePurpose,omitempty"`
		Refs      []spdxRef `json:"externalRefs,omitempty"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRel struct {
		From string `json:"spdxElementId"`
		Type string `json:"relationshipType"`
		To   string `json:"relatedSpdxElement"`
	}
)

const (
	noAssertion = "NOASSERTION"
	documentID  = "SPDXRef-DOCUMENT"
	imageID     = "SPDXRef-Image"
)

// document orders what was found by package URL.
func (s *scan) document(about Subject) spdxDocument {
	d := spdxDocument{
		Version: "SPDX-2.3", License: "CC0-1.0", ID: documentID, Name: cmp.Or(about.Name, "image"),
		Creation:  spdxCreation{about.Created.UTC().Format(time.RFC3339), []string{"Tool: " + about.Tool}},
		Packages:  []spdxPkg{{Name: cmp.Or(about.Name, "image"), ID: imageID, Location: noAssertion, Concluded: noAssertion, Declared: noAssertion, Copyright: noAssertion, Purpose: "CONTAINER"}},
		Relations: []spdxRel{{documentID, "DESCRIBES", imageID}},
	}
	urls := make([]string, 0, len(s.found))
	for u := range s.found {
		urls = append(urls, u)
	}
	slices.Sort(urls)
	for _, u := range urls {
		p := s.found[u].spdx(u)
		d.Packages = append(d.Packages, p)
		d.Relations = append(d.Relations, spdxRel{imageID, "CONTAINS", p.ID})
	}
	return d
}

func (p pkg) spdx(url string) spdxPkg {
	name := p.url.Name
	if p.url.Namespace != "" && p.url.Type != packageurl.TypeDebian && p.url.Type != packageurl.TypeApk {
		name = p.url.Namespace + "/" + name
	}
	out := spdxPkg{
		Name: name, ID: "SPDXRef-Package-" + p.url.Type + "-" + digest.FromString(url).Encoded()[:16], Version: p.url.Version,
		Location: noAssertion, Source: "recorded in /" + p.at, Concluded: noAssertion, Declared: noAssertion, Copyright: noAssertion,
		Refs: []spdxRef{{"PACKAGE-MANAGER", "purl", url}},
	}
	if p.license != "" {
		out.Comments = "The package declares: " + p.license
	}
	return out
}

// add notes a package; of several places that record it the first in order counts.
func (s *scan) add(p pkg) {
	if p.url.Name == "" || !printable(p.url.Namespace+p.url.Name+p.url.Version+p.license) {
		return
	}
	url := p.url.ToString()
	if old, ok := s.found[url]; !ok || p.at < old.at {
		s.found[url] = p
	}
}

// printable reports whether s can stand in a document.
func printable(s string) bool {
	return len(s) <= 4096 && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' })
}
