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

	"filo/builder/source"
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
	top      file                                     // the root
	below    listed                                   // of a directory
}

// file is one file of a picked source; Path is relative to its root, "." for the root.
type file struct {
	layer.Entry
	inode string       // equal for hard links of each other; "" for a file with one name
	stat  *rootfs.Stat // of a regular file on a disk of its own whose digest is not known
	held  bool         // a directory that was not asked for, only something in it
}

// isDir reports whether the source is a directory.
func (p *picked) isDir() bool { return p.top.Type == layer.Dir }

// files are the root and all below it, in canonical order.
func (p *picked) files(yield func(*file) bool) {
	if yield(&p.top) {
		p.below.each(yield)
	}
}

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
		wanted, err := w.walk(&p)
		if err != nil {
			return nil, missing(m, err)
		}
		if wanted {
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
		if _, err := w.walk(&p); err != nil {
			return nil, missing(m, err)
		}
		if pattern != "" && !p.isDir() { // a wildcard met a file, which nothing is below
			continue
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
	for f := range p.files {
		if f.Path == name {
			return true
		}
	}
	return false
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
	root    string        // path in the origin
	spare   sync.Pool     // of *[]file: where directories gather what is in them
}

// match is what the patterns said of a directory, so that they are not asked again for what it holds.
type match struct{ include, exclude patternmatcher.MatchInfo }

// walk lists the root of p and all below it, and reports whether the root is not excluded itself.
func (w *walker) walk(p *picked) (wanted bool, err error) {
	w.root, w.spare.New = p.root, func() any { return new([]file) }
	p.top, err = w.origin.file(p.root, ".", func() (fs.FileInfo, error) { return lstat(w.origin.fs, p.root) })
	if err != nil {
		return false, err
	}
	if w.exclude != nil && w.top != "" && !p.isDir() {
		if out, err := w.exclude.MatchesOrParentMatches(w.top); err != nil || out {
			return false, err
		}
	}
	if !p.isDir() {
		return true, nil
	}
	if w.exclude == nil && w.include == nil { // a matcher is not safe for concurrent use
		w.aside = make(chan struct{}, runtime.GOMAXPROCS(0)-1)
	}
	p.below = w.dir(p.root, match{})
	return true, p.below.err
}

// listed is what is in a directory and wanted, with the directories that lead to it.
type listed struct {
	files []file   // without a type: left out after all
	dirs  []subdir // those of files that were looked into, in order
	err   error
}

// subdir is a directory in one that was listed, and what is below it.
type subdir struct {
	at    int    // index in the files of the directory that it is in
	name  string // in the origin
	match match
	listed
}

// each calls yield for all of l, in canonical order.
func (l *listed) each(yield func(*file) bool) bool {
	dirs := l.dirs
	for i := range l.files {
		if f := &l.files[i]; f.Type != 0 && !yield(f) {
			return false
		}
		if len(dirs) == 0 || dirs[0].at != i {
			continue
		}
		if !dirs[0].each(yield) {
			return false
		}
		dirs = dirs[1:]
	}
	return true
}

// isEmpty reports whether nothing is listed.
func (l *listed) isEmpty() bool {
	return !slices.ContainsFunc(l.files, func(f file) bool { return f.Type != 0 })
}

// dir lists the directory name of the origin.
func (w *walker) dir(name string, above match) (l listed) {
	if l.err = w.ctx.Err(); l.err != nil {
		return l
	}
	found := w.spare.Get().(*[]file)
	defer w.spare.Put(found)
	*found = (*found)[:0]
	l.err = source.List(w.origin.fs, name, func(p string, e fs.DirEntry) error {
		rel := w.relative(p)
		wanted, below, m, err := w.wants(rel, above)
		if err != nil || !wanted && !(below && e.IsDir()) {
			return err
		}
		f, err := w.origin.file(p, rel, e.Info)
		if err != nil {
			return err
		}
		if f.held = !wanted; f.held && f.Type != layer.Dir { // replaced meanwhile
			return nil
		}
		if f.Type == layer.Dir && below {
			l.dirs = append(l.dirs, subdir{at: len(*found), name: p, match: m})
		}
		*found = append(*found, f)
		return nil
	})
	if l.err != nil {
		return l
	}
	l.files = slices.Clone(*found)
	var beside sync.WaitGroup
	for i := range l.dirs {
		d := &l.dirs[i]
		w.beside(&beside, func() { d.listed = w.dir(d.name, d.match) })
	}
	beside.Wait()
	for i := range l.dirs {
		d := &l.dirs[i]
		l.err = cmp.Or(l.err, d.err)
		if f := &l.files[d.at]; f.held && d.isEmpty() { // it leads to nothing that is wanted
			f.Type = 0
		}
	}
	return l
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

// relative returns the path of the origin p relative to the root of the walk.
func (w *walker) relative(p string) string {
	if w.root == "." {
		return p
	}
	return p[len(w.root)+1:]
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
	for i := range all {
		p := &all[i]
		for f := range p.files {
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
	const block = 32 << 10 // hashed at once
	b := fmt.Appendf(make([]byte, 0, block), "%q %v %v\n", p.name, p.contents, p.unpack)
	inodes := map[string]int{}
	for f := range p.files {
		if b = p.appendFile(b, f, inodes); len(b) > block/2 {
			h.Write(b)
			b = b[:0]
		}
	}
	h.Write(b)
	return digest.NewDigest(digest.SHA256, h)
}

// appendFile appends what of f counts. inodes numbers those that were met before.
func (p *picked) appendFile(b []byte, f *file, inodes map[string]int) []byte {
	b = append(appendQuoted(b, f.Path), ' ', byte(f.Type))
	if f != &p.top || f.Type != layer.Dir {
		b = strconv.AppendUint(append(b, " m"...), uint64(f.Mode), 8)
	}
	b = strconv.AppendInt(append(b, " o"...), int64(f.UID), 10)
	b = strconv.AppendInt(append(b, ':'), int64(f.GID), 10)
	if f.held {
		b = append(b, " held"...)
	}
	b = append(append(b, ' '), f.Digest...)
	b = appendQuoted(append(b, ' '), f.Link)
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
	return append(b, '\n')
}

// appendQuoted is strconv.AppendQuote, which takes its time where there is nothing to quote.
func appendQuoted(b []byte, s string) []byte {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return strconv.AppendQuote(b, s)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
