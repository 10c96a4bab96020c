package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"path/filepath"
	"slices"
)

// What a layer below it costs a RUN does not depend on what is in it: the kernel opens its tree for each mount, and once a
// build its index is read and its tree looked at. So of a base of many layers, small ones that follow each other are
// flattened for a RUN: one layer, made here and shipped nowhere, that in their place shows what they show. flat/ remembers
// it. All but RUN knows the layers of the base and nothing of this.

// A layer fewer saves a build of ten RUN about half a millisecond. To write a file into a flat layer takes a tenth, once, and
// whether a file is in a flat layer or another, it is looked at once a build.
const (
	flatEntries = 32        // that a layer has at most to be flattened
	flatBytes   = 256 << 10 // that are in its files at most
	flatSaves   = 16        // below so many layers fewer nothing is done: most images have no more in all
)

// shortStack is layers, lowest first, and fewer of them that show the same.
type shortStack struct{ of, by []Layer }

// fewer returns layers, or fewer that show the same, as far as Prepare found them.
func (s *Store) fewer(layers []Layer) []Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var best shortStack
	for _, short := range s.short {
		if n := len(short.of); n > len(best.of) && n <= len(layers) && slices.Equal(short.of, layers[:n]) {
			best = short
		}
	}
	return slices.Concat(best.by, layers[len(best.of):])
}

// shorten finds or makes what fewer returns for base, and unpacks it. That there is nothing shorter, or that it can't be
// had, is no error.
func (s *Store) shorten(ctx context.Context, base []Layer) error {
	if len(base) <= flatSaves || s.isSound(ctx, base, s.shorter(base)) {
		return nil
	}
	chain := ChainID(base)
	unlock, err := s.Lock(ctx, "flat "+chain.String())
	if err != nil {
		return err
	}
	defer unlock()
	if s.isSound(ctx, base, s.shorter(base)) {
		return nil
	}
	file := filepath.Join(s.dir, flats, hexOf(chain))
	by := readFlat(file)
	if !s.isSound(ctx, base, by) {
		if by, err = s.flattened(ctx, base); err != nil {
			return err
		}
		if data, err := json.Marshal(by); err == nil && len(by) < len(base) {
			_ = s.putFile(file, sealed(data)) // else the next process does it again
		}
	}
	s.touch(file)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.short = slices.DeleteFunc(s.short, func(old shortStack) bool { return slices.Equal(old.of, base) })
	s.short = append(s.short, shortStack{slices.Clone(base), by})
	return nil
}

// flats is the directory of records that say which layers a base is flattened to. They are sealed JSON.
const flats = "flat"

// readFlat returns the layers that a record names, none if it is missing or damaged.
func readFlat(file string) (by []Layer) {
	if json.Unmarshal(readSealed(file), &by) != nil {
		return nil
	}
	return by
}

// shorter returns what shorten found for base; none if it didn't look.
func (s *Store) shorter(base []Layer) []Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, short := range s.short {
		if slices.Equal(short.of, base) {
			return short.by
		}
	}
	return nil
}

// isSound says whether there are layers, for base, and all are unpacked, now if they were not. Those that are not base's own
// are inspected, so that no build begins again for them: nothing but base is there to make them from.
func (s *Store) isSound(ctx context.Context, base, by []Layer) bool {
	if len(by) == 0 {
		return false
	}
	if _, _, err := s.trees(ctx, by); err != nil {
		return false
	}
	return !slices.ContainsFunc(by, func(l Layer) bool {
		if slices.Contains(base, l) {
			return false
		}
		_, err := s.Tree(ctx, l)
		return err != nil
	})
}

// flattened unpacks base and returns it with small layers flattened, or as it is if that does not pay or can't be done.
func (s *Store) flattened(ctx context.Context, base []Layer) ([]Layer, error) {
	if _, _, err := s.trees(ctx, base); err != nil {
		return nil, err
	}
	indexes := make([]*index, len(base))
	for i, l := range base {
		x, err := s.index(ctx, l)
		if err != nil {
			return nil, err
		}
		indexes[i] = x
	}
	runs := flatRuns(indexes)
	if len(base)-len(runs) < flatSaves {
		return base, nil
	}
	by := make([]Layer, len(runs))
	for i, r := range runs {
		by[i] = base[r.from]
		if r.to-r.from == 1 {
			continue
		}
		var err error
		by[i], err = s.flatten(ctx, base, indexes, r)
		if err != nil && s.loseDamaged(ctx, base[r.from:r.to], indexes[r.from:r.to]) {
			if _, _, err := s.trees(ctx, base); err != nil {
				return nil, err
			}
			by[i], err = s.flatten(ctx, base, indexes, r)
		}
		if err != nil {
			return base, context.Cause(ctx)
		}
	}
	if !s.isSound(ctx, base, by) { // one that was there before may turn out to be damaged
		return base, context.Cause(ctx)
	}
	return by, nil
}

// loseDamaged reads all files of trees and removes those in which one is not what the index says. It says whether there was
// such a tree: to flatten layers is to read files, and finds what no time tells.
func (s *Store) loseDamaged(ctx context.Context, layers []Layer, indexes []*index) bool {
	lost := false
	for i, l := range layers {
		check := treeCheck{dir: s.treePath(l), x: indexes[i], single: s.single, deep: true}
		if check.run(ctx) != nil && ctx.Err() == nil {
			lost = s.loseTree(l) == nil || lost
		}
	}
	return lost
}

// flatRun is layers that become one, or one that stays: those from one on and before another.
type flatRun struct{ from, to int }

// flatRuns divides the layers of indexes, lowest first.
func flatRuns(indexes []*index) (runs []flatRun) {
	open := false // a small layer may join the last run
	for i, x := range indexes {
		small := x.isSmall()
		if small && open {
			runs[len(runs)-1].to = i + 1
		} else {
			runs = append(runs, flatRun{i, i + 1})
		}
		open = small
	}
	return runs
}

// isSmall says whether to flatten a layer is worth it.
func (x *index) isSmall() bool {
	if x.len() > flatEntries {
		return false
	}
	size := int64(0)
	for i := range x.len() {
		e, _ := x.attributes(i)
		size += e.Size
	}
	return size <= flatBytes
}

// flatten makes one layer of some of base, of which indexes are given: on top of those below them it shows what they show.
func (s *Store) flatten(ctx context.Context, base []Layer, indexes []*index, some flatRun) (Layer, error) {
	below, err := s.View(ctx, base[:some.from])
	if err != nil {
		return Layer{}, err
	}
	w, err := s.newWriter(ctx, Sinks{Tree: true}, "")
	if err != nil {
		return Layer{}, err
	}
	defer w.Abort()
	f := &flattening{store: s, layers: base[some.from:some.to], indexes: indexes[some.from:some.to], below: below, names: map[flatFile]string{}}
	if err := errors.Join(w.AddAll(f.files()), f.err); err != nil {
		return Layer{}, fmt.Errorf("flatten layers: %w", err)
	}
	return w.Close()
}

// flattening lists what layers show together, as filo writes layers: each directory is described, deletions are single,
// and only of what is there. A deletion of nothing would show: in a directory that only one layer has the kernel takes
// whiteouts for files.
type flattening struct {
	store   *Store
	layers  []Layer // lowest first
	indexes []*index
	below   *View
	names   map[flatFile]string // where a file has been listed first
	err     error               // that the entries of a layer contradict each other
}

// flatFile is a file of the layer number in, by the one of its names that is no hard link.
type flatFile struct {
	in   int
	path string
}

// flatDir is a directory of the result.
type flatDir struct {
	path    string
	showing []int // layers whose content of it shows, highest first
	under   bool  // the layers below have it as well
	hidden  bool  // of that nothing may show
	yield   func(File) bool
}

func (f *flattening) files() iter.Seq[File] {
	return func(yield func(File) bool) {
		root := flatDir{path: ".", under: true, yield: yield}
		var e Entry
		described := false
		for i, x := range slices.Backward(f.indexes) {
			root.showing = append(root.showing, i)
			if !described {
				e, described = x.find(".")
			}
		}
		if !described || yield(File{Entry: e}) {
			f.inside(root)
		}
	}
}

// inside lists what is in d, and says whether to go on.
func (f *flattening) inside(d flatDir) bool {
	having := map[string][]int{} // layers, highest first, by path; none for what only layers below have
	for _, i := range d.showing {
		for e := range f.indexes[i].children(d.path) {
			having[e.Path] = append(having[e.Path], i)
		}
	}
	if d.hidden {
		for _, e := range f.below.children(d.path) {
			if _, ok := having[e.Path]; !ok {
				having[e.Path] = nil
			}
		}
	}
	for _, p := range slices.SortedFunc(maps.Keys(having), comparePaths) {
		if !f.at(p, having[p], d) {
			return false
		}
	}
	return true
}

// at lists p, which all layers of having have in d, and what is beneath it.
func (f *flattening) at(p string, having []int, d flatDir) bool {
	var under Entry // what is below
	there := false
	if d.under {
		under, _, there = f.below.lookup(p)
	}
	typ := Whiteout
	if len(having) > 0 {
		r := f.indexes[having[0]].at(p)
		if typ = r.typ; typ != Dir && typ != Whiteout {
			return f.file(having[0], r.record, d.yield)
		}
	}
	if typ == Whiteout {
		return !there || d.yield(File{Entry: Entry{Path: p, Type: Whiteout}})
	}
	e := impliedDir(p)
	sub := flatDir{path: p, under: there && under.Type == Dir, hidden: d.hidden, yield: d.yield}
	if sub.under && !d.hidden {
		e = under
	}
	f.merge(&sub, &e, having)
	return d.yield(File{Entry: e}) && f.inside(sub)
}

// merge finds out which layers of having, of which the first has the directory d, show in it, and its attributes: e, if no
// layer describes it.
func (f *flattening) merge(d *flatDir, e *Entry, having []int) {
	described, opaque := false, false
	for _, i := range having {
		r := f.indexes[i].at(d.path)
		if r.typ != Dir { // a file, or it was deleted, before it was made again
			d.hidden = true
			if !described {
				*e = impliedDir(d.path)
			}
			return
		}
		if !opaque {
			d.showing = append(d.showing, i)
		}
		opaque = opaque || r.opaque
		if !r.implied && !described { // also below an opaque one: that hides what is inside, not the directory
			*e, described = f.indexes[i].entry(r.record)
		}
	}
	d.hidden = d.hidden || opaque
}

// file lists the record of the layer number in that is no directory.
func (f *flattening) file(in, record int, yield func(File) bool) bool {
	x := f.indexes[in]
	e, ok := x.entry(record)
	p, id := e.Path, flatFile{in, e.Path}
	if e.Type == Hardlink {
		id.path = e.Link
		e, ok = x.find(e.Link)
	}
	if !ok || !e.linkable() {
		f.err = fmt.Errorf("layer %s: %s: %w", f.layers[in].DiffID, p, errDamagedIndex)
		return false
	}
	e.Path = p
	if first, again := f.names[id]; again {
		e.Type, e.Link = Hardlink, first
	} else {
		f.names[id] = p
	}
	return yield(File{Entry: e, Open: func() (io.ReadCloser, error) {
		return openIn(f.store.treePath(f.layers[in]), &e)
	}})
}
