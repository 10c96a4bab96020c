package builder

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filo/builder/image"
	"filo/layer"
)

// copyContext fills the context that the cases of TestCopy copy from.
func copyContext(t *testing.T, b *bench) {
	t.Helper()
	for name, text := range map[string]string{
		"f": "F", "g": "G", "d/x": "X", "d/.dot": "dot", "d/e/y": "Y", "a[0].txt": "odd", "n/f": "NF", "n/g": "NG",
	} {
		b.file(name, text)
	}
	in := func(name string) string { return filepath.Join(b.context, name) }
	for link, to := range map[string]string{"sl": "f", "sd": "d", "abs": "/d/x", "dead": "nowhere", "up": "../../../f", "d/lx": "x"} {
		if err := os.Symlink(to, in(link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(in("d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(in("d/x"), in("d/h")); err != nil {
		t.Fatal(err)
	}
}

// The rules of COPY's destination and sources, as BuildKit has them (features 1.9).
func TestCopy(t *testing.T) {
	b := newBench(t)
	copyContext(t, b)
	const x, y, dot = "- 0644 0:0 X", "- 0644 0:0 Y", "- 0644 0:0 dot"
	const dir, link = "d 0755 0:0 ", "l 0777 0:0 x"
	d := map[string]string{"": dir, "/x": x, "/h": x, "/.dot": dot, "/e": dir, "/e/y": y, "/lx": link}
	under := func(at string) map[string]string {
		out := map[string]string{}
		for name, e := range d {
			out[at+name] = e
		}
		return out
	}
	with := func(all ...map[string]string) map[string]string {
		out := map[string]string{}
		for _, m := range all {
			maps.Copy(out, m)
		}
		return out
	}
	const f, g = "- 0644 0:0 F", "- 0644 0:0 G"
	for _, c := range []struct {
		text string
		want map[string]string
	}{
		{"COPY f /z", map[string]string{"z": f}},
		{"COPY f /z/", map[string]string{"z": dir, "z/f": f}},
		{"COPY f /z/.", map[string]string{"z": dir, "z/f": f}},
		{"COPY f /n1/n2/z", map[string]string{"n1": dir, "n1/n2": dir, "n1/n2/z": f}},
		{"WORKDIR /k\nCOPY f sub/", map[string]string{"k": dir, "k/sub": dir, "k/sub/f": f}},
		{"COPY d /z", under("z")},
		{"COPY d/ /z/", under("z")},
		{"COPY sd /z", under("z")},
		{"COPY sl /z", map[string]string{"z": f}},
		{"COPY abs /z", map[string]string{"z": x}},
		{"COPY up /z", map[string]string{"z": f}}, // as if the context were the root
		{"COPY --chown=3:4 --chmod=711 n /z/d\nCOPY --parents d/x /z/", map[string]string{
			"z": "d 0711 3:4 ", "z/d": "d 0700 3:4 ", "z/d/f": "- 0711 3:4 NF", "z/d/g": "- 0711 3:4 NG", "z/d/x": x,
		}},
		{"COPY d /z\nFROM scratch\nCOPY --from=0 /z /z\nCOPY --from=0 / /\n", under("z")},
		{"COPY ../f /../z", map[string]string{"z": f}},
		{"COPY f g /z", map[string]string{"z": g}},
		{"COPY f g /z/", map[string]string{"z": dir, "z/f": f, "z/g": g}},
		{"COPY ? /z/", with(under("z"), map[string]string{
			"z/f": "- 0644 0:0 NF", "z/g": "- 0644 0:0 NG", // d, f, g and n; directories give their contents
		})},
		{"COPY a[[]0].txt /z", map[string]string{"z": "- 0644 0:0 odd"}},
		{"COPY nope* /z/", map[string]string{}},
		{"COPY d/* /z/", map[string]string{"z": dir, "z/x": x, "z/h": x, "z/.dot": dot, "z/lx": x, "z/y": y}},
		{"COPY */y /z/", map[string]string{}},
		{"COPY */*/y /z/", map[string]string{"z": dir, "z/y": y}},
		{"COPY d /z\nCOPY f /z/x", with(under("z"), map[string]string{"z/x": f})},
		{"COPY n /z/\nCOPY d /z/", with(under("z"), map[string]string{"z/f": "- 0644 0:0 NF", "z/g": "- 0644 0:0 NG"})},
		{"COPY d /real\nCOPY f /real/lx", with(under("real"), map[string]string{"real/x": f})},
		{"COPY --chmod=711 f /n/z", map[string]string{"n": "d 0711 0:0 ", "n/z": "- 0711 0:0 F"}},
		{"COPY --chmod=u=rwX,go=rX d/e /z", map[string]string{"z": dir, "z/y": y}},
		{"COPY --chmod=+x f /z", map[string]string{"z": "- 0755 0:0 F"}},
		{"COPY --chown=7 f /n/z", map[string]string{"n": "d 0755 7:7 ", "n/z": "- 0644 7:7 F"}},
		{"COPY --chown=:5 f /z", map[string]string{"z": "- 0644 0:5 F"}},
		{"COPY --parents d/e/y /z/", map[string]string{"z": dir, "z/d": "d 0700 0:0 ", "z/d/e": dir, "z/d/e/y": y}},
		{"COPY --parents ./d/./e/* /z/", map[string]string{"z": dir, "z/e": dir, "z/e/y": y}},
		{"COPY --parents [dfg]/./x /z/", map[string]string{"z": dir, "z/x": x}}, // a file is no pivot
		{"COPY --parents **/y /z/", map[string]string{"z": dir, "z/d": "d 0700 0:0 ", "z/d/e": dir, "z/d/e/y": y}},
		{"COPY --exclude=e --exclude=.* d /z", map[string]string{"z": dir, "z/x": x, "z/h": x, "z/lx": link}},
		{"COPY --exclude=g ? /z/", with(under("z"), map[string]string{"z/f": "- 0644 0:0 NF"})},
		{"COPY --link f /s/f", map[string]string{"s": dir, "s/f": f}},
		{"COPY <<A <<\"B\" /z/\na\nA\nb\nB", map[string]string{"z": dir, "z/A": "- 0644 0:0 a\n", "z/B": "- 0644 0:0 b\n"}},
	} {
		t.Run(c.text, func(t *testing.T) {
			b.t = t
			got := b.build("FROM scratch\n"+c.text+"\n", nil)
			sameListing(t, got, c.want)
		})
	}
}

func sameListing(t *testing.T, got, want map[string]string) {
	t.Helper()
	names := slices.Sorted(maps.Keys(want))
	for name := range got {
		if _, ok := want[name]; !ok {
			names = append(names, name)
		}
	}
	for _, name := range names {
		if got[name] != want[name] {
			t.Errorf("/%s: got %q, want %q", name, got[name], want[name])
		}
	}
}

func TestCopyRefused(t *testing.T) {
	b := newBench(t)
	copyContext(t, b)
	for _, c := range []struct{ text, want string }{
		{"COPY nope /z", `"/nope": not found`},
		{"COPY dead /z", `"/dead": not found`},
		{"COPY --parents nope /z/", `"/nope": not found`},
		{"COPY --parents sd/x /z/", `"/sd/x": not found`},
		{"COPY --parents --exclude=d d/x /z/", `"/d/x": not found`},
		{"COPY nope/* /z/", "lstat /nope: no such file"},
		{"COPY f /z\nCOPY d /z", "non-directory"},
		{"COPY f /z\nCOPY f /z/", "not a directory"},
		{"COPY d /z/x\nCOPY d /z", "cannot replace directory"},
		{"COPY --chown=nobody f /z", "no user"},
		{"COPY --chown=0:nogroup f /z", "no group"},
		{"COPY --chmod=999 f /z", "chmod"},
	} {
		err := b.try("FROM scratch\n"+c.text+"\n", nil, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got error %v, want one with %q", c.text, err, c.want)
		}
	}
}

// archive makes a tar of the headers given; regular files hold their own name.
func archive(t *testing.T, headers ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range headers {
		h.ModTime = time.Unix(1000, 0)
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(h.Name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestAddArchive(t *testing.T) {
	b := newBench(t)
	hostile := archive(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700},
		tar.Header{Name: "../../up", Typeflag: tar.TypeReg, Mode: 0o640, Uid: 7, Gid: 8},
		tar.Header{Name: "/abs", Typeflag: tar.TypeReg, Mode: 0o4755},
		tar.Header{Name: "etc", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "/etc"},
		tar.Header{Name: "out/passwd", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "abs", Mode: 0o4755},
		tar.Header{Name: "twice", Typeflag: tar.TypeReg, Mode: 0o600},
		tar.Header{Name: "twice", Typeflag: tar.TypeDir, Mode: 0o711},
	)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(hostile)
	z.Close()
	b.file("plain", string(hostile))
	b.file("zipped", zipped.String())
	b.file("text.tar", "no tar")
	b.file("empty.tar", string(archive(t)))
	inside := map[string]string{
		"q": "d 0755 0:0 ", "q/up": "- 0640 7:8 ../../up", "q/abs": "- 4755 0:0 /abs", "q/hard": "- 4755 0:0 /abs",
		"q/out": "l 0777 0:0 /etc", "q/etc": "d 0755 0:0 ", "q/etc/passwd": "- 0644 0:0 out/passwd", "q/twice": "d 0711 0:0 ",
	}
	sameListing(t, b.build("FROM scratch\nADD plain /q\n", nil), inside)
	sameListing(t, b.build("FROM scratch\nADD zipped /q/\n", nil), inside)
	sameListing(t, b.build("FROM scratch\nADD text.tar /q\n", nil), map[string]string{"q": "- 0644 0:0 no tar"})
	if got := b.build("FROM scratch\nADD empty.tar /q\n", nil)["q"]; !strings.HasPrefix(got, "- 0644") {
		t.Errorf("an empty archive: got %q, want a file", got)
	}
	if got := b.build("FROM scratch\nADD --unpack=false plain /q\n", nil)["q"]; !strings.HasPrefix(got, "- 0644") {
		t.Errorf("--unpack=false: got %q, want a file", got)
	}
}

func TestAddArchiveLinks(t *testing.T) {
	b := newBench(t)
	b.file("first", string(archive(t,
		tar.Header{Name: "old", Typeflag: tar.TypeReg, Mode: 0o600},
		tar.Header{Name: "gone", Typeflag: tar.TypeSymlink, Linkname: "nowhere"},
		tar.Header{Name: "file", Typeflag: tar.TypeReg, Mode: 0o644},
	)))
	b.file("links", string(archive(t,
		tar.Header{Name: "/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 4},
		tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o755, Uid: 5},
		tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: "a", Mode: 0o640, Uid: 6},
		tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o711},
		tar.Header{Name: "c", Typeflag: tar.TypeLink, Linkname: "b", Mode: 0o640, Uid: 6},
		tar.Header{Name: "d", Typeflag: tar.TypeLink, Linkname: "old", Mode: 0o604},
		tar.Header{Name: "e", Typeflag: tar.TypeLink, Linkname: "gone", Mode: 0o604, Uid: 7},
		tar.Header{Name: "f", Typeflag: tar.TypeFifo, Mode: 0o600},
		tar.Header{Name: "g", Typeflag: tar.TypeLink, Linkname: "f", Mode: 0o620},
	)))
	sameListing(t, b.build("FROM scratch\nADD first links /q/\n", nil), map[string]string{
		"q": "d 0700 4:0 ", "q/a": "- 0711 0:0 a", "q/b": "- 0640 6:0 a", "q/c": "- 0640 6:0 a", "q/d": "- 0604 0:0 old",
		"q/old": "- 0604 0:0 old", "q/gone": "l 0777 7:0 nowhere", "q/e": "l 0777 7:0 nowhere",
		"q/f": "p 0620 0:0 ", "q/g": "p 0620 0:0 ", "q/file": "- 0644 0:0 file",
	})
	for name, h := range map[string]tar.Header{
		"missing":  {Name: "x", Typeflag: tar.TypeLink, Linkname: "no"},
		"itself":   {Name: "old", Typeflag: tar.TypeLink, Linkname: "old"},
		"dangling": {Name: "gone/x", Typeflag: tar.TypeReg},
		"deeper":   {Name: "gone/y/x", Typeflag: tar.TypeReg},
		"in file":  {Name: "file/x", Typeflag: tar.TypeReg},
	} {
		b.file("bad", string(archive(t, h)))
		if err := b.try("FROM scratch\nADD first bad /q/\n", nil, nil); err == nil {
			t.Errorf("%s: unpacked", name)
		}
	}
}

// A file that changes between its digest and its copy must not end up in an image under the old key.
func TestStaleSources(t *testing.T) {
	b := newBench(t)
	b.file("f", "one")
	const text = "FROM scratch\nCOPY f /f\n"
	when := time.Unix(1_700_000_000, 0)
	at := filepath.Join(b.context, "f")
	for _, content := range []string{"one", "two", "six"} {
		if err := os.WriteFile(at, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(at, when, when); err != nil { // same size, same mtime
			t.Fatal(err)
		}
		if got := b.build(text, nil)["f"]; got != "- 0644 0:0 "+content {
			t.Errorf("got %q, want the text %q", got, content)
		}
	}
}

func TestCopyAgain(t *testing.T) {
	b := newBench(t)
	copyContext(t, b)
	var again layer.Layer
	err := b.try("FROM scratch AS a\nCOPY d /z\nFROM scratch\nCOPY --from=a / /\nCOPY --from=a /z /z\n", nil, func(_ *layer.Store, img *image.Image) {
		again = img.Layers[len(img.Layers)-1]
	})
	if err != nil {
		t.Fatal(err)
	}
	const empty = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
	if again.DiffID != empty {
		t.Errorf("copying the same files again makes layer %s, want an empty one", again.DiffID)
	}
}
