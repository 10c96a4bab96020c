package builder

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/patternmatcher"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"filo/layer"
	"filo/layer/rootfs"
)

// picked is one source of a copy after wildcards and links: a file, or a directory with all below it.
type picked struct {
	open     func(name string) (io.ReadCloser, error) // opens a regular file by its path in the origin
	name     string                                   // base name under which it was asked for
	root     string                                   // path in the origin
	contents bool                                     // of a directory only the contents are meant, not the directory itself
	unpack   bool                                     // an archive is to be unpacked
	made     bool                                     // it has no time of its own
	files    []file                                   // the root first
}

// file is one file of a picked source; Path is relative to its root, "." for the root.
type file struct {
	layer.Entry
	inode string       // equal for hard links of each other; "" for a file with one name
	stat  *rootfs.Stat // nil where the file is not on a disk of its own
	held  bool         // a directory that was not asked for, only something in it
}

// isDir reports whether the source is a directory.
func (p *picked) isDir() bool { return p.files[0].Type == layer.Dir }

// selection is what a copy wants of one origin.
type selection struct {
	path     string   // rooted path or pattern
	pivot    string   // --parents: the leading directories of path that are not kept; "" without --parents
	literal  bool     // path has no wildcards
	exclude  []string // patterns
	contents bool
	unpack   bool
}

// pick finds what s selects in o. A path that is missing is an error, a pattern without a match is not.
func (o *origin) pick(ctx context.Context, s selection) ([]picked, error) {
	exclude, err := matcher(s.exclude)
	if err != nil {
		return nil, fmt.Errorf("--exclude: %w", err)
	}
	if s.pivot != "" {
		return o.pickParents(ctx, s, exclude)
	}
	matches := []string{clean(s.path)}
	if !s.literal {
		if matches, err = o.glob(matches[0]); err != nil {
			return nil, err
		}
	}
	var out []picked
	for _, m := range matches {
		p := picked{open: o.open, name: path.Base(m), contents: s.contents, unpack: s.unpack}
		if p.root, err = o.resolve(m, true); err != nil {
			return nil, err
		}
		w := walker{ctx: ctx, origin: o, exclude: exclude, top: p.name}
		if p.files, err = w.walk(p.root); err != nil {
			return nil, missing(m, err)
		}
		if len(p.files) > 0 {
			out = append(out, p)
		}
	}
	return out, o.digestAll(ctx, out)
}

// pickParents picks for --parents: everything below a pivot that the pattern names, with the directories above it.
func (o *origin) pickParents(ctx context.Context, s selection, exclude *patternmatcher.PatternMatcher) ([]picked, error) {
	pivot := s.pivot
	pattern := strings.TrimPrefix(strings.TrimPrefix(s.path, pivot), "/")
	if !hasMeta(s.path) {
		full, err := o.resolve(s.path, false) // a link is copied as one, wherever it leads
		if err == nil {
			_, err = lstat(o.fs, full)
		}
		if err != nil {
			return nil, missing(s.path, err)
		}
	}
	include, err := matcher([]string{cmp.Or(pattern, "**")})
	if err != nil {
		return nil, err
	}
	pivots, err := o.glob(clean(pivot))
	if err != nil {
		return nil, err
	}
	var out []picked
	for _, m := range pivots {
		p := picked{open: o.open, name: path.Base(m), contents: true}
		if p.root, err = o.resolve(m, true); err != nil {
			return nil, err
		}
		w := walker{ctx: ctx, origin: o, exclude: exclude, include: include}
		if p.files, err = w.walk(p.root); err != nil {
			return nil, missing(m, err)
		}
		if !hasMeta(s.path) && !p.has(path.Clean(cmp.Or(pattern, "."))) { // excluded, or behind a link
			return nil, missing(s.path, fs.ErrNotExist)
		}
		out = append(out, p)
	}
	return out, o.digestAll(ctx, out)
}

// has reports whether a file of that path is picked.
func (p *picked) has(name string) bool {
	return slices.ContainsFunc(p.files, func(f file) bool { return f.Path == name })
}

// clean makes p a rooted path that does not climb above the root.
func clean(p string) string { return path.Join("/", p) }

// missing words err for a source that is not there as BuildKit does.
func missing(p string, err error) error {
	if errors.Is(err, fs.ErrNotExist) || isNotDir(err) {
		return fmt.Errorf("%q: %w", clean(p), errNotFound)
	}
	return err
}

var errNotFound = errors.New("not found")

// glob expands a rooted pattern. From the first component with a wildcard on, path.Match is applied to the whole rest;
// what matches is not looked into. No match is no error, but the directory before the first wildcard must be there.
func (o *origin) glob(pattern string) ([]string, error) {
	parts := strings.Split(strings.TrimPrefix(pattern, "/"), "/")
	i := slices.IndexFunc(parts, hasMeta)
	if i < 0 {
		return []string{pattern}, nil
	}
	dir, err := o.resolve(path.Join(parts[:i]...), true)
	if err != nil {
		return nil, err
	}
	rest := parts[i:]
	if _, err := path.Match(path.Join(rest...), ""); err != nil {
		return nil, fmt.Errorf("pattern %s: %w", pattern, err)
	}
	if _, err := lstat(o.fs, dir); errors.Is(err, fs.ErrNotExist) || isNotDir(err) {
		return nil, &fs.PathError{Op: "lstat", Path: "/" + dir, Err: syscall.ENOENT}
	}
	var out []string
	if err := o.match(dir, rest, &out); err != nil {
		return nil, err
	}
	return out, nil
}

// match appends what in dir matches parts. A link in the middle is not followed.
func (o *origin) match(dir string, parts []string, out *[]string) error {
	fi, err := lstat(o.fs, dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.IsDir() {
		return nil
	}
	if err != nil {
		return err
	}
	entries, err := fs.ReadDir(o.fs, dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if ok, _ := path.Match(parts[0], e.Name()); !ok {
			continue
		}
		p := path.Join(dir, e.Name())
		if len(parts) == 1 {
			*out = append(*out, p)
		} else if e.IsDir() {
			if err := o.match(p, parts[1:], out); err != nil {
				return err
			}
		}
	}
	return nil
}

// hasMeta reports whether p has a wildcard that no backslash escapes. As in BuildKit a lone backslash is none.
func hasMeta(p string) bool {
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '\\':
			i++
		case '*', '?', '[':
			return true
		}
	}
	return false
}

func matcher(patterns []string) (*patternmatcher.PatternMatcher, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	return patternmatcher.New(patterns)
}

// walker lists a tree of an origin, filtered.
type walker struct {
	ctx     context.Context
	origin  *origin
	exclude *patternmatcher.PatternMatcher
	include *patternmatcher.PatternMatcher
	top     string        // name that exclude sees of a root that is no directory: patterns are relative to a directory
	aside   chan struct{} // holds one for each directory that is listed beside others; nil lists one at a time
}

// match is what the patterns said of a directory, so that they are not asked again for what it holds.
type match struct{ include, exclude patternmatcher.MatchInfo }

// walk lists root and all below it in canonical order; nothing if root itself is excluded.
func (w *walker) walk(root string) ([]file, error) {
	top, err := w.origin.file(root, ".")
	if err != nil {
		return nil, err
	}
	if w.exclude != nil && w.top != "" && top.Type != layer.Dir {
		if out, err := w.exclude.MatchesOrParentMatches(w.top); err != nil || out {
			return nil, err
		}
	}
	if top.Type != layer.Dir {
		return []file{top}, nil
	}
	if w.exclude == nil && w.include == nil { // a matcher is not safe for concurrent use
		w.aside = make(chan struct{}, runtime.GOMAXPROCS(0)-1)
	}
	below, err := w.dir(root, ".", match{})
	return slices.Concat([]file{top}, below), err
}

// dir lists what is in name and wanted, with the directories that lead to it.
func (w *walker) dir(name, rel string, above match) ([]file, error) {
	if err := w.ctx.Err(); err != nil {
		return nil, err
	}
	entries, err := fs.ReadDir(w.origin.fs, name)
	if err != nil {
		return nil, err
	}
	branches := make([]branch, len(entries))
	var beside sync.WaitGroup
	for i, e := range entries {
		b := &branches[i]
		b.name, b.path = under(name, e.Name()), under(rel, e.Name())
		wanted, below, m, err := w.wants(b.path, above)
		if err != nil {
			b.err = err
			break
		}
		if !e.IsDir() || !below {
			if wanted {
				b.err = w.self(b)
			}
			continue
		}
		w.beside(&beside, func() { b.err = w.grow(b, wanted, m) })
	}
	beside.Wait()
	return flat(branches)
}

// branch is a name in a directory and what is below it.
type branch struct {
	name, path string // in the origin; relative to the root of the walk
	self       file   // without a type if it is not listed
	below      []file
	err        error
}

// beside calls list, in a goroutine if there is one to spare.
func (w *walker) beside(g *sync.WaitGroup, list func()) {
	select {
	case w.aside <- struct{}{}:
		g.Go(func() {
			list()
			<-w.aside
		})
	default:
		list()
	}
}

// grow lists the directory b. One that is not wanted itself is listed if it holds something that is.
func (w *walker) grow(b *branch, wanted bool, m match) (err error) {
	if b.below, err = w.dir(b.name, b.path, m); err != nil || !wanted && len(b.below) == 0 {
		return err
	}
	err = w.self(b)
	b.self.held = !wanted
	return err
}

func (w *walker) self(b *branch) (err error) {
	b.self, err = w.origin.file(b.name, b.path)
	return err
}

// flat lists branches in their order.
func flat(branches []branch) ([]file, error) {
	n := 0
	for _, b := range branches {
		if b.err != nil {
			return nil, b.err
		}
		n += 1 + len(b.below)
	}
	files := make([]file, 0, n)
	for _, b := range branches {
		if b.self.Type != 0 {
			files = append(files, b.self)
		}
		files = append(files, b.below...)
	}
	return files, nil
}

// under is path.Join of clean paths.
func under(dir, name string) string {
	switch {
	case dir == ".":
		return name
	case name == ".":
		return dir
	}
	return dir + "/" + name
}

// wants reports whether p is wanted, and whether something below it may be.
func (w *walker) wants(p string, above match) (wanted, below bool, m match, err error) {
	wanted, below = true, true
	if w.include != nil {
		if wanted, m.include, err = w.include.MatchesUsingParentResults(p, above.include); err != nil {
			return false, false, m, err
		}
	}
	if w.exclude != nil {
		var out bool
		if out, m.exclude, err = w.exclude.MatchesUsingParentResults(p, above.exclude); err != nil {
			return false, false, m, err
		}
		if out {
			wanted, below = false, w.exclude.Exclusions()
		}
	}
	return wanted, below, m, nil
}

// digestAll sets the digests that are not known, hashing side by side.
func (o *origin) digestAll(ctx context.Context, all []picked) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, p := range all {
		for i := range p.files {
			f := &p.files[i]
			if f.Type != layer.Regular || f.Digest != "" {
				continue
			}
			if ctx.Err() != nil {
				break
			}
			name := under(p.root, f.Path)
			g.Go(func() (err error) {
				f.Digest, err = o.digest(name, f.stat)
				return err
			})
		}
	}
	return g.Wait()
}

// digest names the content of a picked source, times left out. As in BuildKit owners and modes count even where --chown
// and --chmod replace them.
func (p *picked) digest() digest.Digest {
	h := sha256.New()
	fmt.Fprintf(h, "%q %v %v\n", p.name, p.contents, p.unpack)
	inodes := map[string]int{}
	var b []byte
	for i, f := range p.files {
		b = strconv.AppendQuote(b[:0], f.Path)
		b = append(b, ' ', byte(f.Type))
		if i != 0 || f.Type != layer.Dir {
			b = strconv.AppendUint(append(b, " m"...), uint64(f.Mode), 8)
		}
		b = strconv.AppendInt(append(b, " o"...), int64(f.UID), 10)
		b = strconv.AppendInt(append(b, ':'), int64(f.GID), 10)
		if f.held {
			b = append(b, " held"...)
		}
		b = append(append(b, ' '), f.Digest...)
		b = strconv.AppendQuote(append(b, ' '), f.Link)
		if f.Type == layer.Char || f.Type == layer.Block {
			b = fmt.Appendf(b, " %d:%d", f.Major, f.Minor)
		}
		for _, k := range sortedKeys(f.Xattrs) {
			b = fmt.Appendf(b, " %q=%q", k, f.Xattrs[k])
		}
		if f.inode != "" {
			n, ok := inodes[f.inode]
			if !ok {
				n = len(inodes)
				inodes[f.inode] = n
			}
			b = fmt.Appendf(b, " #%d", n)
		}
		h.Write(append(b, '\n'))
	}
	return digest.NewDigest(digest.SHA256, h)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
