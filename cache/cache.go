// Package cache remembers which layer a step made. A [Key] names a step and all that went into it; keys chain by
// results: the key of a step holds the chain ID of the layers below it, so a step that ran again and made the same
// layer lets everything after it hit, and one that made another lets nothing hit. It also remembers the digests of
// files by what stat says of them (files.go).
//
// It never holds content, decides what a step is, or fails a build: a record that is missing, torn or foreign is a
// miss with a reason.
//
// On disk: steps/<hex of key>, one JSON object, see [Record]; files/<hex>, see [Files]. Both appear by rename and
// need no fsync: losing one costs only time, and what a power cut leaves of one has not the digest that it says.
//
// Start at [Open].
package cache

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

// salt names the rules by which keys are made. It changes with every change of meaning of an op or of an input.
const salt = "filo/1"

// Key names a step and everything that went into it. It is never the digest of content. The zero Key is where a
// chain starts.
type Key digest.Digest

// Next returns the key of op done after k with the inputs, whose order counts. op is encoded as JSON, so equal values
// give equal keys; a field added to an op later must be omitted when empty.
func (k Key) Next(op any, inputs ...digest.Digest) (Key, error) {
	b, err := json.Marshal(struct {
		Salt   string
		Before Key
		Op     any
		Inputs []digest.Digest
	}{salt, k, op, inputs})
	if err != nil {
		return "", fmt.Errorf("encode key: %w", err)
	}
	return Key(digest.FromBytes(b)), nil
}

// Record says what a step made.
type Record struct {
	Layer   digest.Digest   // diff ID
	Created int64           // when the layer was made, seconds since the epoch
	Op      json.RawMessage `json:",omitempty"` // what went into the key, for people who ask why a step missed
	Inputs  []digest.Digest `json:",omitempty"`
	Same    Key             `json:",omitempty"` // another key of the same step, under which it is kept as well
	Check   string          // digest of the fields above: a torn record is a miss
}

// Store is the cache in one state directory. It is safe for concurrent use, also by other processes.
type Store struct {
	Repaired func(what string) // told of what was damaged, once Open returned; nil tells nobody

	dir  string
	temp string
	now  func() time.Time
}

// Open opens the cache below the state directory dir. temp is a directory of this process on the same file system. now
// is asked when a file's digest is remembered.
func Open(dir, temp string, now func() time.Time) (*Store, error) {
	for _, sub := range []string{"steps", "files"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("open cache: %w", err)
		}
	}
	return &Store{dir: dir, temp: temp, now: now}, nil
}

// ErrDamaged is why a record that is there cannot be used.
var ErrDamaged = errors.New("damaged record")

// Get returns the record of k. An absence is an error that wraps fs.ErrNotExist, a record that cannot be used one
// that wraps [ErrDamaged]; both are misses.
func (s *Store) Get(k Key) (Record, error) {
	b, err := os.ReadFile(s.path(k))
	if err != nil {
		return Record{}, err
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil || r.Check != r.check() || r.Layer.Validate() != nil {
		s.repaired("cache record " + digest.Digest(k).Encoded())
		return Record{}, fmt.Errorf("%w: %s", ErrDamaged, s.path(k))
	}
	return r, nil
}

func (s *Store) repaired(what string) {
	if s.Repaired != nil {
		s.Repaired(what)
	}
}

// Put remembers r under k, replacing what was there.
func (s *Store) Put(k Key, r Record) error {
	r.Check = r.check()
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	return s.replace(s.path(k), b)
}

// Remove forgets k. It is no error if there is nothing to forget.
func (s *Store) Remove(k Key) error {
	err := os.Remove(s.path(k))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Layers calls yield with the diff ID of every usable record and the time it was last used, until yield returns false.
func (s *Store) Layers(yield func(k Key, diffID digest.Digest, used time.Time) bool) error {
	entries, err := os.ReadDir(filepath.Join(s.dir, "steps"))
	if err != nil {
		return fmt.Errorf("list cache: %w", err)
	}
	for _, e := range entries {
		k := Key("sha256:" + e.Name())
		r, err := s.Get(k)
		if err != nil {
			continue
		}
		fi, err := e.Info()
		if err != nil {
			continue
		}
		if !yield(k, r.Layer, fi.ModTime()) {
			return nil
		}
	}
	return nil
}

// Touch marks k as used now, so that pruning by age spares it.
func (s *Store) Touch(k Key) {
	now := s.now()
	_ = os.Chtimes(s.path(k), now, now) // a record that vanished meanwhile needs no mark
}

func (s *Store) path(k Key) string {
	return filepath.Join(s.dir, "steps", digest.Digest(k).Encoded())
}

func (r Record) check() string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d\n%s\n%q\n%s", r.Layer, r.Created, r.Op, r.Inputs, r.Same)
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// replace makes path hold b by rename.
func (s *Store) replace(path string, b []byte) error {
	f, err := os.CreateTemp(s.temp, "record-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return nil
}
