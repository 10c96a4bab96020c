// Package reference reads names of images as Docker does: short ones get what they leave out, and what is no name is
// refused. The grammar and the defaults are those of github.com/distribution/reference, which the tests compare it with;
// that module compiles its grammar whenever a program with it starts, which was an eighth of the start of filo.
//
// It knows no registry: that is the business of package registry.
//
// Start at [Parse].
package reference

import (
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Docker Hub, and what is left out of names of images there.
const (
	hub       = "docker.io"
	hubBefore = "index.docker.io"
	official  = "library/"
)

// longestPath is how long the path of a name may be, in bytes.
const longestPath = 255

// Name is a reference to an image. The zero Name refers to nothing.
type Name struct {
	Domain string // HOST or HOST:PORT; "" if the first part of a name looks like a host and cannot be one, as in a_b.c/d
	Path   string
	Tag    string        // "" for none
	Digest digest.Digest // "" for none
}

// errFormat is the error of what the grammar does not have.
var errFormat = errors.New("invalid reference format")

// Parse reads a reference as people write it: busybox is library/busybox on Docker Hub. No tag is added, see [Name.Tagged].
func Parse(s string) (Name, error) {
	if len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" {
		return Name{}, fmt.Errorf("invalid repository name (%s), cannot specify 64-byte hexadecimal strings", s)
	}
	domain, rest := split(s)
	rest, sum, pinned := strings.Cut(rest, "@")
	p, tag, tagged := strings.Cut(rest, ":")
	if strings.ToLower(p) != p {
		return Name{}, fmt.Errorf("%w: repository name (%s) must be lowercase", errFormat, p)
	}
	n := Name{Domain: domain, Path: p, Tag: tag}
	if !isHost(domain) {
		n.Domain, n.Path = "", domain+"/"+p
	}
	for part := range strings.SplitSeq(n.Path, "/") {
		if !isComponent(part) {
			return Name{}, errFormat
		}
	}
	if tagged && !isTag(tag) {
		return Name{}, errFormat
	}
	if len(n.Path) > longestPath {
		return Name{}, fmt.Errorf("repository name must not be more than %d characters", longestPath)
	}
	if !pinned {
		return n, nil
	}
	var err error
	if n.Digest, err = digest.Parse(sum); err != nil {
		return Name{}, fmt.Errorf("%w: %w", errFormat, err)
	}
	return n, nil
}

// ParseFull reads a reference that leaves nothing out but a tag, as [Name.String] writes it.
func ParseFull(s string) (Name, error) {
	n, err := Parse(s)
	if err == nil && n.String() != s {
		err = fmt.Errorf("%w: %q is %q in full", errFormat, s, n.String())
	}
	return n, err
}

// Tagged returns n with the tag latest if it has neither tag nor digest.
func (n Name) Tagged() Name {
	if n.Tag == "" && n.Digest == "" {
		n.Tag = "latest"
	}
	return n
}

// String is the full form: docker.io/library/busybox.
func (n Name) String() string {
	s := n.Path
	if n.Domain != "" {
		s = n.Domain + "/" + s
	}
	return s + n.suffix()
}

// Familiar is the form that people write: busybox.
func (n Name) Familiar() string { return n.FamiliarPath() + n.suffix() }

// FamiliarPath is Familiar without tag and digest.
func (n Name) FamiliarPath() string {
	if n.Domain != hub {
		return Name{Domain: n.Domain, Path: n.Path}.String()
	}
	if last, ok := strings.CutPrefix(n.Path, official); ok && !strings.Contains(last, "/") {
		return last
	}
	return n.Path
}

func (n Name) suffix() string {
	s := ""
	if n.Tag != "" {
		s = ":" + n.Tag
	}
	if n.Digest != "" {
		s += "@" + n.Digest.String()
	}
	return s
}

// split returns what is before the first slash, if that is meant to be a host, and the rest; and adds what names on Docker
// Hub leave out.
func split(s string) (domain, rest string) {
	domain, rest, ok := strings.Cut(s, "/")
	switch {
	case !ok:
		domain, rest = hub, s
	case domain == hubBefore:
		domain = hub
	case domain != "localhost" && !strings.ContainsAny(domain, ".:") && strings.ToLower(domain) == domain:
		return hub, s
	}
	if domain == hub && !strings.Contains(rest, "/") {
		rest = official + rest
	}
	return domain, rest
}

// isHost reports whether s is a host, a dotted name or an address in brackets, and maybe a port.
func isHost(s string) bool {
	if in, ok := strings.CutPrefix(s, "["); ok {
		address, port, ok := strings.Cut(in, "]")
		return ok && address != "" && all(address, func(c byte) bool { return isHex(c) || c == ':' }) &&
			(port == "" || port[0] == ':' && isNumber(port[1:]))
	}
	host, port, hasPort := strings.Cut(s, ":")
	if hasPort && !isNumber(port) {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' || !all(label, func(c byte) bool { return isLetter(c) || isDigit(c) || c == '-' }) {
			return false
		}
	}
	return true
}

// isComponent reports whether s is one part of a path: small letters and digits, with one of . _ __ - -- --- … between.
func isComponent(s string) bool {
	for {
		rest := strings.TrimLeft(s, "abcdefghijklmnopqrstuvwxyz0123456789")
		switch {
		case len(rest) == len(s):
			return false
		case rest == "":
			return true
		case rest[0] == '-':
			s = strings.TrimLeft(rest, "-")
		case strings.HasPrefix(rest, "__"):
			s = rest[2:]
		case rest[0] == '.' || rest[0] == '_':
			s = rest[1:]
		default:
			return false
		}
	}
}

// isTag reports whether s can be a tag.
func isTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	return all(s, func(c byte) bool { return isLetter(c) || isDigit(c) || c == '_' || c == '.' || c == '-' })
}

func isNumber(s string) bool { return s != "" && all(s, isDigit) }

func all(s string, is func(byte) bool) bool {
	for i := range len(s) {
		if !is(s[i]) {
			return false
		}
	}
	return true
}

func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
func isHex(c byte) bool    { return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'f' }
