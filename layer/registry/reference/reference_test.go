package reference

import (
	"strings"
	"testing"

	theirs "github.com/distribution/reference"
)

const sum = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

var seeds = []string{
	"busybox", "busybox:1", "busybox" + sum, "busybox:1" + sum, "library/busybox", "a/b", "a/b/c:x", "docker.io/busybox", "docker.io/a/b",
	"index.docker.io/busybox:1", "index.docker.io/a/b", "localhost/a", "localhost:5000/a:b", "example.com/a/b", "example:1/a", "[::1]:5000/a",
	"[::1]/a", "[]/a", "[::1]x/a", "[::1/a", "[::g]/a", "Example/a", "UPPER", "a/UPPER", "EXAMPLE.com/a", "a_b.c/d", "a_b.c/D", "A_b.c/d", "a-.b/c", "-a.b/c",
	"a..b/c", ".a/b", "a./b", "a:/b", "a:x/b", "a:1/b:2", "a.b:c", "", "/", "a/", "/a", "a//b", "a:", "a@", "a:@", "a:.x", "a:-x", "a:_x", "a:X.y-z_", "a:b:c", "a@b", "a@@",
	"a" + sum + sum, "a@sha256:abc", "a@sha999:" + strings.Repeat("a", 64), "a@sha256:" + strings.Repeat("A", 64), "a@sha512:" + strings.Repeat("0", 128), "a@sha384:" + strings.Repeat("0", 96),
	strings.Repeat("a", 64), strings.Repeat("g", 64), strings.Repeat("a", 64) + "/b", strings.Repeat("a", 247), strings.Repeat("a", 248), "x.y/" + strings.Repeat("a", 256),
	"a:" + strings.Repeat("t", 128), "a:" + strings.Repeat("t", 129), "a__b", "a___b", "a.b", "a..b", "a-b", "a----b", "a._b", "a-", "_a", "a_", "-a", "é", "É/x", "a\xff", "a b", "a\nb", "a\x00", "x.y/a\n",
	"docker.io/library/a/b", "library/a/b", "localhost", "localhost:1", "docker.io", "docker.io/", "scratch", "1.2.3.4/a", "1.2.3.4:5/a",
}

// FuzzParse compares with the module whose grammar this is.
func FuzzParse(f *testing.F) {
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want, wantErr := theirs.ParseNormalizedNamed(s)
		got, err := Parse(s)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("Parse(%q) = %+v, %v; want %v, %v", s, got, err, want, wantErr)
		}
		_, wantFull := theirs.ParseNamed(s)
		if _, err := ParseFull(s); (err == nil) != (wantFull == nil) {
			t.Fatalf("ParseFull(%q) = %v, want %v", s, err, wantFull)
		}
		if err != nil {
			return
		}
		is := Name{Domain: theirs.Domain(want), Path: theirs.Path(want)}
		if n, ok := want.(theirs.Tagged); ok {
			is.Tag = n.Tag()
		}
		if n, ok := want.(theirs.Digested); ok {
			is.Digest = n.Digest()
		}
		if got != is {
			t.Fatalf("Parse(%q) = %+v, want %+v", s, got, is)
		}
		for _, form := range [][2]string{
			{got.String(), want.String()},
			{got.Tagged().String(), theirs.TagNameOnly(want).String()},
			{got.Familiar(), theirs.FamiliarString(want)},
			{got.FamiliarPath(), theirs.FamiliarName(want)},
		} {
			if form[0] != form[1] {
				t.Fatalf("%q: %q, want %q", s, form[0], form[1])
			}
		}
	})
}

// TestErrors are those that people see.
func TestErrors(t *testing.T) {
	for s, want := range map[string]string{
		"UPPER":                 "invalid reference format: repository name (library/UPPER) must be lowercase",
		"a b":                   "invalid reference format",
		"a@sha256:abc":          "invalid reference format: invalid checksum digest length",
		strings.Repeat("a", 64): "invalid repository name (" + strings.Repeat("a", 64) + "), cannot specify 64-byte hexadecimal strings",
	} {
		if _, err := Parse(s); err == nil || err.Error() != want {
			t.Errorf("Parse(%q): %v, want %s", s, err, want)
		}
	}
	if _, err := ParseFull("busybox"); err == nil || !strings.Contains(err.Error(), "docker.io/library/busybox") {
		t.Errorf("ParseFull(busybox): %v", err)
	}
}
