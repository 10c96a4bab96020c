package source

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// ReadIgnore reads the patterns of an ignore file for [Ignore].
func ReadIgnore(r io.Reader) ([]string, error) {
	patterns, err := ignorefile.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read ignore file: %w", err)
	}
	return patterns, nil
}

// Ignore returns fsys without the files that patterns exclude. A directory that is excluded itself stays visible if
// it holds something that is not. The result has ReadDir, ReadLink and Lstat and is as safe for concurrent use as fsys
// is. What the patterns say of a file is decided once; a nil fsys stays nil.
func Ignore(fsys fs.FS, patterns []string) (fs.FS, error) {
	if fsys == nil || len(patterns) == 0 {
		return fsys, nil
	}
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("ignore file: %w", err)
	}
	i := &ignoreFS{fs: fsys, matcher: m, dirs: map[string]*verdicts{".": {name: ".", files: map[string]bool{}}}}
	for _, p := range m.Patterns() {
		i.marks = append(i.marks, markOf(p.String()))
		if p.Exclusion() {
			i.except(p.String())
		}
	}
	return i, nil
}

// ignoreFS hides what patterns exclude. Patterns see names without links, as a walk from the root meets them.
type ignoreFS struct {
	fs         fs.FS
	exceptions []string // names, each with "/" at its end, that are included again with all below them
	anywhere   bool     // exceptions have wildcards: nothing can be told from names
	marks      []mark   // one for each pattern

	mu      sync.Mutex // for all below; a matcher is not safe for concurrent use
	matcher *patternmatcher.PatternMatcher
	dirs    map[string]*verdicts // by name
}

// verdicts is what is known about a directory.
type verdicts struct {
	name     string
	info     patternmatcher.MatchInfo // what each pattern said of it, for the files in it
	excluded bool
	searched bool            // it was excluded and looked into
	holds    bool            // and found to hold something that is not
	files    map[string]bool // whether a file in it is excluded, as far as asked
}

// except notes that pattern includes again. A wildcard is no trouble where it only stands for all of a directory.
func (i *ignoreFS) except(pattern string) {
	p := strings.TrimSuffix(strings.TrimSuffix(pattern, "/**"), "/*")
	if strings.ContainsAny(p, `*[]?^\`) {
		i.anywhere = true
	}
	i.exceptions = append(i.exceptions, p+"/")
}

// mark is what a path must begin and end with for a pattern to match it. To look for these takes nothing compared to
// asking the pattern, which mostly is a regular expression, about each file.
type mark struct{ head, tail string }

// markOf returns the mark of a pattern: what is before its first and behind its last wildcard. Where the pattern has
// anything that means more than itself in patterns or regular expressions, any path may match. "a/**" may match "a", and
// "**/a" does.
func markOf(pattern string) mark {
	simple := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-/ *?", r)
	}
	if strings.ContainsFunc(pattern, func(r rune) bool { return !simple(r) }) {
		return mark{}
	}
	first, last := strings.IndexAny(pattern, "*?"), strings.LastIndexAny(pattern, "*?")
	if first < 0 {
		return mark{pattern, pattern}
	}
	return mark{strings.TrimSuffix(pattern[:first], "/"), strings.TrimPrefix(pattern[last+1:], "/")}
}

// mayMatch reports whether a pattern may match the path p itself, not only a directory above it.
func (i *ignoreFS) mayMatch(p string) bool {
	return slices.ContainsFunc(i.marks, func(m mark) bool { return strings.HasPrefix(p, m.head) && strings.HasSuffix(p, m.tail) })
}

// Open opens the regular file or directory name, links followed.
func (i *ignoreFS) Open(name string) (fs.File, error) {
	if err := check("open", name); err != nil {
		return nil, err
	}
	real, err := i.resolve(name, true)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	f, err := i.fs.Open(real)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	if d, ok := f.(fs.ReadDirFile); ok {
		defer d.Close()
		fi, err := d.Stat()
		if err != nil {
			return nil, pathError("open", name, err)
		}
		return &openDir{info: fi, name: name, list: i.ReadDir}, nil
	}
	return f, nil
}

// Lstat returns what name is, links not followed in its last part.
func (i *ignoreFS) Lstat(name string) (fs.FileInfo, error) {
	if err := check("lstat", name); err != nil {
		return nil, err
	}
	_, fi, err := i.find(name)
	if err != nil {
		return nil, pathError("lstat", name, err)
	}
	return fi, nil
}

// ReadLink returns the text of the symbolic link name.
func (i *ignoreFS) ReadLink(name string) (string, error) {
	if err := check("readlink", name); err != nil {
		return "", err
	}
	real, _, err := i.find(name)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	link, err := fs.ReadLink(i.fs, real)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	return link, nil
}

// ReadDir lists what is visible in the directory name in the order of names.
func (i *ignoreFS) ReadDir(name string) ([]fs.DirEntry, error) {
	if err := check("readdir", name); err != nil {
		return nil, err
	}
	real, err := i.resolve(name, true)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	entries, err := fs.ReadDir(i.fs, real)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	seen := entries[:0]
	for _, e := range entries {
		ok, err := i.visible(path.Join(real, e.Name()), e.IsDir())
		if err != nil {
			return nil, pathError("readdir", name, err)
		}
		if ok {
			seen = append(seen, e)
		}
	}
	return seen, nil
}

// List is what the function [List] calls.
func (i *ignoreFS) List(name string, visit Visit) error {
	if err := check("list", name); err != nil {
		return err
	}
	real, err := i.resolve(name, true)
	if err != nil {
		return pathError("list", name, err)
	}
	return List(i.fs, real, func(p string, e fs.DirEntry) error {
		if ok, err := i.shown(p, e.IsDir()); err != nil || !ok {
			return err
		}
		if name != real {
			p = path.Join(name, e.Name())
		}
		return visit(p, e)
	})
}

// shown is visible for those who do not hold the lock.
func (i *ignoreFS) shown(real string, isDir bool) (bool, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.visible(real, isDir)
}

// find returns the visible file name, links not followed in its last part, with its name free of links.
func (i *ignoreFS) find(name string) (string, fs.FileInfo, error) {
	real, err := i.resolve(name, false)
	if err != nil {
		return "", nil, err
	}
	fi, err := i.look(real)
	return real, fi, err
}

// look returns the file at real, if it is visible.
func (i *ignoreFS) look(real string) (fs.FileInfo, error) {
	fi, err := fs.Lstat(i.fs, real)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	ok, err := i.visible(real, fi.IsDir())
	if err == nil && !ok {
		err = fs.ErrNotExist
	}
	return fi, err
}

// resolve returns name without the links on the way, the last one included if last is set. An excluded link leads
// nowhere. If last is not set, whether the file is there and visible is still to be seen.
func (i *ignoreFS) resolve(name string, last bool) (string, error) {
	at, todo := ".", strings.Split(name, "/")
	if dir := path.Dir(name); i.known(dir) {
		at, todo = dir, []string{path.Base(name)}
	}
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, part)
		if len(todo) == 0 && !last {
			return next, nil
		}
		fi, err := i.look(next)
		switch {
		case err != nil:
			return "", err
		case fi.IsDir():
			at = next
			continue
		case fi.Mode().Type() != fs.ModeSymlink:
			if len(todo) > 0 {
				return "", errNotDir
			}
			return next, nil
		}
		if links++; links > maxLinks {
			return "", errLoop
		}
		link, err := fs.ReadLink(i.fs, next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(link) {
			at = "."
		}
		todo = append(strings.Split(link, "/"), todo...)
	}
	return at, nil
}

// known reports whether dir is a visible directory whose name is free of links.
func (i *ignoreFS) known(dir string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	v, ok := i.dirs[dir]
	return ok && (!v.excluded || v.holds)
}

// visible reports whether the file real is. The lock is held.
func (i *ignoreFS) visible(real string, isDir bool) (bool, error) {
	if isDir {
		v, err := i.dir(real)
		if err != nil {
			return false, err
		}
		return i.shows(v)
	}
	v, err := i.dir(path.Dir(real))
	if err != nil {
		return false, err
	}
	if !i.mayMatch(real) {
		return !v.excluded, nil
	}
	base := path.Base(real)
	excluded, ok := v.files[base]
	if !ok {
		if excluded, _, err = i.matcher.MatchesUsingParentResults(real, v.info); err != nil {
			return false, i.matchError(real, err)
		}
		v.files[strings.Clone(base)] = excluded
	}
	return !excluded, nil
}

// dir returns what the patterns say of the directory real. The lock is held.
func (i *ignoreFS) dir(real string) (*verdicts, error) {
	if v, ok := i.dirs[real]; ok {
		return v, nil
	}
	up, err := i.dir(path.Dir(real))
	if err != nil {
		return nil, err
	}
	v := &verdicts{name: real, files: map[string]bool{}}
	if v.excluded, v.info, err = i.matcher.MatchesUsingParentResults(real, up.info); err != nil {
		return nil, i.matchError(real, err)
	}
	i.dirs[real] = v
	return v, nil
}

func (i *ignoreFS) matchError(real string, err error) error {
	return fmt.Errorf("ignore file: match %s: %w", real, err)
}

// shows reports whether the directory v is visible: not excluded, or holding something visible. The lock is held.
func (i *ignoreFS) shows(v *verdicts) (bool, error) {
	if !v.excluded {
		return true, nil
	}
	if v.searched {
		return v.holds, nil
	}
	holds, err := i.search(v)
	if err != nil {
		return false, err
	}
	v.searched, v.holds = true, holds
	return holds, nil
}

// search looks for something visible in the excluded directory v, where exceptions allow for it.
func (i *ignoreFS) search(v *verdicts) (bool, error) {
	if !i.mayHold(v.name) {
		return false, nil
	}
	entries, err := fs.ReadDir(i.fs, v.name)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		return false, nil // nobody asked for an excluded directory
	}
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		ok, err := i.visible(path.Join(v.name, e.Name()), e.IsDir())
		if ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

// mayHold reports whether an exception can apply inside the excluded directory dir. An exception that applies to dir
// itself or above did not save it and, as patterns are asked, saves nothing below it.
func (i *ignoreFS) mayHold(dir string) bool {
	if i.anywhere {
		return true
	}
	for _, e := range i.exceptions {
		if strings.HasPrefix(e, dir+"/") {
			return true
		}
	}
	return false
}
