package layer

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// opened gives items as files and counts those that are open.
func opened(items []item, open *atomic.Int32) iter.Seq[File] {
	return func(yield func(File) bool) {
		for _, it := range items {
			f := File{Entry: it.Entry, Open: func() (io.ReadCloser, error) {
				open.Add(1)
				return &counted{strings.NewReader(it.text), open}, nil
			}}
			if it.Type != Regular || it.Size == 0 {
				f.Open = nil
			}
			if !yield(f) {
				return
			}
		}
	}
}

type counted struct {
	io.Reader
	open *atomic.Int32
}

func (c *counted) Close() error {
	c.open.Add(-1)
	return nil
}

// AddAll makes the layer that Add makes, whatever is read ahead.
func TestAddAll(t *testing.T) {
	items := odd()
	for i := range 500 {
		size := []int{0, 1, 100, smallFile - 1, smallFile, smallFile + 1, 3 * copyBuffer}[i%7]
		items = append(items, regular(fmt.Sprintf("with/%03d", i), strings.Repeat(fmt.Sprint(i), size)[:size]))
		if i == 0 {
			items = append(items[:len(items)-1], folder("with"), items[len(items)-1])
		}
	}
	for _, k := range []Sinks{{Tree: true}, {Blob: &Compression{}}} {
		want := buildLayer(t, newStore(t), k, items)
		for _, procs := range []int{1, 2, 8} {
			old := runtime.GOMAXPROCS(procs)
			var open atomic.Int32
			s := newStore(t)
			w, err := s.Create(t.Context(), k)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.AddAll(opened(items, &open)); err != nil {
				t.Fatal(err)
			}
			got, err := w.Close()
			if err != nil || got != want || open.Load() != 0 {
				t.Errorf("%d processors: %v, %v, %d files stay open, want %v", procs, got, err, open.Load(), want)
			}
			runtime.GOMAXPROCS(old)
		}
	}
}

// What is wrong with a file is told as Add tells it, and of the first one.
func TestAddAllErrors(t *testing.T) {
	shorter, longer, other := regular("b", "12"), regular("b", "12"), regular("b", "12")
	shorter.Size, longer.Size, other.Digest = 5, 1, digest.FromString("no")
	long := regular("b", strings.Repeat("x", smallFile+2))
	long.Size = smallFile + 1
	for _, bad := range []item{shorter, longer, other, long} {
		items := []item{regular("a", "1"), bad}
		for i := range 1000 {
			items = append(items, regular(fmt.Sprintf("c%03d", i), "x"))
		}
		items = append(items, shorter) // out of order as well, and never told
		var open atomic.Int32
		w, err := newStore(t).Create(t.Context(), Sinks{Tree: true})
		if err != nil {
			t.Fatal(err)
		}
		got := w.AddAll(opened(items, &open))
		w.Abort()
		one, err := newStore(t).Create(t.Context(), Sinks{Tree: true})
		if err != nil {
			t.Fatal(err)
		}
		want := one.Add(bad.Entry, strings.NewReader(bad.text))
		one.Abort()
		if !errors.Is(got, ErrChanged) || want == nil || got.Error() != want.Error() || open.Load() != 0 {
			t.Errorf("AddAll = %v with %d files open, Add = %v", got, open.Load(), want)
		}
	}
	w, err := newStore(t).Create(t.Context(), Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	none := func() (io.ReadCloser, error) { return nil, fs.ErrNotExist }
	for _, size := range []int64{1, smallFile + 1} {
		f := File{Entry: Entry{Path: "gone", Type: Regular, Size: size}, Open: none}
		if err := w.AddAll(func(yield func(File) bool) { yield(f) }); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "add gone") {
			t.Errorf("AddAll of a file that is gone = %v", err)
		}
	}
}
