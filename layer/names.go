package layer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// index.json says which images there are; to lose it is to lose them all. So it is kept twice: index.copy is a line with
// the digest of what follows, and what follows is index.json as filo wrote it last. An index.json that is no JSON, or that
// has other bytes and not one more or less, was damaged and is restored from the copy; one of another length was written
// by some other tool, and counts.
const (
	indexJSON = ocispec.ImageIndexFile
	indexCopy = "index.copy"
)

const noImages = `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[]}`

// Names returns what index.json says: the images of the store. A damaged one is repaired.
func (s *Store) Names(ctx context.Context) (*ocispec.Index, error) {
	idx, whole, err := s.readNames()
	if err != nil {
		return nil, err
	}
	if whole {
		return idx, nil
	}
	err = s.ChangeNames(ctx, func(repaired *ocispec.Index) error { // nobody else is between two writes then
		idx = repaired
		return nil
	})
	return idx, err
}

// ChangeNames edits index.json; one process at a time does. When it returns, no power cut can undo the change. What is
// named must be [Store.Durable] before.
func (s *Store) ChangeNames(ctx context.Context, edit func(*ocispec.Index) error) error {
	unlock, err := s.Lock(ctx, indexJSON)
	if err != nil {
		return err
	}
	defer unlock()
	idx, whole, err := s.readNames()
	if err != nil {
		return err
	}
	if !whole {
		if err := s.salvage(); err != nil {
			return err
		}
	}
	if err := edit(idx); err != nil {
		return err
	}
	data, err := json.MarshalIndent(idx, "", "  ")
	if err != nil {
		return err
	}
	return s.putNames(ctx, data)
}

// readNames reads index.json, or its copy if it is damaged; then whole is false.
func (s *Store) readNames() (idx *ocispec.Index, whole bool, err error) {
	data, err := os.ReadFile(s.inDir(indexJSON))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
	idx, parsed := parseNames(data)
	kept := s.keptNames()
	switch {
	case parsed && kept == nil: // nobody has changed it yet, or the copy is damaged
		_, err := os.Lstat(s.inDir(indexCopy))
		return idx, errors.Is(err, fs.ErrNotExist), nil
	case parsed && (len(data) != len(kept) || bytes.Equal(data, kept)):
		return idx, true, nil
	case kept == nil:
		kept = []byte(noImages)
	}
	if idx, parsed = parseNames(kept); !parsed {
		return nil, false, fmt.Errorf("read %s: damaged", s.inDir(indexCopy))
	}
	return idx, false, nil
}

func parseNames(data []byte) (*ocispec.Index, bool) {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	if json.Unmarshal(data, &idx) != nil {
		return nil, false
	}
	if idx.Manifests == nil {
		idx.Manifests = []ocispec.Descriptor{}
	}
	return &idx, true
}

// keptNames returns what index.copy holds, nil if that is missing or damaged.
func (s *Store) keptNames() []byte { return readSealed(s.inDir(indexCopy)) }

// sealed is data after a line with its digest.
func sealed(data []byte) []byte {
	return append([]byte(digest.FromBytes(data).String()+"\n"), data...)
}

// readSealed returns the data that was sealed in a file, nil if that is missing or damaged.
func readSealed(file string) []byte {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	sum, data, _ := bytes.Cut(text, []byte("\n"))
	if digest.FromBytes(data) != digest.Digest(sum) {
		return nil
	}
	return data
}

// salvage says that names were damaged. What of it nothing replaces is kept for people to look at, unless it is the
// empty file that a power cut leaves of a new store.
func (s *Store) salvage() error {
	data, err := os.ReadFile(s.inDir(indexJSON))
	if _, parsed := parseNames(data); parsed && s.keptNames() == nil {
		s.repaired(indexCopy)
		return nil
	}
	s.repaired(indexJSON)
	if err != nil || s.keptNames() != nil || len(bytes.Trim(data, "\x00")) == 0 {
		return nil
	}
	return os.Rename(s.inDir(indexJSON), s.inDir(indexJSON+".damaged"))
}

// putNames writes index.json and its copy, unless they say so already and are on the disk.
func (s *Store) putNames(ctx context.Context, data []byte) error {
	was, err := os.ReadFile(s.inDir(indexJSON))
	if err == nil && bytes.Equal(was, data) && bytes.Equal(s.keptNames(), data) {
		if info, err := os.Lstat(s.inDir(indexCopy)); err == nil && info.Mode().Perm() == onDisk {
			return nil
		}
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{indexCopy, sealed(data)}, {indexJSON, data}} {
		if err := s.putSynced(s.inDir(f.name), f.data); err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
	}
	return s.settle(ctx, s.inDir(indexCopy))
}

// putSynced replaces a file so that a power cut leaves the old one or the new one.
func (s *Store) putSynced(path string, data []byte) error {
	f, err := os.CreateTemp(s.tmp, filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func (s *Store) inDir(name string) string { return filepath.Join(s.dir, name) }
