package main

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"
)

// floorRun is the least that one namespaced process on an overlay costs: clone with new namespaces, mount, execute,
// wait, throw the upper away. It is 0 where that is not allowed.
func floorRun(dir string) time.Duration {
	const rounds = 20
	root := filepath.Join(dir, "floor")
	defer os.RemoveAll(root)
	if err := os.MkdirAll(filepath.Join(root, "lower", "dev"), 0o755); err != nil {
		return 0
	}
	begin := time.Now()
	for range rounds {
		for _, sub := range []string{"upper", "work", "merged"} {
			if os.Mkdir(filepath.Join(root, sub), 0o755) != nil {
				return 0
			}
		}
		cmd := exec.Command("true")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS}
		merged := filepath.Join(root, "merged")
		options := "lowerdir=" + filepath.Join(root, "lower") + ",upperdir=" + filepath.Join(root, "upper") + ",workdir=" + filepath.Join(root, "work")
		if syscall.Mount("overlay", merged, "overlay", 0, options) != nil {
			return 0
		}
		err := cmd.Run()
		_ = syscall.Unmount(merged, 0)
		if err != nil {
			return 0
		}
		for _, sub := range []string{"upper", "work", "merged"} {
			_ = os.RemoveAll(filepath.Join(root, sub))
		}
	}
	return time.Since(begin) / rounds
}

// floorWalk is what it takes to list dir and stat each file, side by side.
func floorWalk(dir string) time.Duration {
	return least(func() { each(dir, func() func(block) { return func(block) {} }) })
}

// floorCopy is what it takes to read, hash and compress the files of dir with all cores. A layer has two digests of
// what is read, the file's and the tar's, and one of what is written; the least that could do it needs all three.
func floorCopy(dir string) time.Duration {
	return least(func() { each(dir, digester) })
}

// floorScript is what a script takes that writes below /out, as a program of this machine in an ordinary directory. It is
// 0 where there is no busybox.
func floorScript(dir, script string) time.Duration {
	shell, err := exec.LookPath("busybox")
	if err != nil {
		return 0
	}
	top, n := filepath.Join(dir, "floor"), 0
	defer os.RemoveAll(top)
	return least(func() {
		n++
		_ = exec.Command(shell, "sh", "-c", strings.ReplaceAll(script, "/out/", fmt.Sprintf("%s/%d/", top, n))).Run()
	})
}

// floorPull is what it takes to unpack the layers of an image, side by side: each blob is read, hashed and decompressed,
// its tar hashed, and each file written; the least that could be trusted needs both digests.
func floorPull(registry, digest, dir string) time.Duration {
	m, err := readManifest(registry, digest)
	if err != nil {
		return 0
	}
	top, n := filepath.Join(dir, "floor"), 0
	defer os.RemoveAll(top)
	return least(func() {
		n++
		var g sync.WaitGroup
		for i, l := range m.Layers {
			g.Go(func() { _ = unpackBlob(blobPath(registry, l.Digest), fmt.Sprintf("%s/%d/%d", top, n, i)) })
		}
		g.Wait()
	})
}

func unpackBlob(blob, to string) error {
	f, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(io.TeeReader(bufio.NewReaderSize(f, blockSize), sha256.New()))
	if err != nil {
		return err
	}
	t := tar.NewReader(io.TeeReader(z, sha256.New()))
	for {
		h, err := t.Next()
		if err != nil {
			return err // at best io.EOF
		}
		name := filepath.Join(to, filepath.FromSlash(path.Clean("/"+h.Name)))
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		case tar.TypeReg:
			err = writeFile(name, t)
		}
		if err != nil {
			return err
		}
	}
}

func writeFile(name string, content io.Reader) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}

// digester returns what reads, hashes and compresses one block after the other.
func digester() func(block) {
	z, err := flate.NewWriter(nil, 6)
	if err != nil {
		panic(err) // the level is a constant
	}
	buf := make([]byte, blockSize)
	return func(b block) {
		f, err := os.Open(b.path)
		if err != nil {
			return
		}
		defer f.Close()
		z.Reset(sha256.New())
		_, _ = io.CopyBuffer(onlyWriter{io.MultiWriter(sha256.New(), sha256.New(), z)}, io.NewSectionReader(f, b.at, blockSize), buf)
		_ = z.Close()
	}
}

// onlyWriter keeps io.Copy from finding shortcuts.
type onlyWriter struct{ io.Writer }

// least is the shortest of three times.
func least(do func()) time.Duration {
	best := time.Duration(0)
	for range 3 {
		begin := time.Now()
		do()
		if took := time.Since(begin); best == 0 || took < best {
			best = took
		}
	}
	return best
}

// block is a piece of a file.
type block struct {
	path string
	at   int64
}

const blockSize = 1 << 20

// each calls visit for every block of every file below dir, side by side, on each core with a visitor of its own.
func each(dir string, visitor func() func(block)) {
	work := make(chan block, 1024)
	var g sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() {
			visit := visitor()
			for b := range work {
				visit(b)
			}
		})
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		for at := int64(0); at < max(info.Size(), 1); at += blockSize {
			work <- block{path, at}
		}
		return nil
	})
	close(work)
	g.Wait()
}
