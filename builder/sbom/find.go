package sbom

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/package-url/packageurl-go"
)

const (
	maxRecords = 256 << 20 // of a package manager's database
	maxPackage = 4 << 20   // of what one package says of itself
	maxProgram = 1 << 30   // of a program that has to be held in memory
	maxDepth   = 256       // of directories
)

// scan is one walk.
type scan struct {
	ctx    context.Context
	root   fs.FS
	system release
	found  map[string]pkg // by package URL
	rpm    bool           // there is an RPM database
}

// all finds the packages of the system, then those of languages.
func (s *scan) all() error {
	for _, name := range []string{"etc/os-release", "usr/lib/os-release"} {
		if data, ok := s.read(name, maxPackage); ok && s.system.id == "" {
			s.system = parseRelease(data)
		}
	}
	if data, ok := s.read("var/lib/dpkg/status", maxRecords); ok {
		s.debian(data, "var/lib/dpkg/status")
	}
	list, err := fs.ReadDir(s.root, "var/lib/dpkg/status.d") // of images without dpkg
	if err == nil {
		for _, d := range list {
			name := path.Join("var/lib/dpkg/status.d", d.Name())
			if data, ok := s.read(name, maxPackage); ok && !strings.HasSuffix(name, ".md5sums") {
				s.debian(data, name)
			}
		}
	}
	for _, name := range []string{"lib/apk/db/installed", "usr/lib/apk/db/installed"} {
		if data, ok := s.read(name, maxRecords); ok {
			s.alpine(data, name)
		}
	}
	for _, name := range []string{"var/lib/rpm", "usr/lib/sysimage/rpm"} {
		if list, err := fs.ReadDir(s.root, name); err == nil && len(list) > 0 {
			s.rpm = true
		}
	}
	return s.walk(".", 0)
}

// walk looks at every file below a directory.
func (s *scan) walk(dir string, depth int) error {
	list, err := fs.ReadDir(s.root, dir)
	if err != nil || depth > maxDepth {
		return err
	}
	for _, d := range list {
		if err := s.ctx.Err(); err != nil {
			return context.Cause(s.ctx)
		}
		name := path.Join(dir, d.Name())
		switch {
		case d.IsDir():
			err = s.walk(name, depth+1)
		case d.Type().IsRegular():
			s.file(name, d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// file looks at a regular file by its name and mode.
func (s *scan) file(name string, d fs.DirEntry) {
	base, parent := path.Base(name), path.Base(path.Dir(name))
	switch {
	case base == "package.json" && inNodeModules(path.Dir(name)):
		if data, ok := s.read(name, maxPackage); ok {
			s.npm(data, name)
		}
		return
	case base == "METADATA" && strings.HasSuffix(parent, ".dist-info"),
		base == "PKG-INFO" && strings.HasSuffix(parent, ".egg-info"),
		strings.HasSuffix(base, ".egg-info"):
		if data, ok := s.read(name, maxPackage); ok {
			s.python(data, name)
		}
		return
	}
	if info, err := d.Info(); err == nil && info.Mode()&0o111 != 0 && info.Size() > 1<<12 {
		s.program(name, info.Size())
	}
}

// inNodeModules reports whether dir is a package below node_modules.
func inNodeModules(dir string) bool {
	parent := path.Dir(dir)
	if strings.HasPrefix(path.Base(parent), "@") {
		parent = path.Dir(parent)
	}
	return path.Base(parent) == "node_modules"
}

// program lists the modules of a Go program.
func (s *scan) program(name string, size int64) {
	f, err := s.root.Open(name)
	if err != nil {
		return
	}
	defer f.Close()
	head := make([]byte, 4)
	if _, err := io.ReadFull(f, head); err != nil || !bytes.Equal(head, []byte("\x7fELF")) {
		return
	}
	at, ok := f.(io.ReaderAt)
	if !ok {
		if size > maxProgram {
			return
		}
		rest, err := io.ReadAll(io.LimitReader(f, maxProgram))
		if err != nil {
			return
		}
		at = bytes.NewReader(append(head, rest...))
	}
	info, err := buildinfo.Read(at)
	if err != nil {
		return
	}
	s.golang("stdlib", strings.TrimPrefix(info.GoVersion, "go"), name)
	if v := info.Main.Version; info.Main.Path != "" {
		if v == "(devel)" {
			v = ""
		}
		s.golang(info.Main.Path, v, name)
	}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		s.golang(m.Path, m.Version, name)
	}
}

func (s *scan) golang(module, version, at string) {
	dir, base := path.Split(module)
	s.add(pkg{url: *packageurl.NewPackageURL(packageurl.TypeGolang, strings.TrimSuffix(dir, "/"), base, version, nil, ""), at: at})
}

// read returns a file that is there and not too large.
func (s *scan) read(name string, most int64) ([]byte, bool) {
	f, err := s.root.Open(name)
	if err != nil {
		return nil, false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, false
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = errors.New("too large")
	}
	return data, err == nil
}
