package layer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestFlatten flattens layers that stand between others: a view, a mount and a snapshot are as without.
func TestFlatten(t *testing.T) {
	if !mayMount(t) {
		return
	}
	rapid.Check(t, func(r *rapid.T) {
		s := newStore(t)
		defer s.Close()
		var stack []Layer
		for range rapid.IntRange(3, 8).Draw(r, "layers") {
			stack = append(stack, drawLayer(t, s, r, stack))
		}
		from := rapid.IntRange(0, len(stack)-2).Draw(r, "from")
		to := rapid.IntRange(from+2, len(stack)).Draw(r, "to")
		var indexes []*index
		for _, l := range stack {
			indexes = append(indexes, s.cachedIndex(l))
		}
		flat, err := s.flatten(t.Context(), stack, indexes, flatRun{from, to})
		if err != nil {
			r.Fatal(err)
		}
		short := slices.Concat(stack[:from], []Layer{flat}, stack[to:])
		shows := func(what string, got, want []string) {
			if d := diff(got, want); d != "" {
				r.Fatalf("%s of layers %d to %d flattened (%v):\n%s", what, from, to, entries(t, s, flat), d)
			}
		}
		shows("view", all(t, viewOf(t, s, short...)), all(t, viewOf(t, s, stack...)))

		a, b := overlayOf(t, s, nil, short...), overlayOf(t, s, nil, stack...)
		dirA, unmountA := mountOverlay(t, a)
		dirB, unmountB := mountOverlay(t, b)
		shows("mount", filesIn(t, dirA), filesIn(t, dirB))
		if realRoot() { // else the gremlin's chown is refused
			g := gremlin{r: r, boxes: [2]box{{t, dirA}, {t, dirB}}}
			for range rapid.IntRange(0, 12).Draw(r, "operations") {
				g.act()
			}
			g.even()
		}
		unmountA()
		unmountB()
		x, errX := s.Snapshot(t.Context(), a, Sinks{Tree: true})
		y, errY := s.Snapshot(t.Context(), b, Sinks{Tree: true})
		if err := errors.Join(errX, errY, a.Close(), b.Close()); err != nil {
			r.Fatal(err)
		}
		if x != y {
			shows("snapshot", entries(t, s, x), entries(t, s, y))
		}
	})
}

// drawLayer makes up a layer on top of others as others write them: with implied and opaque directories, in any order.
func drawLayer(t testing.TB, s *Store, r *rapid.T, below []Layer) Layer {
	files := drawFiles(r)
	l := unpackLayer(t, s, files...)
	if !deletesNothing(s.cachedIndex(l), viewOf(t, s, below...)) {
		return l
	}
	return unpackLayer(t, s, slices.DeleteFunc(files, func(f file) bool { return f.Type == Whiteout })...)
}

// deletesNothing says whether a whiteout of x is of nothing. The kernel shows it then, and a view does not.
func deletesNothing(x *index, below *View) bool {
	for e := range x.all() {
		if e.Type != Whiteout {
			continue
		}
		if _, there := below.Entry(e.Path); !there {
			return true
		}
		for dir := path.Dir(e.Path); dir != "."; dir = path.Dir(dir) {
			if x.opaque(dir) {
				return true
			}
		}
	}
	return false
}

func drawFiles(r *rapid.T) (files []file) {
	live := map[string]Type{} // what is at a path so far, but for directories
	name := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "a.b"}), 1, 3)
	for range rapid.IntRange(0, 8).Draw(r, "files") {
		p := strings.Join(name.Draw(r, "path"), "/")
		kind := rapid.SampledFrom([]Type{Regular, Regular, Dir, Dir, Symlink, Hardlink, Hardlink, Fifo, Char, Whiteout, Whiteout, Opaque}).Draw(r, "type")
		if through(live, p, Symlink) {
			continue // it would be followed
		}
		f := drawFile(r, p, kind)
		if kind == Hardlink {
			olds := slices.DeleteFunc(slices.Sorted(maps.Keys(live)), func(old string) bool { return old == p || beneath(old, p) || beneath(p, old) })
			if len(olds) == 0 {
				continue
			}
			f.Link = rapid.SampledFrom(olds).Draw(r, "old name")
			kind = live[f.Link]
		}
		files = append(files, f)
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			delete(live, dir)
		}
		if kind == Whiteout { // of what is below: in the layer nothing goes
			continue
		}
		delete(live, p)
		if kind == Dir || kind == Opaque {
			continue
		}
		maps.DeleteFunc(live, func(q string, _ Type) bool { return beneath(q, p) })
		live[p] = kind
	}
	return files
}

// through says whether p or a directory on the way to it is of a kind.
func through(live map[string]Type, p string, kind Type) bool {
	for ; p != "."; p = path.Dir(p) {
		if live[p] == kind {
			return true
		}
	}
	return false
}

func drawFile(r *rapid.T, p string, kind Type) file {
	if kind == Whiteout || kind == Opaque {
		return file{Entry: Entry{Path: p, Type: kind}}
	}
	f := file{Entry: Entry{
		Path: p, Type: kind, ModTime: past + rapid.Int64Range(0, 3).Draw(r, "time"),
		Mode: rapid.SampledFrom([]uint32{0o644, 0o755, 0o4711, 0o1777}).Draw(r, "mode"),
	}}
	if realRoot() {
		f.UID, f.GID = rapid.IntRange(0, 1).Draw(r, "owner")*1000, rapid.IntRange(0, 1).Draw(r, "group")
	}
	if (kind == Regular || kind == Dir) && rapid.Bool().Draw(r, "attributes") {
		f.Xattrs = map[string]string{"user.a": rapid.SampledFrom([]string{"x", "y"}).Draw(r, "value")}
		if kind == Regular && realRoot() {
			f.Xattrs["security.capability"] = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
		}
	}
	switch kind {
	case Regular:
		f.content = rapid.SampledFrom([]string{"", "one", "two", strings.Repeat("\x00", holeSize) + "after a hole"}).Draw(r, "content")
		f.Size = int64(len(f.content))
	case Symlink:
		f.Link, f.Mode = rapid.SampledFrom([]string{"a", "/b/c"}).Draw(r, "target"), 0o777
	case Char:
		f.Major, f.Minor = 1, 3
	}
	return f
}

// all is scanView with times of directories and what is a name of the same file.
func all(t testing.TB, v *View) []string {
	lines := scanView(t, v)
	first := map[string]string{}
	err := fs.WalkDir(v, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		e, _ := v.Entry(p)
		if e.Type == Dir {
			lines = append(lines, fmt.Sprintf("%s: %d", p, e.ModTime))
		} else if id := v.Inode(p); first[id] == "" {
			first[id] = p
		} else {
			lines = append(lines, fmt.Sprintf("%s = %s", p, first[id]))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// filesIn is scan with times of directories and what is a name of the same file.
func filesIn(t testing.TB, top string) []string {
	lines := scan(t, top)
	first := map[uint64]string{}
	err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err := errors.Join(err, unix.Lstat(p, &st)); err != nil {
			return err
		}
		if d.IsDir() {
			lines = append(lines, fmt.Sprintf("%s: %d", p[len(top):], st.Mtim.Sec))
		} else if first[st.Ino] == "" {
			first[st.Ino] = p
		} else {
			lines = append(lines, fmt.Sprintf("%s = %s", p[len(top):], first[st.Ino][len(top):]))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// manyLayers are a layer with a directory and twenty more that each change one file in it.
func manyLayers(t testing.TB, s *Store) []Layer {
	layers := []Layer{putLayer(t, s, dir("d", 0o711), reg("d/f", "first"))}
	for i := range 20 {
		layers = append(layers, unpackLayer(t, s, reg("d/f", fmt.Sprint(i)), reg(fmt.Sprintf("d/f%d", i), "x")))
	}
	return layers
}

// prepared prepares base, and sees that what it shows is right, and that it is few layers.
func prepared(t testing.TB, s *Store, base []Layer) {
	t.Helper()
	view, trees, err := s.Prepare(t.Context(), base, len(base))
	if err := errors.Join(err, trees.Wait(t.Context())); err != nil {
		t.Fatal(err)
	}
	if n := len(s.fewer(base)); n != 1 {
		t.Errorf("prepared: %d layers for %d, want 1", n, len(base))
	}
	shown, want := all(t, view), all(t, viewOf(t, s, base...))
	if d := diff(shown, want); d != "" {
		t.Errorf("view of few layers:\n%s", d)
	}
	o := overlayOf(t, s, nil, base...)
	if got, err := os.ReadFile(filepath.Join(o.Lower[0], "d", "f")); string(got) != "19" {
		t.Errorf("d/f in the tree: %q %v", got, err)
	}
}

func recordOf(s *Store, base []Layer) string {
	return filepath.Join(s.dir, flats, hexOf(ChainID(base)))
}

// A base is flattened once for all processes, which then look at none of its trees.
func TestPrepareFlattens(t *testing.T) {
	s := newStore(t)
	base := manyLayers(t, s)
	prepared(t, s, base)
	more := append(slices.Clone(base), putLayer(t, s, reg("more", "")))
	if _, _, err := s.Prepare(t.Context(), more, len(base)); err != nil || len(s.fewer(more)) != 2 {
		t.Errorf("with a layer on top: %v, %d layers, want 2", err, len(s.fewer(more)))
	}
	flat := s.fewer(base)[0]
	before, err := os.Stat(recordOf(s, base))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()

	s = reopen(t, s.Dir())
	for _, l := range base {
		if err := os.RemoveAll(s.treePath(l)); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := s.Prepare(t.Context(), base, len(base)); err != nil || !slices.Equal(s.fewer(base), []Layer{flat}) {
		t.Errorf("another process: %v, %v, want %v", err, s.fewer(base), flat)
	}
	if _, err := os.Lstat(s.treePath(base[3])); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tree of the base was unpacked: %v", err)
	}
	if after, err := os.Stat(recordOf(s, base)); err != nil || !os.SameFile(before, after) {
		t.Errorf("the record was written again: %v", err)
	}
}

func TestPrepareLeavesBase(t *testing.T) {
	s := newStore(t)
	base := manyLayers(t, s)
	for name, c := range map[string]struct {
		layers []Layer
		base   int
	}{"few layers": {base[:flatSaves], flatSaves}, "layers that steps made": {base, 0}, "few of an image": {base, flatSaves}} {
		if _, _, err := s.Prepare(t.Context(), c.layers, c.base); err != nil || !slices.Equal(s.fewer(c.layers), c.layers) {
			t.Errorf("%s: %v, %d layers, want %d", name, err, len(s.fewer(c.layers)), len(c.layers))
		}
	}
	if _, err := os.Lstat(filepath.Join(s.dir, flats)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a record: %v", err)
	}
}

func TestFlatRuns(t *testing.T) {
	var full []Entry
	for i := range flatEntries + 1 {
		full = append(full, Entry{Path: fmt.Sprintf("%03d", i), Type: Fifo})
	}
	layers := map[byte]*index{
		's': indexed(t, Entry{Path: "f", Type: Regular, Digest: emptyDigest, Size: flatBytes}),
		'b': indexed(t, Entry{Path: "f", Type: Regular, Digest: emptyDigest, Size: flatBytes + 1}),
		'm': indexed(t, full...),
	}
	for stack, want := range map[string]string{
		"":        "",
		"sss":     "sss",
		"bsssmss": "b sss m ss",
		"bbmm":    "b b m m",
		"bs":      "b s",
	} {
		var indexes []*index
		for _, c := range []byte(stack) {
			indexes = append(indexes, layers[c])
		}
		var got []string
		for _, r := range flatRuns(indexes) {
			got = append(got, stack[r.from:r.to])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %q", stack, got, want)
		}
	}
}

// TestFlatDamaged damages what is kept of a flat layer: the next process makes it again.
func TestFlatDamaged(t *testing.T) {
	for name, c := range map[string]struct {
		hurt func(t *testing.T, s *Store, flat Layer, record string) error
		told string // of what is damaged, "" for nothing
		late bool   // it is the next process that makes it again
	}{
		"record gone":    {hurt: func(_ *testing.T, _ *Store, _ Layer, record string) error { return os.Remove(record) }},
		"record empty":   {hurt: func(_ *testing.T, _ *Store, _ Layer, record string) error { return shorten(record, 0) }},
		"record flipped": {hurt: func(_ *testing.T, _ *Store, _ Layer, record string) error { return wrongs["flipped"](record) }},
		"record of a layer that is nowhere": {hurt: func(_ *testing.T, _ *Store, _ Layer, record string) error {
			data, err := json.Marshal([]Layer{{DiffID: emptyDigest}})
			return errors.Join(err, os.WriteFile(record, sealed(data), 0o644))
		}},
		"record of no layer": {hurt: func(_ *testing.T, _ *Store, _ Layer, record string) error {
			return os.WriteFile(record, sealed([]byte("[]")), 0o644)
		}},
		"layer gone": {hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error { return os.RemoveAll(s.layerDir(flat)) }},
		"tree gone":  {hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error { return os.RemoveAll(s.treePath(flat)) }},
		"file gone": {told: "tree of layer", hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error {
			return os.Remove(filepath.Join(s.treePath(flat), "d", "f"))
		}},
		"file written to": {told: "tree of layer", hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error {
			return os.WriteFile(filepath.Join(s.treePath(flat), "d", "f"), []byte("ab"), 0o644)
		}},
		"index gone": {hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error {
			return os.Remove(filepath.Join(s.layerDir(flat), "index"))
		}},
		"index flipped": {told: "entry list of layer", hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error {
			return wrongs["flipped"](filepath.Join(s.layerDir(flat), "index"))
		}},
		"killed before the index": {hurt: func(_ *testing.T, s *Store, flat Layer, record string) error {
			return errors.Join(os.Remove(record), os.Remove(filepath.Join(s.layerDir(flat), "index")), os.Remove(s.treePath(flat)+".json"))
		}},
		"killed, and the disk lost a file": {told: "tree of layer", late: true, hurt: func(_ *testing.T, s *Store, flat Layer, record string) error {
			return errors.Join(os.Remove(record), os.Remove(s.treePath(flat)+".json"),
				os.Truncate(filepath.Join(s.treePath(flat), "d", "f"), 0))
		}},
		"another boot": {hurt: func(_ *testing.T, s *Store, flat Layer, _ string) error {
			made := s.treeOrigin()
			made.Boot = "before"
			data, err := json.Marshal(made)
			return errors.Join(err, os.WriteFile(s.treePath(flat)+".json", data, 0o644))
		}},
		"another boot, and the disk lost bytes": {told: "tree of layer", hurt: func(t *testing.T, s *Store, flat Layer, _ string) error {
			made := s.treeOrigin()
			made.Boot = "before"
			data, err := json.Marshal(made)
			return errors.Join(err, os.WriteFile(s.treePath(flat)+".json", data, 0o644),
				wrongs["flipped, and no time tells"](filepath.Join(s.treePath(flat), "d", "f")))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			base := manyLayers(t, s)
			prepared(t, s, base)
			flat := s.fewer(base)[0]
			s.Close()
			if err := c.hurt(t, s, flat, recordOf(s, base)); err != nil {
				t.Fatal(err)
			}
			s, told := repairing(t, s.Dir())
			if !c.late {
				prepared(t, s, base)
			} else if _, _, err := s.Prepare(t.Context(), base, len(base)); err != nil || !slices.Equal(s.fewer(base), base) {
				t.Errorf("Prepare: %v, %d layers, want all %d", err, len(s.fewer(base)), len(base))
			}
			if got := strings.Join(*told, "\n"); !strings.Contains(got, c.told) || c.told == "" && got != "" {
				t.Errorf("told %q, want %q", got, c.told)
			}
			s.Close()
			s, told = repairing(t, s.Dir())
			prepared(t, s, base)
			if len(*told) > 0 {
				t.Errorf("the next one was told %q", *told)
			}
		})
	}
}

// A base of which files are damaged so that no time tells is unpacked again, and flattened.
func TestFlattenDamagedBase(t *testing.T) {
	s := newStore(t)
	base := manyLayers(t, s)
	for _, name := range []string{s.treePath(base[20]) + "/d/f", s.treePath(base[3]) + "/d/f2"} {
		if err := wrongs["flipped, and no time tells"](name); err != nil {
			t.Fatal(err)
		}
	}
	var told []string
	s.tell = func(what string) { told = append(told, what) }
	prepared(t, s, base)
	want := []string{"tree of layer " + base[3].DiffID.String(), "tree of layer " + base[20].DiffID.String()}
	if !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	for _, l := range base { // no matter what is flattened next
		check := treeCheck{dir: s.treePath(l), x: s.cachedIndex(l), single: s.single, deep: true}
		if err := check.run(t.Context()); err != nil {
			t.Errorf("layer %s: %v", l.DiffID, err)
		}
	}
}

// A damaged base that is nowhere else is lost.
func TestFlattenLostBase(t *testing.T) {
	s := newStore(t)
	base := manyLayers(t, s)
	if err := wrongs["flipped, and no time tells"](filepath.Join(s.treePath(base[20]), "d", "f")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = reopen(t, s.Dir()) // nobody promises anything
	for _, b := range s.storedBlobs(base[20]) {
		if err := os.Remove(s.blobPath(b.Descriptor.Digest)); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := s.Prepare(t.Context(), base, len(base)); !errors.Is(err, ErrLost) {
		t.Errorf("Prepare: %v, want ErrLost", err)
	}
	if s.Has(base[20]) {
		t.Error("what is damaged is still there")
	}
}

func TestFlattenAtOnce(t *testing.T) {
	s := newStore(t)
	base := manyLayers(t, s)
	var wait sync.WaitGroup
	for range 4 {
		other := reopen(t, s.Dir())
		for range 2 {
			wait.Go(func() {
				if _, _, err := other.Prepare(t.Context(), base, len(base)); err != nil || len(other.fewer(base)) != 1 {
					t.Errorf("Prepare: %v, %d layers, want 1", err, len(other.fewer(base)))
				}
			})
		}
	}
	wait.Wait()
	prepared(t, s, base)
}

// A flat layer goes when it was not used for long, with its record, though an image needs the base.
func TestPruneFlat(t *testing.T) {
	s := newStore(t)
	base := manyLayers(t, s)
	tagImage(t, s, base[0])
	prepared(t, s, base)
	flat, old := s.fewer(base)[0], time.Now().Add(-time.Hour)
	record := recordOf(s, base)
	if err := errors.Join(os.Chtimes(record, old, old), os.Chtimes(s.layerDir(flat), old, old)); err != nil {
		t.Fatal(err)
	}
	s.Close()

	s = reopen(t, s.Dir())
	prepared(t, s, base)
	items, err := s.Items(t.Context(), time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]Kind{flat.DiffID.String(): KindLayer, flats + "/" + filepath.Base(record): KindRecord}
	for _, it := range items {
		if kind, ok := ids[it.ID]; ok && (it.Kind != kind || it.InUse || it.Bytes == 0 || time.Since(it.Used) > time.Minute) {
			t.Errorf("used a moment ago: %+v", it)
		}
	}
	p, err := s.Prune(t.Context(), PruneOptions{Now: time.Now(), Choose: func(all []Item) []Item {
		return slices.DeleteFunc(all, func(it Item) bool { _, ok := ids[it.ID]; return !ok })
	}})
	if err != nil || len(p.Removed) != len(ids) {
		t.Errorf("Prune: %+v, %v, want %d removed", p, err, len(ids))
	}
	s.Close()
	s, told := repairing(t, s.Dir())
	prepared(t, s, base)
	if len(*told) > 0 {
		t.Errorf("told %q", *told)
	}
}
