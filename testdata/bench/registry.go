package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
)

// registry is a registry on a loopback port. It keeps blobs and manifests like an OCI layout, and tags beside them.
type registry struct {
	Host     string // host:port
	dir      string
	requests atomic.Int64
	uploads  atomic.Int64
	server   *http.Server
}

func serve(dir string) (*registry, error) {
	for _, sub := range []string{"blobs/sha256", "tags", "uploads"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &registry{Host: l.Addr().String(), dir: dir}
	r.server = &http.Server{Handler: r}
	go r.server.Serve(l)
	return r, nil
}

func (r *registry) Close() error { return r.server.Close() }

func blobPath(dir, digest string) string {
	return filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
}

func (r *registry) tagPath(name, tag string) string {
	return filepath.Join(r.dir, "tags", strings.ReplaceAll(name, "/", "_")+":"+tag)
}

// put stores b and returns its digest.
func (r *registry) put(b []byte) (string, error) {
	sum := sha256.Sum256(b)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	return digest, os.WriteFile(blobPath(r.dir, digest), b, 0o644)
}

// tagged returns the digest that a tag names.
func (r *registry) tagged(name, tag string) (string, error) {
	b, err := os.ReadFile(r.tagPath(name, tag))
	return string(b), err
}

var route = regexp.MustCompile(`^/v2/([a-z0-9/._-]+)/(blobs|manifests)/([A-Za-z0-9:._/-]*)$`)

var isDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.requests.Add(1)
	if q.URL.Path == "/v2/" {
		return
	}
	m := route.FindStringSubmatch(q.URL.Path)
	if m == nil {
		http.NotFound(w, q)
		return
	}
	name, kind, ref := m[1], m[2], m[3]
	var err error
	switch {
	case q.Method == http.MethodGet || q.Method == http.MethodHead:
		err = r.get(w, q, name, kind, ref)
	case kind == "manifests" && q.Method == http.MethodPut:
		err = r.putManifest(w, q, name, ref)
	default:
		err = r.upload(w, q, name, ref)
	}
	if errors.Is(err, os.ErrNotExist) {
		http.NotFound(w, q)
	} else if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (r *registry) get(w http.ResponseWriter, q *http.Request, name, kind, ref string) (err error) {
	digest := ref
	if kind == "manifests" && !isDigest.MatchString(ref) {
		if digest, err = r.tagged(name, ref); err != nil {
			return err
		}
	}
	if !isDigest.MatchString(digest) {
		return os.ErrNotExist
	}
	f, err := os.Open(blobPath(r.dir, digest))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Content-Type", "application/octet-stream")
	if kind == "manifests" {
		var m struct{ MediaType string }
		if err := json.NewDecoder(f).Decode(&m); err != nil {
			return err
		}
		w.Header().Set("Content-Type", m.MediaType)
	}
	http.ServeContent(w, q, "", info.ModTime(), f)
	return nil
}

func (r *registry) putManifest(w http.ResponseWriter, q *http.Request, name, ref string) error {
	b, err := io.ReadAll(io.LimitReader(q.Body, 8<<20))
	if err != nil {
		return err
	}
	digest, err := r.put(b)
	if err != nil {
		return err
	}
	if !isDigest.MatchString(ref) {
		if err := os.WriteFile(r.tagPath(name, ref), []byte(digest), 0o644); err != nil {
			return err
		}
	}
	w.Header().Set("Docker-Content-Digest", digest)
	w.WriteHeader(http.StatusCreated)
	return nil
}

// upload takes a blob: POST gives a place, PATCH and PUT append to it, a PUT with its digest ends it.
func (r *registry) upload(w http.ResponseWriter, q *http.Request, name, ref string) error {
	id, digest := filepath.Base(ref), q.URL.Query().Get("digest")
	if q.Method == http.MethodPost {
		id = fmt.Sprint(r.uploads.Add(1))
		if err := os.WriteFile(filepath.Join(r.dir, "uploads", id), nil, 0o644); err != nil {
			return err
		}
	}
	path := filepath.Join(r.dir, "uploads", id)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if _, err = io.Copy(f, q.Body); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	if digest == "" {
		w.Header().Set("Location", fmt.Sprintf("/v2/%s/blobs/uploads/%s", name, id))
		if info, err := os.Stat(path); err == nil && info.Size() > 0 {
			w.Header().Set("Range", fmt.Sprintf("0-%d", info.Size()-1))
		} else {
			w.Header().Set("Range", "0-0")
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	}
	if !isDigest.MatchString(digest) {
		return fmt.Errorf("digest %q", digest)
	}
	w.Header().Set("Docker-Content-Digest", digest)
	w.WriteHeader(http.StatusCreated)
	return os.Rename(path, blobPath(r.dir, digest))
}
