package source

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/moby/patternmatcher"
)

// mapFS is a file system of empty files; names with "/" at their end are directories, "a->b" are links.
func mapFS(list string) fs.FS {
	m := fstest.MapFS{}
	for _, name := range strings.Fields(list) {
		if at, target, ok := strings.Cut(name, "->"); ok {
			m[at] = &fstest.MapFile{Mode: fs.ModeSymlink | 0o777, Data: []byte(target)}
		} else if d, ok := strings.CutSuffix(name, "/"); ok {
			m[d] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
		} else {
			m[name] = &fstest.MapFile{Data: []byte(name)}
		}
	}
	return m
}

func ignored(t testing.TB, fsys fs.FS, file string) fs.FS {
	t.Helper()
	patterns, err := ReadIgnore(strings.NewReader(file))
	must(t, err)
	out, err := Ignore(fsys, patterns)
	must(t, err)
	return out
}

const someFiles = "a.txt b.md top.log .hidden tmp/x keep/me sub/a.txt sub/b.md sub/deep/a.txt sub/deep/c.log void/"

func TestIgnore(t *testing.T) {
	for _, c := range []struct{ file, want string }{
		{"", ".hidden a.txt b.md keep/ keep/me sub/ sub/a.txt sub/b.md sub/deep/ sub/deep/a.txt sub/deep/c.log tmp/ tmp/x top.log void/"},
		{"*", ""},
		{".", ".hidden a.txt b.md keep/ keep/me sub/ sub/a.txt sub/b.md sub/deep/ sub/deep/a.txt sub/deep/c.log tmp/ tmp/x top.log void/"},
		{"# c\n\n  /sub/ \nvoid\ntmp", ".hidden a.txt b.md keep/ keep/me top.log"},
		{"*\n!keep", "keep/ keep/me"},
		{"*\n!sub/deep/c.log", "sub/ sub/deep/ sub/deep/c.log"},
		{"*\n!sub/deep/nothing", ""},
		{"*\n!void", "void/"},
		{"*\n!void/x", ""},
		{"*\n!**/*.md", "b.md sub/ sub/b.md"},
		{"*\n!sub\nsub/deep", "sub/ sub/a.txt sub/b.md"},
		{"*\n!sub\nsub/deep\n!**/c.log", "sub/ sub/a.txt sub/b.md sub/deep/ sub/deep/c.log"},
		{"**/*.log\n**/deep", ".hidden a.txt b.md keep/ keep/me sub/ sub/a.txt sub/b.md tmp/ tmp/x void/"},
		{"sub/*\n!sub/*.md\n.*", "a.txt b.md keep/ keep/me sub/ sub/b.md tmp/ tmp/x top.log void/"},
		{"*\n!*.txt\n!sub/**/c.log", "a.txt sub/ sub/deep/ sub/deep/c.log"},
		{"sub/deep/\n!sub/deep/a.txt\nt*", ".hidden a.txt b.md keep/ keep/me sub/ sub/a.txt sub/b.md sub/deep/ sub/deep/a.txt void/"},
	} {
		if got := names(t, ignored(t, mapFS(someFiles), c.file)); got != c.want {
			t.Errorf("%q:\n got %s\nwant %s", c.file, got, c.want)
		}
	}
}

func TestIgnoreHidesFromAll(t *testing.T) {
	fsys := ignored(t, mapFS("secret/key d/key l->secret toKey->secret/key viaD->d/key dl->d hiddenLink->d d/up->../secret"), "secret\nhiddenLink")
	for _, name := range []string{"secret", "secret/key", "l/key", "toKey", "hiddenLink", "hiddenLink/key", "dl/up/key"} {
		if f, err := fsys.Open(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Open(%q) = %v, %v, want not exist", name, f, err)
		}
	}
	if _, err := fs.Lstat(fsys, "toKey"); err != nil {
		t.Errorf("Lstat(toKey) = %v, want the link itself", err)
	}
	if _, err := fs.ReadLink(fsys, "hiddenLink"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadLink(hiddenLink) = %v, want not exist", err)
	}
	if got := read(t, fsys, "viaD") + read(t, fsys, "dl/key"); got != "d/keyd/key" {
		t.Errorf("visible files read %q", got)
	}
	if _, err := fs.ReadDir(fsys, "secret"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadDir(secret) = %v, want not exist", err)
	}
	for _, name := range []string{"../secret", "/d", ""} {
		if _, err := fsys.Open(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Open(%q) = %v, want invalid", name, err)
		}
	}
}

func TestIgnoreFS(t *testing.T) {
	fsys := ignored(t, mapFS(someFiles+" l->sub/b.md"), "*\n!sub/deep/c.log\n!l\n!sub/b.md")
	must(t, fstest.TestFS(fsys, "sub/deep/c.log", "l", "sub/b.md"))
}

func TestIgnoreNothing(t *testing.T) {
	if fsys, err := Ignore(nil, []string{"*"}); fsys != nil || err != nil {
		t.Errorf("Ignore(nil) = %v, %v", fsys, err)
	}
	_, err := Ignore(mapFS("a"), []string{"!"})
	wantError(t, err, "ignore file")
	_, err = ReadIgnore(strings.NewReader(strings.Repeat("x", 1<<17)))
	wantError(t, err, "read ignore file")
}

// reference lists what a walk of all of fsys keeps: what no pattern excludes, and the directories above it.
func reference(t testing.TB, fsys fs.FS, m *patternmatcher.PatternMatcher) ([]string, error) {
	infos := map[string]patternmatcher.MatchInfo{}
	keep := map[string]bool{}
	err := fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
		if p == "." || err != nil {
			return err
		}
		out, info, err := m.MatchesUsingParentResults(p, infos[path.Dir(p)])
		if e.IsDir() {
			infos[p] = info
		}
		for ; err == nil && !out && p != "."; p = path.Dir(p) {
			keep[p] = true
		}
		return err
	})
	var list []string
	for p := range keep {
		list = append(list, p)
	}
	slices.Sort(list)
	return list, err
}

func FuzzIgnore(f *testing.F) {
	for _, s := range []string{"*\n!a", "a/*\n!a/b", "**/c\n!a/b/**", "!a\na/b", "a/b\n!a", "[a-b]\n!b/[", "a?\n\\*", "**\n!**/d", "a\n!a/b\na/b/c\n!*/b/c/d"} {
		f.Add(s)
	}
	for _, s := range []string{"a/**", "**/d", "a/*/c\n!**/d", "*b*", "?", "a*", "**b", "a/b/**/d", "ab+/c", "a|b", "a{0}b*", "[a]*", "a.b\n!*.b", "*/"} {
		f.Add(s)
	}
	files := mapFS("a/b/c/d a/b/d a/c b/a/b b/c d c/ ab/c a.b/d a/l->../b")
	f.Fuzz(func(t *testing.T, file string) {
		patterns, err := ReadIgnore(strings.NewReader(file))
		if err != nil {
			return
		}
		fsys, err := Ignore(files, patterns)
		if err != nil {
			return
		}
		m, err := patternmatcher.New(patterns)
		must(t, err)
		want, refErr := reference(t, files, m)
		got := map[string]bool{}
		err = fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
			if p != "." {
				got[p] = true
			}
			return err
		})
		if refErr != nil || err != nil {
			return // a pattern that is none: found in another order
		}
		for _, p := range want {
			if !got[p] {
				t.Errorf("%q hides %s", file, p)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%q shows %d files %v, want %v", file, len(got), got, want)
		}
		fs.WalkDir(files, ".", func(p string, e fs.DirEntry, err error) error {
			fresh, _ := Ignore(files, patterns)
			if _, err := fs.Lstat(fresh, p); (err == nil) != (got[p] || p == ".") {
				t.Errorf("%q: Lstat(%s) = %v, listed: %v", file, p, err, got[p])
			}
			return nil
		})
	})
}
