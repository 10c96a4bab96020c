package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"filo/builder/source"
	"filo/cache"
	"filo/layer"
	"filo/layer/registry"
)

// yard is a build context whose files get changed behind the cache's back.
type yard struct {
	t      testing.TB
	dir    string
	ignore []string
	ahead  time.Duration // of the cache's clock
	wrap   func(fs.FS) fs.FS
}

func (y *yard) path(name string) string { return filepath.Join(y.dir, name) }

func (y *yard) must(errs ...error) {
	y.t.Helper()
	if err := errors.Join(errs...); err != nil {
		y.t.Fatal(err)
	}
}

func (y *yard) write(name, text string) {
	y.t.Helper()
	y.must(os.WriteFile(y.path(name), []byte(text), 0o644))
}

// quietly changes files and sets the times of name back to what they were.
func (y *yard) quietly(name string, change func()) {
	y.t.Helper()
	fi, err := os.Stat(y.path(name))
	y.must(err)
	change()
	y.must(os.Chtimes(y.path(name), fi.ModTime(), fi.ModTime()))
}

// beside writes a file that is not in the context, with the times of name, and returns its path.
func (y *yard) beside(name, text string) string {
	y.t.Helper()
	fi, err := os.Stat(y.path(name))
	y.must(err)
	p := filepath.Join(y.t.TempDir(), "file")
	y.must(os.WriteFile(p, []byte(text), fi.Mode().Perm()), os.Chtimes(p, fi.ModTime(), fi.ModTime()))
	return p
}

// build copies the whole context and returns what is in the image, without times, and how many steps were hits.
func (y *yard) build(state string) (files map[string]string, hits int, err error) {
	y.t.Helper()
	store, err := layer.Open(state, layer.Options{SingleID: os.Geteuid() != 0})
	y.must(err)
	defer store.Close()
	temp, err := store.Temp("cache-")
	y.must(err)
	c, err := cache.Open(state, temp, func() time.Time { return time.Now().Add(y.ahead) })
	y.must(err)
	src, err := source.Open(y.t.Context(), y.dir, source.Options{Temp: temp})
	y.must(err)
	defer src.Close()
	from := src.FS
	if y.wrap != nil {
		from = y.wrap(from)
	}
	from, err = source.Ignore(from, y.ignore)
	y.must(err)
	var mu sync.Mutex
	b := &Builder{Store: store, Cache: c, Registry: registry.Open(registry.Options{}), Now: time.Now, Emit: func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.State == Cached {
			hits++
		}
	}}
	req := Request{File: []byte("FROM scratch\nCOPY . /all/\nCOPY d* /some/\n"), FileName: "Dockerfile", Context: from, Root: src.Root}
	res, err := b.Build(y.t.Context(), req)
	if err != nil {
		return nil, hits, err
	}
	v, err := store.View(context.Background(), res.Images[0].Layers)
	y.must(err)
	files = map[string]string{}
	first := map[string]string{} // name of an inode
	y.must(fs.WalkDir(v, ".", func(name string, d fs.DirEntry, err error) error {
		if e, ok := v.Entry(name); ok && name != "." {
			inode := v.Inode(name)
			first[inode] = cmp.Or(first[inode], name)
			files[name] = fmt.Sprintf("%c %o %d:%d %d %s %q %q as %s", e.Type, e.Mode, e.UID, e.GID, e.Size, e.Digest, e.Link, e.Xattrs, first[inode])
		}
		return err
	}))
	return files, hits, nil
}

// trap is a change that a cache of digests may miss. alike says that the image is the same after it.
type trap struct {
	name   string
	change func(y *yard)
	alike  bool
}

// traps change the context that plant makes.
func traps() []trap {
	return []trap{
		{"same size and mtime", func(y *yard) { y.quietly("a", func() { y.write("a", "AAAA") }) }, false},
		{"part written anew, same size and mtime", func(y *yard) {
			y.quietly("a", func() {
				f, err := os.OpenFile(y.path("a"), os.O_WRONLY, 0)
				y.must(err)
				_, err = f.WriteAt([]byte("Z"), 2)
				y.must(err, f.Close())
			})
		}, false},
		{"written through memory, same size and mtime", func(y *yard) {
			y.quietly("a", func() {
				f, err := os.OpenFile(y.path("a"), os.O_RDWR, 0)
				y.must(err)
				b, err := syscall.Mmap(int(f.Fd()), 0, 4, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
				y.must(err)
				copy(b, "mmap")
				y.must(syscall.Munmap(b), f.Close())
			})
		}, false},
		{"replaced by rename, same size and mtime", func(y *yard) { y.must(os.Rename(y.beside("a", "BBBB"), y.path("a"))) }, false},
		{"removed and made again, same size and mtime", func(y *yard) {
			y.quietly("a", func() { y.must(os.Remove(y.path("a"))); y.write("a", "CCCC") })
		}, false},
		{"mtime set back", func(y *yard) {
			y.write("a", "DDDD")
			y.must(os.Chtimes(y.path("a"), time.Unix(1, 0), time.Unix(1, 0)))
		}, false},
		{"mtime in the future", func(y *yard) {
			y.write("a", "EEEE")
			later := time.Now().Add(48 * time.Hour)
			y.must(os.Chtimes(y.path("a"), later, later))
		}, false},
		{"clock set back", func(y *yard) { y.ahead = -24 * time.Hour; y.write("a", "FFFF") }, false},
		{"clock set back, same size and mtime", func(y *yard) {
			y.ahead = -24 * time.Hour
			y.quietly("a", func() { y.write("a", "GGGG") })
		}, false},
		{"older file put back with its mtime", func(y *yard) {
			p := y.beside("a", "HHHH")
			y.must(os.Chtimes(p, time.Unix(1e9, 0), time.Unix(1e9, 0)), os.Rename(p, y.path("a")))
		}, false},
		{"grown", func(y *yard) { y.write("a", "aaaaaaaa") }, false},
		{"grown, same mtime", func(y *yard) { y.quietly("a", func() { y.write("a", "aaaaaaaa") }) }, false},
		{"emptied", func(y *yard) { y.must(os.Truncate(y.path("a"), 0)) }, false},
		{"cut and lengthened, same size and mtime", func(y *yard) {
			y.quietly("a", func() { y.must(os.Truncate(y.path("a"), 1), os.Truncate(y.path("a"), 4)) })
		}, false},
		{"zeros for a hole", func(y *yard) {
			y.quietly("zeros", func() { y.must(os.Truncate(y.path("zeros"), 0), os.Truncate(y.path("zeros"), 8192)) })
		}, true},
		{"a byte in a hole", func(y *yard) {
			y.quietly("zeros", func() {
				f, err := os.OpenFile(y.path("zeros"), os.O_WRONLY, 0)
				y.must(err)
				_, err = f.WriteAt([]byte{1}, 5000)
				y.must(err, f.Close())
			})
		}, false},
		{"contents swapped by renames", func(y *yard) {
			y.must(os.Rename(y.path("a"), y.path("t")), os.Rename(y.path("b"), y.path("a")), os.Rename(y.path("t"), y.path("b")))
		}, false},
		{"swapped and swapped back", func(y *yard) {
			for range 2 {
				y.must(os.Rename(y.path("a"), y.path("t")), os.Rename(y.path("b"), y.path("a")), os.Rename(y.path("t"), y.path("b")))
			}
		}, true},
		{"touched", func(y *yard) { y.must(os.Chtimes(y.path("a"), time.Now(), time.Now())) }, true},
		{"renamed", func(y *yard) { y.must(os.Rename(y.path("a"), y.path("c"))) }, false},
		{"another case", func(y *yard) { y.must(os.Rename(y.path("a"), y.path("A"))) }, false},
		{"directory in another case", func(y *yard) { y.must(os.Rename(y.path("d"), y.path("D"))) }, false},
		{"removed", func(y *yard) { y.must(os.Remove(y.path("a"))) }, false},
		{"added", func(y *yard) { y.write("new", "") }, false},
		{"added where a wildcard matches", func(y *yard) { y.write("dx", "") }, false},
		{"empty directory added", func(y *yard) { y.must(os.Mkdir(y.path("d/empty"), 0o755)) }, false},
		{"file for directory", func(y *yard) { y.must(os.RemoveAll(y.path("d"))); y.write("d", "") }, false},
		{"directory for file", func(y *yard) { y.must(os.Remove(y.path("a")), os.Mkdir(y.path("a"), 0o755)) }, false},
		{"fifo for file", func(y *yard) { y.must(os.Remove(y.path("a")), syscall.Mkfifo(y.path("a"), 0o644)) }, false},
		{"directory replaced, same sizes and mtimes", func(y *yard) {
			p := y.beside("d/f", "DIR?")
			y.must(os.Rename(y.path("d"), filepath.Join(y.t.TempDir(), "old")), os.Mkdir(y.path("d"), 0o755), os.Rename(p, y.path("d/f")))
		}, false},
		{"mode", func(y *yard) { y.must(os.Chmod(y.path("a"), 0o755)) }, false},
		{"setgid", func(y *yard) { y.must(os.Chmod(y.path("a"), 0o644|fs.ModeSetgid)) }, false},
		{"mode of a directory", func(y *yard) { y.must(os.Chmod(y.path("d"), 0o700)) }, false},
		{"mode there and back", func(y *yard) { y.must(os.Chmod(y.path("a"), 0o600), os.Chmod(y.path("a"), 0o644)) }, true},
		{"link to another file, same length", func(y *yard) {
			y.must(os.Remove(y.path("link")), os.Symlink("b", y.path("link")))
		}, false},
		{"file for link, same content", func(y *yard) { y.must(os.Remove(y.path("link"))); y.write("link", "aaaa") }, false},
		{"link for file", func(y *yard) { y.must(os.Remove(y.path("b")), os.Symlink("a", y.path("b"))) }, false},
		{"target of a link changed", func(y *yard) { y.quietly("a", func() { y.write("link", "IIII") }) }, false},
		{"link to a directory for the directory", func(y *yard) {
			y.must(os.Rename(y.path("d"), y.path("e")), os.Symlink("e", y.path("d")))
		}, false},
		{"written by its other name", func(y *yard) { y.quietly("hard1", func() { y.write("hard2", "JJJJ") }) }, false},
		{"written by a name outside", func(y *yard) {
			p := filepath.Join(filepath.Dir(y.dir), "outside")
			y.quietly("a", func() { y.must(os.Link(y.path("a"), p), os.WriteFile(p, []byte("KKKK"), 0o644), os.Remove(p)) })
		}, false},
		{"hard links parted", func(y *yard) { y.must(os.Rename(y.beside("hard1", "hard"), y.path("hard2"))) }, false},
		{"hard link made of a copy", func(y *yard) {
			y.must(os.Remove(y.path("copy")), os.Link(y.path("a"), y.path("copy")))
		}, false},
		{"extended attribute", func(y *yard) {
			if err := syscall.Setxattr(y.path("a"), "user.x", []byte("1"), 0); err != nil {
				y.t.Skip("set an extended attribute:", err)
			}
		}, true}, // contexts carry none
		{"ignored now", func(y *yard) { y.ignore = []string{"b"} }, false},
		{"ignored no more", func(y *yard) { y.ignore = nil; y.write(".keep", "") }, false},
		{"ignored but for one", func(y *yard) { y.ignore = []string{"secret", "d/*", "!d/f"} }, true},
		{"ignored file changed", func(y *yard) { y.write("secret", "other") }, true},
		{"moved out of what is ignored", func(y *yard) { y.must(os.Rename(y.path("secret"), y.path("open"))) }, false},
	}
}

func plant(t testing.TB) *yard {
	y := &yard{t: t, dir: filepath.Join(t.TempDir(), "context"), ignore: []string{"secret"}}
	y.must(os.MkdirAll(y.path("d"), 0o755))
	for name, text := range map[string]string{
		"a": "aaaa", "b": "bbbb", "copy": "aaaa", "d/f": "dddd", "hard1": "hard", "secret": "s", "zeros": strings.Repeat("\x00", 8192),
	} {
		y.write(name, text)
	}
	y.must(os.Symlink("a", y.path("link")), os.Link(y.path("hard1"), y.path("hard2")))
	return y
}

// TestStale springs every trap twice: right after the build, when the cache may not trust what it saw, and when it does
// trust, because its clock says that all files are old.
func TestStale(t *testing.T) {
	for _, tr := range traps() {
		for _, age := range []string{"young", "old"} {
			t.Run(tr.name+"/"+age, func(t *testing.T) {
				t.Parallel()
				y := plant(t)
				if age == "old" {
					y.ahead = time.Hour
				}
				state := t.TempDir()
				before, _, err := y.build(state)
				y.must(err)
				if same, hits, err := y.build(state); err != nil || hits != 2 || !gocmp.Equal(before, same) {
					t.Fatalf("nothing changed: %d hits, %v, %s", hits, err, gocmp.Diff(before, same))
				}
				if age == "old" {
					time.Sleep(20 * time.Millisecond) // a tick of the slowest kernel's clock: that a file changed twice within one is what margin is for
				}
				tr.change(y)
				got, _, err := y.build(state)
				y.must(err)
				want, _, err := y.build(t.TempDir())
				y.must(err)
				if diff := gocmp.Diff(want, got); diff != "" {
					t.Errorf("stale image: %s", diff)
				}
				if alike := gocmp.Equal(before, want); alike != tr.alike {
					t.Errorf("images before and after are alike: %v, want %v", alike, tr.alike)
				}
			})
		}
	}
}

// meddling changes the file a each time it is opened, as often as told.
type meddling struct {
	fs.FS
	y     *yard
	times int
	how   func(n int)
	mu    *sync.Mutex
}

func (m *meddling) Open(name string) (fs.File, error) {
	m.mu.Lock()
	if name == "a" && m.times > 0 {
		m.times--
		m.how(m.times)
	}
	m.mu.Unlock()
	return m.FS.Open(name)
}

func (m *meddling) ReadDir(name string) ([]fs.DirEntry, error) { return fs.ReadDir(m.FS, name) }
func (m *meddling) ReadLink(name string) (string, error)       { return fs.ReadLink(m.FS, name) }
func (m *meddling) Lstat(name string) (fs.FileInfo, error)     { return fs.Lstat(m.FS, name) }

// TestStaleWhileRead changes a file between being seen, hashed and copied.
func TestStaleWhileRead(t *testing.T) {
	hows := map[string]func(y *yard, n int){
		"grows":              func(y *yard, n int) { y.write("a", strings.Repeat("a", 10+n)) },
		"grows, same mtime":  func(y *yard, n int) { y.quietly("a", func() { y.write("a", strings.Repeat("a", 10+n)) }) },
		"shrinks":            func(y *yard, n int) { y.write("a", strings.Repeat("a", n%3)) },
		"same size":          func(y *yard, n int) { y.write("a", fmt.Sprintf("%4d", n)) },
		"same size and time": func(y *yard, n int) { y.quietly("a", func() { y.write("a", fmt.Sprintf("%4d", n)) }) },
		"replaced":           func(y *yard, n int) { y.must(os.Rename(y.beside("a", fmt.Sprintf("%4d", n)), y.path("a"))) },
	}
	for name, how := range hows {
		for _, times := range []int{1, 2, 3, 1000} {
			t.Run(fmt.Sprintf("%s/%d times", name, times), func(t *testing.T) {
				y := plant(t)
				y.ahead = time.Hour
				state := t.TempDir()
				y.wrap = func(f fs.FS) fs.FS {
					return &meddling{FS: f, y: y, times: times, how: func(n int) { how(y, n) }, mu: &sync.Mutex{}}
				}
				_, _, err := y.build(state)
				if err != nil && !errors.Is(err, layer.ErrChanged) {
					t.Fatal(err)
				}
				if times == 1000 && err == nil {
					t.Error("a file that never rests was copied")
				}
				y.wrap = nil
				got, _, err := y.build(state)
				want, _, err2 := y.build(t.TempDir())
				y.must(cmp.Or(err, err2))
				if diff := gocmp.Diff(want, got); diff != "" {
					t.Errorf("stale image afterwards: %s", diff)
				}
			})
		}
	}
}
