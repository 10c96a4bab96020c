package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

// layerTar writes one layer of a base image.
type layerTar struct {
	*tar.Writer
	buf bytes.Buffer
}

func newLayerTar() *layerTar {
	l := &layerTar{}
	l.Writer = tar.NewWriter(&l.buf)
	return l
}

func (l *layerTar) add(h tar.Header, content []byte) error {
	h.Size, h.ModTime = int64(len(content)), time.Unix(1700000000, 0)
	if err := l.WriteHeader(&h); err != nil {
		return err
	}
	_, err := l.Write(content)
	return err
}

func (l *layerTar) dir(name string, mode int64) error {
	return l.add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, nil)
}

func (l *layerTar) file(name string, mode int64, content []byte) error {
	return l.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, content)
}

// shell is the layer of a shell and the files that builders would add where they are missing.
func shell(scratch string) (*layerTar, error) {
	program, err := staticShell(scratch)
	if err != nil {
		return nil, err
	}
	l := newLayerTar()
	for _, d := range []string{"bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "var"} {
		mode := int64(0o755)
		if d == "tmp" {
			mode = 0o1777
		}
		err = errors.Join(err, l.dir(d, mode))
	}
	for name, text := range map[string]string{"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n"} {
		err = errors.Join(err, l.file("etc/"+name, 0o644, []byte(text)))
	}
	for _, name := range []string{"etc/hosts", "etc/resolv.conf", "etc/hostname"} {
		err = errors.Join(err, l.file(name, 0o644, nil))
	}
	err = errors.Join(err, l.file("bin/busybox", 0o755, program))
	for _, name := range []string{"sh", "true", "echo", "cat", "mkdir", "sleep", "ls", "cp"} {
		err = errors.Join(err, l.add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777}, nil))
	}
	return l, err
}

// staticShell is the machine's busybox if it is static, else this project's toybox.
func staticShell(scratch string) ([]byte, error) {
	if path, err := exec.LookPath("busybox"); err == nil {
		b, err := os.ReadFile(path)
		if err == nil && !bytes.Contains(b[:min(len(b), 4096)], []byte("/ld-")) { // no dynamic loader is named
			return b, nil
		}
	}
	path := filepath.Join(scratch, "toybox")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./testdata/toybox")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build toybox: %w: %s", err, out)
	}
	return os.ReadFile(path)
}

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
	Manifests     []descriptor `json:"manifests,omitempty"`
}

const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// putImage puts an image of layers into r as name:latest.
func (r *registry) putImage(name string, layers []*layerTar) error {
	m := manifest{SchemaVersion: 2, MediaType: manifestType}
	var diffIDs []string
	var history []map[string]string // buildah wants a line for each layer
	for _, l := range layers {
		if err := l.Close(); err != nil {
			return err
		}
		sum := sha256.Sum256(l.buf.Bytes())
		diffIDs = append(diffIDs, "sha256:"+hex.EncodeToString(sum[:]))
		history = append(history, map[string]string{"created_by": "bench"})
		var z bytes.Buffer
		g := gzip.NewWriter(&z)
		if _, err := g.Write(l.buf.Bytes()); err != nil {
			return err
		}
		if err := g.Close(); err != nil {
			return err
		}
		d, err := r.put(z.Bytes())
		if err != nil {
			return err
		}
		m.Layers = append(m.Layers, descriptor{layerType, d, int64(z.Len())})
	}
	config, err := json.Marshal(map[string]any{
		"os": "linux", "architecture": runtime.GOARCH, "config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"/bin/sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}, "history": history,
	})
	if err != nil {
		return err
	}
	d, err := r.put(config)
	if err != nil {
		return err
	}
	m.Config = descriptor{configType, d, int64(len(config))}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if d, err = r.put(b); err != nil {
		return err
	}
	return os.WriteFile(r.tagPath(name, "latest"), []byte(d), 0o644)
}
