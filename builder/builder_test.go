package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/image"
	"filo/builder/sandbox"
	"filo/builder/source"
	"filo/cache"
	"filo/layer"
	"filo/layer/registry"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && filepath.Base(os.Args[0]) == "tool" {
		tool(os.Args[1:])
	}
	os.Exit(m.Run())
}

// tool is what RUN executes in these tests: the test binary under the name "tool".
func tool(args []string) {
	var err error
	switch args[0] {
	case "write":
		err = os.WriteFile(args[1], []byte(args[2]), 0o644)
	case "cat":
		var b []byte
		b, err = os.ReadFile(args[1])
		os.Stdout.Write(b)
	case "env":
		fmt.Println(os.Getenv(args[1]))
	case "mkdir":
		err = os.Mkdir(args[1], 0o755)
	case "rm":
		err = os.RemoveAll(args[1])
	case "fail":
		os.Exit(17)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// bench is a state directory and a build context to build with.
type bench struct {
	t       testing.TB
	state   string
	context string
	mu      sync.Mutex
	events  []Event
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{t: t, state: t.TempDir(), context: t.TempDir()}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Link(exe, filepath.Join(b.context, "tool")); err != nil {
		data, err := os.ReadFile(exe)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(b.context, "tool"), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// file writes a file of the context.
func (b *bench) file(name, text string) {
	b.t.Helper()
	p := filepath.Join(b.context, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// try builds text; with returns the store still open.
func (b *bench) try(text string, change func(*Request), with func(*layer.Store, *image.Image)) error {
	b.t.Helper()
	store, err := layer.Open(b.state, layer.Options{SingleID: os.Geteuid() != 0})
	if err != nil {
		b.t.Fatal(err)
	}
	defer store.Close()
	temp, err := store.Temp("cache-")
	if err != nil {
		b.t.Fatal(err)
	}
	c, err := cache.Open(b.state, temp, time.Now)
	if err != nil {
		b.t.Fatal(err)
	}
	src, err := source.Open(b.t.Context(), b.context, source.Options{Temp: temp})
	if err != nil {
		b.t.Fatal(err)
	}
	defer src.Close()
	b.events = nil
	bd := &Builder{Store: store, Cache: c, Registry: registry.Open(registry.Options{}), Now: time.Now, Emit: func(e Event) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.events = append(b.events, e)
	}}
	req := Request{File: []byte(text), FileName: "Dockerfile", Context: src.FS, Root: src.Root}
	if change != nil {
		change(&req)
	}
	res, err := bd.Build(b.t.Context(), req)
	if err == nil && with != nil {
		with(store, res.Images[0])
	}
	return err
}

// build builds text and returns the image's files.
func (b *bench) build(text string, change func(*Request)) map[string]string {
	b.t.Helper()
	files := map[string]string{}
	err := b.try(text, change, func(s *layer.Store, img *image.Image) {
		v, err := s.View(context.Background(), img.Layers)
		if err != nil {
			b.t.Fatal(err)
		}
		for name, text := range listing(b.t, v) {
			files[name] = text
		}
	})
	if err != nil {
		b.t.Fatalf("build: %v\n%s", err, b.log())
	}
	return files
}

// listing returns what every file of v is: of a regular file mode, owner and text.
func listing(t testing.TB, v *layer.View) map[string]string {
	out := map[string]string{}
	err := fs.WalkDir(v, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		e, _ := v.Entry(name)
		out[name] = fmt.Sprintf("%c %04o %d:%d %s", e.Type, e.Mode, e.UID, e.GID, e.Link)
		if e.Type == layer.Regular && e.Size < 1000 {
			f, err := v.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			text, err := io.ReadAll(f)
			out[name] += string(text)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (b *bench) log() string {
	var out strings.Builder
	for _, e := range b.events {
		fmt.Fprintf(&out, "#%d %s %d %s %v\n", e.Vertex, e.Name, e.State, e.Data, e.Err)
	}
	return out.String()
}

// cached counts the vertices that were found and those that were done.
func (b *bench) cached() (hits, misses int) {
	for _, e := range b.events {
		switch {
		case e.State == Cached:
			hits++
		case e.State == Done && strings.HasPrefix(e.Name, "[") && !strings.HasPrefix(e.Name, "[internal]"):
			misses++
		}
	}
	return hits, misses
}

// sandboxed skips a test that needs to run processes where the kernel forbids it.
func sandboxed(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("RUN needs root or a user namespace entered before the test: covered by the scripts of cmd/filo")
	}
}

func TestRunCopyAndCache(t *testing.T) {
	sandboxed(t)
	b := newBench(t)
	b.file("a", "text")
	b.file("d/x", "ex")
	const text = `FROM scratch AS one
COPY tool /bin/tool
RUN ["/bin/tool", "write", "/out", "made"]
FROM scratch
WORKDIR /w
COPY a /a
COPY d /d/
COPY --from=one /out out
`
	want := map[string]string{
		"w": "d 0755 0:0 ", "a": "- 0644 0:0 text", "d": "d 0755 0:0 ", "d/x": "- 0644 0:0 ex", "w/out": "- 0644 0:0 made",
	}
	check := func(got map[string]string) {
		t.Helper()
		for name, w := range want {
			if got[name] != w {
				t.Errorf("%s: got %q, want %q", name, got[name], w)
			}
		}
		if len(got) != len(want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	check(b.build(text, nil))
	if hits, misses := b.cached(); hits != 0 || misses != 6 {
		t.Errorf("first build: %d hits, %d misses, want 0, 6\n%s", hits, misses, b.log())
	}
	check(b.build(text, nil))
	if hits, misses := b.cached(); hits != 6 || misses != 0 {
		t.Errorf("second build: %d hits, %d misses, want 6, 0\n%s", hits, misses, b.log())
	}
	b.file("d/x", "new")
	want["d/x"] = "- 0644 0:0 new"
	check(b.build(text, nil))
	if hits, misses := b.cached(); hits != 4 || misses != 2 {
		t.Errorf("one file changed: %d hits, %d misses, want 4, 2\n%s", hits, misses, b.log())
	}
}

// A RUN is done again with another cache mount, where that is told by how the cache begins.
func TestCacheMountInKey(t *testing.T) {
	sandboxed(t)
	b := newBench(t)
	b.file("a", "text")
	for _, step := range []struct {
		mount, why string
		misses     int
	}{
		{"target=/c", "first build", 2},
		{"target=/c,id=other", "another ID", 0},
		{"target=/c,mode=0700", "a mode", 1},
		{"target=/c,uid=7", "an owner", 1},
		{"target=/c,from=one", "a source", 1},
		{"target=/c,from=one", "the same again", 0},
	} {
		b.build("FROM scratch AS one\nCOPY a /\nFROM scratch\nCOPY tool /bin/tool\n"+
			"RUN --mount=type=cache,"+step.mount+" [\"/bin/tool\", \"write\", \"/out\", \"made\"]\n", nil)
		_, misses := b.cached()
		if step.why == "a source" {
			misses-- // of stage one
		}
		if misses != step.misses {
			t.Errorf("%s: %d misses, want %d\n%s", step.why, misses, step.misses, b.log())
		}
	}
	b.file("a", "other")
	b.build("FROM scratch AS one\nCOPY a /\nFROM scratch\nCOPY tool /bin/tool\n"+
		"RUN --mount=type=cache,target=/c,from=one [\"/bin/tool\", \"write\", \"/out\", \"made\"]\n", nil)
	if _, misses := b.cached(); misses != 2 {
		t.Errorf("another source: %d misses, want 2\n%s", misses, b.log())
	}
	// Nor does what it is known by without a look at files, where it mounts a stage as well.
	both := "FROM scratch AS one\nCOPY a /\nFROM scratch AS two\nCOPY b /\nFROM scratch\nCOPY tool /bin/tool\n" +
		"RUN --mount=type=bind,from=two,target=/two --mount=type=cache,target=/c,from=one [\"/bin/tool\", \"write\", \"/out\", \"made\"]\n"
	b.file("b", "text")
	b.build(both, nil)
	b.file("a", "a third")
	b.build(both, nil)
	if _, misses := b.cached(); misses != 2 {
		t.Errorf("another source beside a bind mount: %d misses, want 2\n%s", misses, b.log())
	}
}

// A source without from is a directory of the cache itself.
func TestCacheMountSource(t *testing.T) {
	sandboxed(t)
	b := newBench(t)
	const part = "RUN --mount=type=cache,id=c,source=part,target=/p "
	start := "FROM scratch\nCOPY tool /bin/tool\nRUN --mount=type=cache,id=c,target=/c [\"/bin/tool\", \"mkdir\", \"/c/part\"]\n"
	b.build(start+part+`["/bin/tool", "write", "/p/f", "text"]`+"\n", nil)
	b.build(start+"RUN --mount=type=cache,id=c,target=/p [\"/bin/tool\", \"cat\", \"/p/part/f\"]\n"+part+`["/bin/tool", "cat", "/p/f"]`+"\n", nil)
	if _, misses := b.cached(); misses != 2 {
		t.Errorf("the whole cache and a part of it: %d misses, want 2\n%s", misses, b.log())
	}
	err := b.try(start+strings.Replace(part, "part", "none", 1)+`["/bin/tool", "cat", "/p/f"]`+"\n", nil, nil)
	if err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("a source that is not there: got error %v", err)
	}
}

func TestRunFails(t *testing.T) {
	sandboxed(t)
	b := newBench(t)
	err := b.try("FROM scratch\nCOPY tool /bin/tool\nRUN [\"/bin/tool\", \"fail\"]\n", nil, nil)
	var exit *sandbox.ExitError
	if !errors.As(err, &exit) || exit.Code != 17 {
		t.Errorf("got %v, want exit code 17", err)
	}
}

// TestRunLast makes the blob of a RUN with its layer, if no step follows, or of the tree it left: the same blob.
func TestRunLast(t *testing.T) {
	sandboxed(t)
	b := newBench(t)
	b.file("a", "text")
	epoch, c := int64(1_000_000_000), layer.Compression{Algorithm: layer.Gzip}
	blobOf := func(text string) (d ocispec.Descriptor) {
		t.Helper()
		b.state = t.TempDir()
		err := b.try(text, func(r *Request) { r.Epoch, r.Ships = &epoch, &c }, func(s *layer.Store, img *image.Image) {
			var err error
			if d, err = s.Blob(t.Context(), img.Layers[1], c, true); err != nil {
				t.Fatal(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	const text = "FROM scratch\nCOPY tool /bin/tool\nRUN [\"/bin/tool\", \"write\", \"/out\", \"made\"]\n"
	last, before := blobOf(text), blobOf(text+"COPY a /a\n")
	if last.Digest != before.Digest || last.Size != before.Size {
		t.Errorf("%v as the last step, %v before another", last, before)
	}
}
