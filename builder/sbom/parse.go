package sbom

import (
	"encoding/json"
	"strings"

	"github.com/package-url/packageurl-go"
)

// release is what /etc/os-release says.
type release struct{ id, version string }

func parseRelease(data []byte) (r release) {
	for line := range strings.Lines(string(data)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		v = strings.Trim(v, `"'`)
		switch k {
		case "ID":
			r.id = v
		case "VERSION_ID":
			r.version = v
		}
	}
	return r
}

// qualifiers say for which machine and system a package is.
func (r release) qualifiers(arch string) packageurl.Qualifiers {
	var q packageurl.Qualifiers
	if arch != "" {
		q = append(q, packageurl.Qualifier{Key: "arch", Value: arch})
	}
	if r.id != "" && r.version != "" {
		q = append(q, packageurl.Qualifier{Key: "distro", Value: r.id + "-" + r.version})
	}
	return q
}

// paragraphs calls do with each block of lines between empty ones, as fields. A field without a name's end, such as a
// line that continues another, is left out.
func paragraphs(data []byte, do func(map[string]string)) {
	fields := map[string]string{}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			if len(fields) > 0 {
				do(fields)
			}
			fields = map[string]string{}
			continue
		}
		if k, v, ok := strings.Cut(line, ":"); ok && k != "" && k[0] != ' ' && k[0] != '\t' {
			fields[k] = strings.TrimSpace(v)
		}
	}
	if len(fields) > 0 {
		do(fields)
	}
}

// debian reads a dpkg status file. A package that was removed and left its configuration is not installed.
func (s *scan) debian(data []byte, at string) {
	paragraphs(data, func(f map[string]string) {
		if status, ok := f["Status"]; ok && !strings.HasSuffix(status, " installed") {
			return
		}
		system := s.system.id
		if system == "" {
			system = "debian"
		}
		q := s.system.qualifiers(f["Architecture"])
		if source, _, _ := strings.Cut(f["Source"], " "); source != "" && source != f["Package"] {
			q = append(q, packageurl.Qualifier{Key: "upstream", Value: source})
		}
		s.add(pkg{url: *packageurl.NewPackageURL(packageurl.TypeDebian, system, f["Package"], f["Version"], q, ""), at: at})
	})
}

// alpine reads apk's database, whose fields have names of one letter.
func (s *scan) alpine(data []byte, at string) {
	paragraphs(data, func(f map[string]string) {
		system := s.system.id
		if system == "" {
			system = "alpine"
		}
		u := packageurl.NewPackageURL(packageurl.TypeApk, system, f["P"], f["V"], s.system.qualifiers(f["A"]), "")
		s.add(pkg{url: *u, at: at, license: f["L"]})
	})
}

// npm reads a package.json.
func (s *scan) npm(data []byte, at string) {
	var p struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		License any    `json:"license"`
	}
	if json.Unmarshal(data, &p) != nil || p.Version == "" {
		return
	}
	scope, name, ok := strings.Cut(p.Name, "/")
	if !ok {
		scope, name = "", p.Name
	}
	license, _ := p.License.(string)
	s.add(pkg{url: *packageurl.NewPackageURL(packageurl.TypeNPM, scope, name, p.Version, nil, ""), at: at, license: license})
}

// python reads the headers of METADATA or PKG-INFO; the text below them is the package's description.
func (s *scan) python(data []byte, at string) {
	first := true
	paragraphs(data, func(f map[string]string) {
		if !first {
			return
		}
		first = false
		name := strings.ReplaceAll(strings.ToLower(f["Name"]), "_", "-")
		s.add(pkg{url: *packageurl.NewPackageURL(packageurl.TypePyPi, "", name, f["Version"], nil, ""), at: at, license: f["License-Expression"]})
	})
}
