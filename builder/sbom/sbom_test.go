package sbom

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

func file(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text), Mode: 0o644} }

// system is a root file system of every kind of package.
func system() fstest.MapFS {
	return fstest.MapFS{
		"etc/os-release": file("NAME=x\nID=debian\nVERSION_ID=\"12\"\n"),
		"var/lib/dpkg/status": file("Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nSource: glibc (2.36)\nVersion: 2.36-9+deb12u8\nDescription: GNU C\n more: text\n\n" +
			"Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\nPackage: late\nStatus: hold ok installed\nVersion: 1:2~3"),
		"var/lib/dpkg/status.d/base":              file("Package: base-files\nVersion: 12.4\n"),
		"var/lib/dpkg/status.d/base.md5sums":      file("Package: no\nVersion: 1\n"),
		"lib/apk/db/installed":                    file("C:Q1\nP:musl\nV:1.2.4-r2\nA:x86_64\nL:MIT\nF:lib\nR:ld\n\nP:zlib\nV:1.3\nA:x86_64\n\n"),
		"app/node_modules/left-pad/package.json":  file(`{"name":"left-pad","version":"1.3.0","license":"WTFPL"}`),
		"app/node_modules/@s/p/package.json":      file(`{"name":"@s/p","version":"2.0.0","license":{"type":"x"}}`),
		"app/node_modules/@s/p/test/package.json": file(`{"name":"fixture","version":"9.9.9"}`),
		"app/node_modules/broken/package.json":    file(`{`),
		"app/package.json":                        file(`{"name":"app","version":"0.0.1"}`),
		"usr/lib/py/Foo_Bar-1.dist-info/METADATA": file("Metadata-Version: 2.1\nName: Foo_Bar\nVersion: 1.0\nLicense-Expression: MIT\n\nName: other\nVersion: 5\n"),
		"usr/lib/py/old-2.egg-info/PKG-INFO":      file("Name: old\nVersion: 2\n"),
		"usr/lib/py/older-3.egg-info":             file("Name: older\nVersion: 3\n"),
		"usr/lib/py/evil-1.dist-info/METADATA":    file("Name: ev\x01il\nVersion: 1\n"),
		"bin/script":                              {Data: []byte("#!/bin/sh\n" + strings.Repeat("#", 5000)), Mode: 0o755},
		"bin/cut":                                 {Data: []byte("\x7fELF" + strings.Repeat("x", 5000)), Mode: 0o755},
	}
}

func urls(t *testing.T, document []byte) []string {
	t.Helper()
	var d spdxDocument
	if err := json.Unmarshal(document, &d); err != nil {
		t.Fatal(err)
	}
	var all []string
	ids := map[string]bool{documentID: true}
	for _, p := range d.Packages {
		if ids[p.ID] {
			t.Errorf("two packages have the ID %s", p.ID)
		}
		ids[p.ID] = true
		for _, r := range p.Refs {
			all = append(all, r.Locator)
		}
	}
	for _, r := range d.Relations {
		if !ids[r.From] || !ids[r.To] {
			t.Errorf("relation of what is not there: %+v", r)
		}
	}
	return all
}

func TestScan(t *testing.T) {
	about := Subject{"q/w:1", "filo-test", time.Unix(1e9, 0)}
	document, unlisted, err := Scan(t.Context(), system(), about)
	if err != nil || unlisted != "" {
		t.Fatal(unlisted, err)
	}
	want := []string{
		"pkg:apk/debian/musl@1.2.4-r2?arch=x86_64&distro=debian-12", "pkg:apk/debian/zlib@1.3?arch=x86_64&distro=debian-12",
		"pkg:deb/debian/base-files@12.4?distro=debian-12", "pkg:deb/debian/late@1:2~3?distro=debian-12",
		"pkg:deb/debian/libc6@2.36-9%2Bdeb12u8?arch=amd64&distro=debian-12&upstream=glibc",
		"pkg:npm/%40s/p@2.0.0", "pkg:npm/left-pad@1.3.0", "pkg:pypi/foo-bar@1.0", "pkg:pypi/old@2", "pkg:pypi/older@3",
	}
	got := urls(t, document)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("found %q\nwant  %q", got, want)
	}
	for _, text := range []string{
		`"spdxVersion":"SPDX-2.3"`, `"created":"2001-09-09T01:46:40Z"`, `"creators":["Tool: filo-test"]`, `"name":"q/w:1"`,
		`"relationshipType":"DESCRIBES"`, `"sourceInfo":"recorded in /var/lib/dpkg/status"`, `"licenseComments":"The package declares: WTFPL"`,
	} {
		if !bytes.Contains(document, []byte(text)) {
			t.Errorf("the document lacks %s:\n%s", text, document)
		}
	}
	again, _, _ := Scan(t.Context(), system(), about)
	if !bytes.Equal(document, again) {
		t.Error("the same files give another document")
	}
	other := system()
	delete(other, "usr/lib/py/older-3.egg-info")
	if second, _, _ := Scan(t.Context(), other, about); namespace(t, second) == namespace(t, document) {
		t.Error("two documents have one namespace")
	}
}

func namespace(t *testing.T, document []byte) string {
	t.Helper()
	var d spdxDocument
	if err := json.Unmarshal(document, &d); err != nil {
		t.Fatal(err)
	}
	return d.Namespace
}

// This test is a Go program itself.
func TestScanProgram(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/program", data, 0o755); err != nil {
		t.Fatal(err)
	}
	onDisk, _, err := Scan(t.Context(), os.DirFS(dir), Subject{})
	if err != nil {
		t.Fatal(err)
	}
	inMemory, _, err := Scan(t.Context(), fstest.MapFS{"program": {Data: data, Mode: 0o755}}, Subject{})
	if err != nil || !bytes.Equal(onDisk, inMemory) {
		t.Errorf("held in memory it says something else: %v", err)
	}
	all := strings.Join(urls(t, onDisk), "\n")
	for _, want := range []string{"pkg:golang/stdlib@1.", "pkg:golang/filo"} {
		if !strings.Contains(all, want) {
			t.Errorf("lacks %s: %s", want, all)
		}
	}
}

func TestScanSaysWhatItCannot(t *testing.T) {
	root := fstest.MapFS{"var/lib/rpm/rpmdb.sqlite": file("SQLite")}
	document, unlisted, err := Scan(t.Context(), root, Subject{})
	if err != nil || unlisted != "RPM packages" || !bytes.Contains(document, []byte(`"comment":"There is an RPM database`)) {
		t.Errorf("%s, %q, %v", document, unlisted, err)
	}
}

// FuzzParse: records of any content give a document that can be read.
func FuzzParse(f *testing.F) {
	for _, m := range system() {
		f.Add(m.Data)
	}
	f.Add([]byte("Package: a\nVersion: \xff\n\n: \n :x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		root := fstest.MapFS{}
		for name := range system() {
			root[name] = &fstest.MapFile{Data: data, Mode: 0o644}
		}
		document, _, err := Scan(t.Context(), root, Subject{})
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range urls(t, document) {
			if !strings.HasPrefix(u, "pkg:") {
				t.Fatalf("%q is no package URL", u)
			}
		}
	})
}
