// Package layer is the store of filo: layers as blobs, indexes and trees, kept in a directory that is an OCI image layout
// and that any number of filo processes share.
//
// A layer is a list of entries in canonical order ([Entry]), named by the digest of its tar, the diff ID. Kept of it is:
//
//	blobs/sha256/<hex>        the tar, compressed or not (and manifests and configs)
//	layers/<hex>/index        the entries, searchable; .whole: found whole since the last boot
//	layers/<hex>/tree         unpacked as an overlay lower directory; .json: by which boot. Other id maps have others beside it
//	layers/<hex>/blobs        which blobs hold it: JSON, algorithm, level, descriptor
//	flat/<hex>                which layers show what those of a base show, by its chain ID: a digest, JSON
//	index.json, index.copy    the images that there are, twice
//	copies/<hex>              manifests and the like again; .parity: what a layer's blob is mended by
//	tmp/<process>, locks/     unfinished work and the files behind [Store.Lock]
//
// Everything appears by rename of a finished temporary; names are content addressed, so that two that make the same do
// no harm. On power cuts see durable.go.
//
// It never mounts, runs nothing, speaks to no network (a promised blob comes from the caller's function) and knows neither
// Dockerfiles nor cache keys.
//
// Start at [Open]. writer.go makes layers (ahead.go reads for it), unpack.go reads foreign ones, blob.go holds the
// compressed side (estargz.go the seekable one), tree.go the unpacked one (inspect.go looks at it while it is used),
// index.go the entry list, view.go stacks indexes, overlay.go and snapshot.go serve RUN (flatten.go makes few layers of
// many, storage.go does without overlays), names.go keeps index.json, repair.go and parity.go bring back what was damaged,
// prune.go throws away.
package layer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Layer names a layer by the digest of its uncompressed tar.
type Layer struct {
	DiffID digest.Digest
}

// ChainID is the OCI chain ID of layers, lowest first; "" for none.
func ChainID(layers []Layer) (id digest.Digest) {
	for _, l := range layers {
		id = l.On(id)
	}
	return id
}

// On is the chain ID of l on top of the layers of which below is the chain ID.
func (l Layer) On(below digest.Digest) digest.Digest {
	if below == "" {
		return l.DiffID
	}
	return digest.FromString(below.String() + " " + l.DiffID.String())
}

// Store holds layers and blobs in one directory. Its methods may be called
// from any number of goroutines and processes.
type Store struct {
	dir     string
	single  bool
	storage func() Storage
	pool    pool     // of merged directories
	held    *os.File // shared lock on <dir>/lock: keeps Prune of other processes away
	ranges  *os.File // see Lock
	tmp     string   // this process's directory below tmp/
	tmpFD   *os.File // exclusive lock on tmp: says that its owner lives
	origin  treeOrigin

	mu       sync.Mutex
	indexes  map[digest.Digest]*index
	blobs    map[wantedBlob]ocispec.Descriptor // that were found or made
	promises map[digest.Digest][]promise       // by diff ID
	promised map[digest.Digest]Layer           // by blob digest
	turns    map[string]chan struct{}          // the goroutines' half of Lock
	compared map[digest.Digest]*comparison     // trees that are compared with their indexes, or were
	useless  map[digest.Digest]bool            // layers of which no tree that is here helped
	verified map[digest.Digest]int64           // mtimes of blobs that were read and right
	stubs    map[string]string                 // directories of stubs, by what is in them
	short    []shortStack                      // of bases

	behind  sync.WaitGroup  // removals and comparisons that go on
	ctx     context.Context // of comparisons; ends with the store
	stop    context.CancelFunc
	gzips   [10]sync.Pool // compressors that are done, by level
	tell    func(what string)
	pulling Pulling
}

// Options of [Open].
type Options struct {
	SingleID bool              // ownership can't be put on disk: EPERM from chown and mknod is ignored, the index keeps the truth
	Storage  Storage           // "" is StorageOverlay
	Pulling  Pulling           // nil tells nobody
	Repaired func(what string) // told of what was damaged in the state directory and is done without or made again; nil tells nobody
}

// Pulling is told that a promised blob begins to come. Of what it returns, moved is told of bytes that came and done, once,
// of the end. It is called by several goroutines.
type Pulling func(d ocispec.Descriptor) (moved func(n int), done func(error))

const readme = `This directory belongs to filo, a builder of container images.

It is an OCI image layout: oci-layout, index.json and blobs/ can be read with
any OCI tool. Beside it:

  index.copy  index.json again, for when that is damaged
  copies/     manifests and configs of images again, and what blobs of layers
              are mended by, for when one in blobs/ is damaged
  layers/     entry lists and unpacked trees of layers, by diff ID
  flat/       which layers stand for many small ones while a step runs
  steps/      what build steps made, by cache key
  builds/     what the last builds did, for filo history ls
  files/      digests of build context files, remembered by stat
  mounts/     contents of RUN --mount=type=cache
  sources/    fetched git and http sources
  tmp/        unfinished work of running processes
  locks/      files that processes lock to wait for one another
  lock        held by every running filo

All of it can be thrown away while no filo runs; builds then start afresh.
`

// Open opens the store in dir and makes it if it is missing. It waits while
// another process prunes. What dead processes left in tmp/ is removed.
func Open(dir string, o Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{
		dir: dir, single: o.SingleID, tell: o.Repaired, pulling: o.Pulling,
		indexes:  map[digest.Digest]*index{},
		blobs:    map[wantedBlob]ocispec.Descriptor{},
		promises: map[digest.Digest][]promise{},
		promised: map[digest.Digest]Layer{},
		turns:    map[string]chan struct{}{},
		compared: map[digest.Digest]*comparison{},
		useless:  map[digest.Digest]bool{},
		verified: map[digest.Digest]int64{},
		stubs:    map[string]string{},
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for _, sub := range []string{"blobs/sha256", "layers", "tmp", "locks"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
	}
	if s.held, err = openLock(filepath.Join(dir, "lock")); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := flock(s.held, unix.LOCK_SH); err != nil {
		s.held.Close()
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	if s.ranges, err = openLock(filepath.Join(dir, "locks", rangesFile)); err != nil {
		s.held.Close()
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := s.makeLayout(); err != nil {
		s.Close()
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	s.origin = newTreeOrigin(o.SingleID)
	if err := s.Use(o.Storage); err != nil {
		s.Close()
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) makeLayout() error {
	sweep(filepath.Join(s.dir, "tmp"))
	if err := s.makeTemp(); err != nil {
		return err
	}
	for _, f := range []struct{ name, text string }{{ocispec.ImageLayoutFile, layoutText}, {"README", readme}} {
		path := s.inDir(f.name)
		if data, err := os.ReadFile(path); err == nil && string(data) == f.text {
			continue
		}
		if err := s.putFile(path, []byte(f.text)); err != nil {
			return err
		}
	}
	return s.putNew(indexJSON, noImages)
}

const layoutText = `{"imageLayoutVersion":"1.0.0"}`

// putNew writes a file of the layout unless it, or a copy of it, is there.
func (s *Store) putNew(name, text string) error {
	path := s.inDir(name)
	for _, there := range []string{path, s.inDir(indexCopy)} {
		if _, err := os.Lstat(there); err == nil {
			return nil
		}
	}
	tmp := filepath.Join(s.tmp, name)
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		return err
	}
	defer os.Remove(tmp)
	// A link, unlike a rename, can't replace what another process put there meanwhile.
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// makeTemp makes and locks this process's directory below tmp/.
func (s *Store) makeTemp() error {
	for {
		dir, err := makeQuick(filepath.Join(s.dir, "tmp"), "process-")
		if err != nil {
			return err
		}
		f, err := os.Open(dir)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return err
		}
		if err := flock(f, unix.LOCK_EX); err != nil {
			f.Close()
			return err
		}
		// A sweeper may have seen the directory before it was locked, and removed it.
		if sameFile(f, dir) {
			s.tmp, s.tmpFD = dir, f
			return nil
		}
		f.Close()
	}
}

// sweep removes what dead processes left in tmp. Errors are ignored: files of
// another user's process can't be removed, and do no harm.
func sweep(tmp string) (entries int, bytes int64) {
	list, err := os.ReadDir(tmp)
	if err != nil {
		return 0, 0
	}
	for _, d := range list {
		path := filepath.Join(tmp, d.Name())
		f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil {
			size := diskUse(path)
			if removeAll(path) == nil {
				entries, bytes = entries+1, bytes+size
			}
		}
		f.Close()
	}
	return entries, bytes
}

// repaired tells of damage.
func (s *Store) repaired(format string, args ...any) {
	if s.tell != nil {
		s.tell(fmt.Sprintf(format, args...))
	}
}

// Dir is the state directory, absolute.
func (s *Store) Dir() string { return s.dir }

// Temp makes a fresh directory on the store's file system. It is removed with
// everything in it by Close, or by the next Open if this process dies.
func (s *Store) Temp(pattern string) (string, error) {
	dir, err := os.MkdirTemp(s.tmp, pattern)
	if err != nil {
		return "", fmt.Errorf("make temporary directory: %w", err)
	}
	return dir, nil
}

// TempDir is the directory of this process on the store's file system, for files with names that nobody else takes. It
// goes where those of [Store.Temp] go.
func (s *Store) TempDir() string { return s.tmp }

// isSHA256 says whether d is sha256: and 64 digits.
func isSHA256(d string) bool {
	hex, ok := strings.CutPrefix(d, "sha256:")
	if !ok || len(hex) != 64 {
		return false
	}
	for i := range len(hex) {
		if c := hex[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// discard removes a temporary directory while the caller goes on. What it cannot remove is left for Close.
func (s *Store) discard(dir string) {
	s.behind.Go(func() { _ = removeAll(dir) })
}

// Close removes this process's temporary files and gives up its locks. The
// store must not be used after.
func (s *Store) Close() error {
	var err error
	s.stop()
	s.behind.Wait()
	if s.tmp != "" {
		err = removeAll(s.tmp)
		s.tmpFD.Close()
		s.tmp = ""
	}
	return errors.Join(err, s.ranges.Close(), s.held.Close())
}

// Has says whether the files of l can be had: its tree or a blob of it is here, or a blob is promised.
func (s *Store) Has(l Layer) bool {
	s.mu.Lock()
	promised, useless := len(s.promises[l.DiffID]) > 0, s.useless[l.DiffID]
	s.mu.Unlock()
	if promised {
		return true
	}
	if _, err := os.Lstat(filepath.Join(s.layerDir(l), treeName)); err == nil && !useless {
		return true // as most have
	}
	return len(s.storedBlobs(l)) > 0 || !useless && len(s.unpacked(l)) > 0
}

// Lock waits until no other goroutine or process holds the lock called name,
// and takes it. It is not reentrant. unlock may be called more than once. If
// the process dies its locks are free. Names that begin with "layer ", "blob ",
// "blobs " and "flat " are the store's own.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	s.mu.Lock()
	turn := s.turns[name]
	if turn == nil {
		turn = make(chan struct{}, 1)
		s.turns[name] = turn
	}
	s.mu.Unlock()
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("lock %s: %w", name, context.Cause(ctx))
	}
	free, err := s.lockEverywhere(ctx, sha256.Sum256([]byte(name)))
	if err != nil {
		<-turn
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	var once sync.Once
	return func() { once.Do(func() { free(); <-turn }) }, nil
}

// rangesFile is the file in locks/ of which single bytes are locked. A file for each lock would take an inode for each:
// to make those took a tenth of the time of a short step.
const rangesFile = "ranges"

// lockEverywhere is the processes' half of Lock.
func (s *Store) lockEverywhere(ctx context.Context, name [sha256.Size]byte) (free func(), err error) {
	at := unix.Flock_t{Start: int64(binary.BigEndian.Uint64(name[:]) >> 2), Len: 1}
	set := func(how int16) error {
		at.Type = how
		return unix.FcntlFlock(s.ranges.Fd(), unix.F_OFD_SETLK, &at)
	}
	err = poll(ctx, func() error { return set(unix.F_WRLCK) })
	if err == nil {
		return func() { _ = set(unix.F_UNLCK) }, nil
	}
	if !errors.Is(err, unix.EINVAL) {
		return nil, err
	}
	// A kernel without locks of open files, or a file system.
	f, err := openLock(filepath.Join(s.dir, "locks", hex.EncodeToString(name[:16])))
	if err != nil {
		return nil, err
	}
	if err := poll(ctx, func() error { return flock(f, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// poll tries to lock until that works: a lock that waits can't be called off.
func poll(ctx context.Context, try func() error) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := try()
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func openLock(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			return err
		}
	}
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// layerDir is where files of l are kept. Of a malformed diff ID it is a path
// at which nothing ever is.
func (s *Store) layerDir(l Layer) string {
	return filepath.Join(s.dir, "layers", hexOf(l.DiffID))
}

// hexOf is the file name of a digest; only sha256 is stored.
func hexOf(d digest.Digest) string {
	if checkDigest(d) != nil {
		return "invalid"
	}
	return d.Encoded()
}

func checkDigest(d digest.Digest) error {
	if isSHA256(string(d)) {
		return nil // the check of the library takes a regular expression, and this one is made for each layer of each step
	}
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", string(d), err)
	}
	if d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("digest %s: only sha256 is supported", d)
	}
	return nil
}
