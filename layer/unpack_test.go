package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// head is one member of a foreign tar: "f name content", "d name", "s name
// target", "h name target", "p name" (fifo), "c name".
type head string

func (h head) header() (*tar.Header, string) {
	kind, rest, _ := strings.Cut(string(h), " ")
	name, arg, _ := strings.Cut(rest, " ")
	t := &tar.Header{Name: name, Mode: 0o644, ModTime: time.Unix(1e9, 5e8)}
	switch kind {
	case "f":
		t.Typeflag, t.Size = tar.TypeReg, int64(len(arg))
		return t, arg
	case "d":
		t.Typeflag, t.Mode = tar.TypeDir, 0o755
	case "s":
		t.Typeflag, t.Linkname, t.Mode = tar.TypeSymlink, arg, 0o777
	case "h":
		t.Typeflag, t.Linkname = tar.TypeLink, arg
	case "p":
		t.Typeflag = tar.TypeFifo
	case "c":
		t.Typeflag, t.Devmajor, t.Devminor = tar.TypeChar, 1, 3
	case "g":
		t = &tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}
	}
	return t, ""
}

func foreignTar(t testing.TB, heads ...head) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range heads {
		header, text := h.header()
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// promised promises a tar to s, gzipped, and counts the fetches.
func promised(t testing.TB, s *Store, data []byte) (Layer, ocispec.Descriptor, *atomic.Int32) {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(data); err != nil || z.Close() != nil {
		t.Fatal(err)
	}
	l := Layer{DiffID: digest.FromBytes(data)}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}
	var fetches atomic.Int32
	s.Promise(l, d, func(context.Context) (io.ReadCloser, error) {
		fetches.Add(1)
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	})
	return l, d, &fetches
}

func brief(e Entry) string {
	s := string(e.Type) + " " + e.Path
	if e.Link != "" {
		s += " " + e.Link
	}
	if e.Type == Regular {
		s += " " + fmt.Sprint(e.Size)
	}
	return s
}

func TestUnpack(t *testing.T) {
	long := strings.Repeat("x", 250)
	tests := []struct {
		name  string
		heads []head
		want  []string
	}{
		{"empty", nil, nil},
		{"any order", []head{"f b/c/d 1", "d ./", "f a 22", "d b"}, []string{"d .", "- a 2", "d b", "- b/c/d 1"}},
		{"names", []head{"f ./a 1", "f /b 1", "f c/../d 1", "f //e//f 1", "d g/"}, []string{"- a 1", "- b 1", "- d 1", "- e/f 1", "d g"}},
		{"long", []head{head("f " + long + "/" + long + "/" + long + " 1")}, []string{"- " + long + "/" + long + "/" + long + " 1"}},
		{"bytes", []head{"f \xff\xfe 1"}, []string{"- \xff\xfe 1"}},
		{"last wins", []head{"f a 1", "f a 22", "s b x", "f b 333"}, []string{"- a 2", "- b 3"}},
		{"directory twice", []head{"d a", "f a/b 1", "d a"}, []string{"d a", "- a/b 1"}},
		{"file replaces directory", []head{"f a/b/c 1", "f a 22"}, []string{"- a 2"}},
		{"directory replaces file", []head{"f a 22", "d a", "f a/b 1"}, []string{"d a", "- a/b 1"}},
		{"implied replaces file", []head{"f a 22", "f a/b 1"}, []string{"- a/b 1"}},
		{"directory replaces link", []head{"d x", "s a x", "d a", "f a/b 1"}, []string{"d a", "- a/b 1", "d x"}},
		{"through a link", []head{"d usr", "s lib usr/lib", "f lib/x 1"}, []string{"l lib usr/lib", "d usr", "- usr/lib/x 1"}},
		{"through links out", []head{"s a ../../b", "s b /c", "f a/x 1"}, []string{"l a ../../b", "l b /c", "- c/x 1"}},
		{"hard link", []head{"f z 1", "h a z", "h b ./a"}, []string{"- a 1", "h b a", "h z a"}},
		{"hard link through link", []head{"f u/l/z 1", "s l u/l", "h l/a l/z"}, []string{"l l u/l", "- u/l/a 1", "h u/l/z u/l/a"}},
		{"hard link to itself", []head{"f a 1", "h a a"}, []string{"- a 1"}},
		{"target replaced", []head{"f a 1", "h b a", "f a 22"}, []string{"- a 2", "- b 1"}},
		{"hard link replaces", []head{"f a 1", "f d/x 1", "h d a"}, []string{"- a 1", "h d a"}},
		{"hard link to symlink", []head{"s a x", "h b a"}, []string{"l a x", "h b a"}},
		{"hard link to fifo", []head{"p a", "h b a"}, []string{"p a", "h b a"}},
		{"whiteout", []head{"f a/.wh.b", "f .wh.c"}, []string{"w a/b", "w c"}},
		{"whiteout and file", []head{"f a 1", "f .wh.a", "f .wh.b", "f b 1"}, []string{"- a 1", "- b 1"}},
		{"whiteout and directory", []head{"f .wh.a", "d a", "f .wh.b", "f b/c 1"}, []string{"d a", "o a", "o b", "- b/c 1"}},
		{"whiteout, directory, file", []head{"f .wh.a", "d a", "f a 1"}, []string{"- a 1"}},
		{"opaque", []head{"f a/.wh..wh..opq", "f a/b 1", "d c", "f c/.wh..wh..opq"}, []string{"o a", "- a/b 1", "d c", "o c"}},
		{"opaque root", []head{"f .wh..wh..opq", "f a 1"}, []string{"o .", "- a 1"}},
		{"aufs", []head{"f .wh..wh.plnk/x 1", "d .wh..wh.aufs", "f a/.wh..wh.orph"}, nil},
		{"device", []head{"c null", "p fifo"}, []string{"p fifo", "c null"}},
		{"whiteout inside replaced", []head{"f a/.wh.x", "f a 1"}, []string{"- a 1"}},
		{"implied then directory", []head{"f a/.wh.x", "d a"}, []string{"d a", "w a/x"}},
		{"global header", []head{"g", "f a 1"}, []string{"- a 1"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newStore(t)
			data := foreignTar(t, test.heads...)
			l, d, fetches := promised(t, s, data)
			x, err := s.index(t.Context(), l)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for e := range x.all() {
				got = append(got, brief(e))
			}
			if d := cmp.Diff(test.want, got); d != "" {
				t.Fatalf("index differs:\n%s", d)
			}
			if _, err := os.Stat(s.treePath(l)); err == nil {
				t.Error("index alone made a tree")
			}
			tree, err := s.Tree(t.Context(), l)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(treeWant(x), treeFacts(t, tree)); d != "" {
				t.Errorf("tree differs:\n%s", d)
			}
			if n := fetches.Load(); n != 1 {
				t.Errorf("fetched %d times", n)
			}
			// A second store gets index and tree in one pass.
			other := newStore(t)
			promised(t, other, data)
			if _, err := other.Tree(t.Context(), l); err != nil {
				t.Fatal(err)
			}
			y, err := other.index(t.Context(), l)
			if err != nil || string(y.encode()) != string(x.encode()) {
				t.Errorf("index made with a tree differs: %v", err)
			}
			blob, err := s.Blob(t.Context(), l, Compression{}, false)
			if err != nil || blob.Digest != d.Digest {
				t.Errorf("blob %v, %v, want the original %v", blob, err, d)
			}
		})
	}
}

// treeWant is what treeFacts should find for x.
func treeWant(x *index) []string {
	var lines []string
	seen := map[string]bool{}
	imply := func(p string) {
		var missing []string
		for ; p != "." && !seen[p]; p = filepath.Dir(p) {
			missing = append(missing, p)
			seen[p] = true
		}
		for _, p := range slices.Backward(missing) {
			e := impliedDir(p)
			if !realRoot() {
				e.UID, e.GID = os.Getuid(), os.Getgid()
			}
			lines = append(lines, entryFacts(e))
		}
	}
	for e := range x.all() {
		imply(filepath.Dir(e.Path))
		if e.Path == "." {
			continue
		}
		if e.Type == Opaque {
			imply(e.Path)
			lines[len(lines)-1] += " opaque"
			continue
		}
		seen[e.Path] = e.Type == Dir
		if e.Type == Hardlink {
			file, _ := x.find(e.Link)
			file.Path = e.Path
			e = file
		}
		if !realRoot() {
			if e.Type == Char {
				e.Type, e.Digest, e.Major, e.Minor = Regular, digest.FromString(""), 0, 0
			}
			if e.Type != Whiteout {
				e.UID, e.GID = os.Getuid(), os.Getgid()
			}
		}
		lines = append(lines, entryFacts(e))
	}
	return lines
}

func TestUnpackRefuses(t *testing.T) {
	for _, test := range []struct {
		heads []head
		want  string
	}{
		{[]head{"f ../a 1"}, "leads out"},
		{[]head{"f /../a 1"}, "leads out"},
		{[]head{"f a/../../b 1"}, "leads out"},
		{[]head{"h a ../../etc/passwd"}, "leads out"},
		{[]head{"h a /etc/passwd"}, "no such file before it"},
		{[]head{"d d", "h a d"}, "no such file before it"},
		{[]head{"f d/x 1", "h d d/x"}, "replaces its target"},
		{[]head{"s a b", "s b a", "f a/x 1"}, "symbolic links"},
		{[]head{"f . 1"}, "root"},
		{[]head{"f .wh. 1"}, "whiteout of nothing"},
		{[]head{"f a/.wh... 1"}, "whiteout of nothing"},
		{[]head{"f .wh.a/b 1"}, "inside a whiteout"},
		{[]head{head("f " + strings.Repeat("x", 256) + " 1")}, "too long"},
		{[]head{head("d " + strings.Repeat("x/", 3000))}, "too long"},
	} {
		for _, tree := range []bool{false, true} {
			s := newStore(t)
			l, _, _ := promised(t, s, foreignTar(t, test.heads...))
			_, err := s.index(t.Context(), l)
			if tree {
				_, err = s.Tree(t.Context(), l)
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%q: %v, want %q", test.heads, err, test.want)
			}
			if left, _ := os.ReadDir(s.tmp); len(left) > 0 {
				t.Errorf("%q: left behind %v", test.heads, left)
			}
		}
	}
}

// No link in a layer, of whatever kind, leads the unpacking outside the tree.
func TestUnpackStaysInside(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, heads := range [][]head{
		{head("s a " + outside), "f a/secret changed", "f a/new 1"},
		{head("s a " + secret), "f a changed"},
		{head("s a " + outside), "d a", "f a/new 1"},
		{head("s a " + outside), "h b a/secret"},
		{"s a ../../../../../../../../../..", head("f a" + secret + " changed")},
		{head("s a " + outside), "f a/.wh.secret", "f a/.wh..wh..opq"},
	} {
		s := newStore(t)
		l, _, _ := promised(t, s, foreignTar(t, heads...))
		_, _ = s.Tree(t.Context(), l)
		if data, err := os.ReadFile(secret); string(data) != "untouched" {
			t.Errorf("%q: changed to %q, %v", heads, data, err)
		}
		if list, _ := os.ReadDir(outside); len(list) != 1 {
			t.Errorf("%q: outside has %v", heads, list)
		}
	}
}

func TestFetchVerifies(t *testing.T) {
	data := foreignTar(t, "f a 1")
	other := foreignTar(t, "f a 2")
	body := func(b []byte) func(context.Context) (io.ReadCloser, error) {
		return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	}
	good := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
	wrong := func(change func(*ocispec.Descriptor)) ocispec.Descriptor {
		d := good
		change(&d)
		return d
	}
	broken := errors.New("connection lost")
	for name, test := range map[string]struct {
		diffID digest.Digest
		desc   ocispec.Descriptor
		fetch  func(context.Context) (io.ReadCloser, error)
		want   string
	}{
		"content":    {good.Digest, good, body(other), "does not match"},
		"short":      {good.Digest, good, body(data[:700]), "bytes are missing"},
		"long":       {good.Digest, good, body(append(slices.Clone(data), 0)), "longer"},
		"size":       {good.Digest, wrong(func(d *ocispec.Descriptor) { d.Size-- }), body(data), "longer"},
		"diff ID":    {digest.FromBytes(other), good, body(data), "holds the layer"},
		"media type": {good.Digest, wrong(func(d *ocispec.Descriptor) { d.MediaType = "text/plain" }), body(data), "not a layer"},
		"encrypted":  {good.Digest, wrong(func(d *ocispec.Descriptor) { d.MediaType += "+encrypted" }), body(data), "unknown kind"},
		"fetch":      {good.Digest, good, func(context.Context) (io.ReadCloser, error) { return nil, broken }, "connection lost"},
		"no digest":  {good.Digest, wrong(func(d *ocispec.Descriptor) { d.Digest = "x" }), body(data), "digest"},
		"bad diffID": {"sha256:../../../x", good, body(data), "digest"},
	} {
		s := newStore(t)
		l := Layer{DiffID: test.diffID}
		s.Promise(l, test.desc, test.fetch)
		for range 2 {
			if _, err := s.index(t.Context(), l); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %q", name, err, test.want)
			}
		}
		for _, sub := range []string{"blobs/sha256", "layers"} {
			if list, _ := os.ReadDir(filepath.Join(s.Dir(), sub)); len(list) > 0 {
				t.Errorf("%s: %s has %v", name, sub, list)
			}
		}
	}
}

func TestSecondPromiseIsTried(t *testing.T) {
	s := newStore(t)
	data := foreignTar(t, "f a 1")
	l, _, _ := promised(t, s, data)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("gone"), Size: 4}
	s.Promise(l, d, func(context.Context) (io.ReadCloser, error) { return nil, errors.New("404") })
	if _, err := s.Tree(t.Context(), l); err != nil {
		t.Error(err)
	}
}

func TestFetchIsDoneOnce(t *testing.T) {
	s := newStore(t)
	second := reopen(t, s.Dir())
	data := foreignTar(t, "f a 1", "d d", "f d/b 2")
	l, _, fetches := promised(t, s, data)
	_, _, fetchesToo := promised(t, second, data)
	var group sync.WaitGroup
	for i := range 16 {
		group.Go(func() {
			store := []*Store{s, second}[i%2]
			var err error
			if i%4 < 2 {
				_, err = store.Tree(t.Context(), l)
			} else {
				_, err = store.View(t.Context(), []Layer{l})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := fetches.Load() + fetchesToo.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
}

func TestFetchIsCalledOff(t *testing.T) {
	s := newStore(t)
	data := foreignTar(t, "f a 1")
	l := Layer{DiffID: digest.FromBytes(data)}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: int64(len(data))}
	started := make(chan struct{})
	s.Promise(l, d, func(ctx context.Context) (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			close(started)
			<-ctx.Done()
			w.CloseWithError(ctx.Err())
		}()
		return r, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	if _, err := s.Tree(ctx, l); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want canceled", err)
	}
}

// TestHoleIsCalledOff unpacks a file that is nothing but a hole of a petabyte (GNU tar, "Old GNU Format").
func TestHoleIsCalledOff(t *testing.T) {
	s := newStore(t)
	h := foreignTar(t, "f a")[:512]
	size := binary.BigEndian.AppendUint64([]byte{0x80, 0, 0, 0}, 1<<50)
	copy(h[257:], "ustar  \x00")
	h[156] = tar.TypeGNUSparse
	copy(h[386:], size) // where the only part begins, which has no bytes
	copy(h[386+12:], "00000000000\x00")
	copy(h[483:], size)
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	l, _, _ := promised(t, s, append(h, make([]byte, 1024)...))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := s.View(ctx, []Layer{l})
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want that time is over", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on")
	}
}

func TestUnknownLayer(t *testing.T) {
	s := newStore(t)
	for _, id := range []digest.Digest{digest.FromString("x"), "", "sha256:x", "sha512:00", "../.."} {
		l := Layer{DiffID: id}
		if s.Has(l) {
			t.Errorf("Has(%q)", id)
		}
		if _, err := s.Tree(t.Context(), l); err == nil {
			t.Errorf("Tree(%q) succeeds", id)
		}
		if _, err := s.Blob(t.Context(), l, Compression{}, false); err == nil {
			t.Errorf("Blob(%q) succeeds", id)
		}
	}
	if _, err := s.Tree(t.Context(), Layer{digest.FromString("x")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want fs.ErrNotExist", err)
	}
}

// Trees come back in every case that a power cut, another id map or a missing
// mark can make.
func TestUntrustedTrees(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	built := buildLayer(t, s, Sinks{Tree: true}, []item{folder("a"), regular("a/b", "text")})
	foreign, _, _ := promised(t, s, foreignTar(t, "f z 1", "f a/b text"))
	for _, l := range []Layer{built, foreign} {
		tree, err := s.Tree(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		mark := tree + ".json"
		// No mark, but whole.
		if err := os.Remove(mark); err != nil {
			t.Fatal(err)
		}
		kept, _ := os.Stat(tree)
		again := reopen(t, dir)
		if _, err := again.Tree(t.Context(), l); err != nil {
			t.Fatal(err)
		}
		if now, _ := os.Stat(tree); !os.SameFile(kept, now) {
			t.Error("a whole tree was made again")
		}
		// Other owners: made again from blob or old tree.
		if err := os.WriteFile(mark, []byte(`{"boot":"x","ids":"0 7 1"}`), 0o644); err != nil {
			t.Fatal(err)
		}
		again = reopen(t, dir)
		if _, err := again.Tree(t.Context(), l); err != nil {
			t.Fatal(err)
		}
		if now, _ := os.Stat(tree); os.SameFile(kept, now) {
			t.Error("a tree of another id map was kept")
		}
		// Half lost.
		if err := errors.Join(os.Remove(mark), os.Truncate(filepath.Join(tree, "a/b"), 0)); err != nil {
			t.Fatal(err)
		}
		again = reopen(t, dir)
		_, err = again.Tree(t.Context(), l)
		data, _ := os.ReadFile(filepath.Join(tree, "a/b"))
		if l == foreign && (err != nil || string(data) != "text") {
			t.Errorf("after the loss: %q, %v", data, err)
		}
		if l == built && err == nil {
			t.Error("a half lost tree without blob is trusted")
		}
	}
}

func TestUnpackFormats(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip(err)
	}
	src := t.TempDir()
	name := strings.Repeat("long/", 40) + strings.Repeat("n", 120)
	if err := os.MkdirAll(filepath.Join(src, filepath.Dir(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	sparse, err := os.Create(filepath.Join(src, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = sparse.WriteAt([]byte("end"), 1<<20)
	err = errors.Join(err, sparse.Close(), os.WriteFile(filepath.Join(src, name), []byte("x"), 0o640),
		os.Link(filepath.Join(src, name), filepath.Join(src, "hard")), os.Symlink(name, filepath.Join(src, "soft")))
	if err != nil {
		t.Fatal(err)
	}
	var first string
	for _, format := range []string{"gnu", "pax", "oldgnu"} {
		data, err := exec.Command("tar", "-C", src, "--sort=name", "--sparse", "--format="+format, "-c", ".").Output()
		if err != nil {
			t.Fatal(err)
		}
		s := newStore(t)
		l, _, _ := promised(t, s, data)
		tree, err := s.Tree(t.Context(), l)
		if err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		x, _ := s.index(t.Context(), l)
		if first == "" {
			first = string(x.encode())
		}
		if string(x.encode()) != first {
			t.Errorf("%s: other entries than in gnu", format)
		}
		got, err1 := os.ReadFile(filepath.Join(tree, "sparse"))
		want, err2 := os.ReadFile(filepath.Join(src, "sparse"))
		if err1 != nil || err2 != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: sparse file differs: %v %v", format, err1, err2)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(foreignTar(f, "f a/b 1", "s l /a", "f l/c 2", "h x a/b", "f .wh.q", "d a", "f a/.wh..wh..opq", "c dev"))
	f.Add(foreignTar(f, "f a 1", "h b a", "f a 22", "f b/c 1", "s b ../..", "f b/x 1"))
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, data []byte) {
		outside := t.TempDir()
		s, err := Open(filepath.Join(outside, "state"), Options{SingleID: true})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		l := Layer{DiffID: digest.FromBytes(data)}
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: int64(len(data))}
		s.Promise(l, d, func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		x, err := s.index(t.Context(), l)
		if err != nil {
			return
		}
		last := ""
		for e := range x.all() {
			if !validName(e.Path) {
				t.Fatalf("name %q", e.Path)
			}
			if last != "" && comparePaths(last, e.Path) > 0 {
				t.Fatalf("%q after %q", e.Path, last)
			}
			if target, ok := x.find(e.Link); e.Type == Hardlink && (!ok || target.Type != Regular || comparePaths(e.Link, e.Path) >= 0) {
				t.Fatalf("%q links to %v", e.Path, target)
			}
			last = e.Path
		}
		tree, err := s.Tree(t.Context(), l)
		if err != nil {
			return // too deep, say
		}
		if err := (&treeCheck{dir: tree, x: x}).run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if list, _ := os.ReadDir(outside); len(list) != 1 {
			t.Fatalf("outside: %v", list)
		}
	})
}

func BenchmarkUnpack(b *testing.B) {
	var heads []head
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 6000 {
		if i%50 == 0 {
			heads = append(heads, head(fmt.Sprintf("d usr/share/d%04d", i/50)))
		}
		text := strings.Repeat(fmt.Sprintf("line %d of the file\n", i), random.IntN(1000))
		heads = append(heads, head(fmt.Sprintf("f usr/share/d%04d/file%05d %s", i/50, i, text)))
	}
	data := foreignTar(b, heads...)
	for _, tree := range []bool{false, true} {
		b.Run(fmt.Sprintf("tree=%v", tree), func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				b.StopTimer()
				s := newStore(b)
				l, _, _ := promised(b, s, data)
				b.StartTimer()
				_, err := s.index(b.Context(), l)
				if tree {
					_, err = s.Tree(b.Context(), l)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
