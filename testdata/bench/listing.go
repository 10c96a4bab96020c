package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// listLayout lists the image in the OCI layout that k made.
func listLayout(k task, to string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.out, "index.json"))
	if err != nil {
		return "", err
	}
	var m manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return "", err
	}
	if len(m.Manifests) != 1 {
		return "", fmt.Errorf("%d images in %s", len(m.Manifests), k.out)
	}
	return list(k.out, m.Manifests[0].Digest, to)
}

// list writes one line for each file of an image's root file system to a file, sorted, and returns the digest of all:
// type, mode, owner, size, content, link, but no times. dir keeps the blobs.
func list(dir, digest, to string) (string, error) {
	m, err := readManifest(dir, digest)
	if err != nil {
		return "", err
	}
	files := map[string]string{}
	for _, l := range m.Layers {
		if err := applyBlob(blobPath(dir, l.Digest), files); err != nil {
			return "", fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	var lines []string
	for name, what := range files {
		lines = append(lines, name+" "+what+"\n")
	}
	slices.Sort(lines)
	text := strings.Join(lines, "")
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:]), os.WriteFile(to, []byte(text), 0o644)
}

// readManifest reads a manifest, or the one of an index, attestations left out.
func readManifest(dir, digest string) (manifest, error) {
	var m manifest
	b, err := os.ReadFile(blobPath(dir, digest))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil || len(m.Manifests) == 0 {
		return m, err
	}
	return readManifest(dir, m.Manifests[0].Digest)
}

func applyBlob(path string, files map[string]string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 1<<20)
	magic, err := in.Peek(2)
	if err != nil {
		return err
	}
	if magic[0] != 0x1f || magic[1] != 0x8b {
		return apply(tar.NewReader(in), files)
	}
	z, err := gzip.NewReader(in)
	if err != nil {
		return err
	}
	return apply(tar.NewReader(z), files)
}

// apply puts a layer on files.
func apply(t *tar.Reader, files map[string]string) error {
	var gone []string
	added := map[string]string{}
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		dir, base := path.Split(name)
		if base == ".wh..wh..opq" {
			gone = append(gone, dir)
			continue
		}
		if of, ok := strings.CutPrefix(base, ".wh."); ok {
			gone = append(gone, dir+of, dir+of+"/")
			continue
		}
		what := fmt.Sprintf("%c %o %d:%d", h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid)
		switch h.Typeflag {
		case tar.TypeReg:
			sum := sha256.New()
			if _, err := io.Copy(sum, t); err != nil {
				return err
			}
			what += fmt.Sprintf(" %d %x", h.Size, sum.Sum(nil))
		case tar.TypeSymlink:
			what = "symlink to " + h.Linkname
		case tar.TypeLink:
			what = added[path.Clean("/"+h.Linkname)]
		case tar.TypeChar, tar.TypeBlock:
			what += fmt.Sprintf(" %d:%d", h.Devmajor, h.Devminor)
		}
		added[name] = what
	}
	for _, g := range gone {
		for name := range files {
			if name == g || strings.HasSuffix(g, "/") && strings.HasPrefix(name, g) {
				delete(files, name)
			}
		}
	}
	for name, what := range added {
		files[name] = what
	}
	delete(files, "/")
	return nil
}
