package layer

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path"
	"runtime"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// ErrLost says that a layer which was in the store turned out to be damaged and can be had from nowhere. What is left
// of it is removed: whoever made it can make it again.
var ErrLost = errors.New("layer was damaged and is lost")

// Blobs are given to others by hard links, without being read, so that their content must be known to be right. Hashing
// gigabytes in every build would take seconds; so a blob that was verified gets an mtime whose fraction is a number made
// of the boot ID, and who writes to it afterwards takes that mark away. After a power cut all are verified again. What
// no write has changed, such as a disk that forgets, is found by those who read the blob.

// mark is the fraction of the mtime of verified blobs; 0 if there can be none.
func (s *Store) blobMark() int64 {
	if s.origin.Boot == "" {
		return 0
	}
	h := fnv.New64a()
	io.WriteString(h, s.origin.Boot)
	return int64(h.Sum64()%999_999_999) + 1
}

// stamp notes that the blob at name holds what it should. It is only a hint.
func (s *Store) stamp(name string) {
	var now unix.Timespec
	if s.blobMark() == 0 || unix.ClockGettime(unix.CLOCK_REALTIME, &now) != nil {
		return
	}
	t := unix.NsecToTimespec(int64(now.Sec)*1e9 + s.blobMark())
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{t, t}, 0)
}

func (s *Store) stamped(info os.FileInfo) bool {
	return s.blobMark() != 0 && int64(info.ModTime().Nanosecond()) == s.blobMark()
}

// used notes that the blob at name is in use, and leaves alone what its mtime says.
func (s *Store) used(name string, info os.FileInfo) {
	if s.stamped(info) {
		s.stamp(name)
		return
	}
	s.touch(name)
}

// sound says whether the stored blob d holds what it should; one that does not is removed.
func (s *Store) sound(d digest.Digest, info os.FileInfo) bool {
	s.mu.Lock()
	known := s.verified[d]
	s.mu.Unlock()
	if s.stamped(info) || known == info.ModTime().UnixNano() {
		return true
	}
	r, _, err := s.openStored(context.Background(), d)
	if err != nil {
		return false
	}
	defer r.Close()
	if _, err := io.CopyBuffer(io.Discard, onlyReader{r}, make([]byte, copyBuffer)); err != nil {
		return false
	}
	s.stamp(s.blobPath(d))
	if now, err := os.Lstat(s.blobPath(d)); err == nil { // where nothing can be stamped
		s.mu.Lock()
		s.verified[d] = now.ModTime().UnixNano()
		s.mu.Unlock()
	}
	return true
}

// valid says whether b can be what filo wrote.
func (b storedBlob) valid() bool {
	_, err := Compression{Algorithm: b.Algorithm, Level: b.Level}.normal()
	return err == nil && checkDigest(b.Descriptor.Digest) == nil && b.Descriptor.MediaType == mediaType(b.Algorithm)
}

// checkTree compares types, sizes and times with the index: who writes to a file of a tree changes its time.
func checkTree(ctx context.Context, dir string, x *index, plain bool) error {
	root, err := rootfs.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	g, ctx := errgroup.WithContext(ctx)
	parts := runtime.GOMAXPROCS(0)
	for i := range parts {
		g.Go(func() error {
			return checkEntries(ctx, root, x, x.len()*i/parts, x.len()*(i+1)/parts, plain)
		})
	}
	return g.Wait()
}

func checkEntries(ctx context.Context, root *rootfs.Root, x *index, from, to int, plain bool) error {
	dirs, err := newDirStack(root)
	if err != nil {
		return err
	}
	defer dirs.close()
	for i := from; i < to; i++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e, ok := x.entry(i)
		if !ok || e.Type == Opaque || plain && e.Type == Whiteout {
			continue
		}
		parent, err := dirs.open(path.Dir(e.Path), false)
		if err != nil {
			return err
		}
		st, err := parent.Lstat(path.Base(e.Path))
		if err != nil {
			return err
		}
		if !matches(e, st) || e.Type == Regular && keepsTime(e) && st.Sec != e.ModTime {
			return fmt.Errorf("tree is damaged: %s", e.Path)
		}
	}
	return nil
}

// keepsTime says whether every file system can hold the time of e.
func keepsTime(e Entry) bool { return e.ModTime >= 0 && e.ModTime < 1<<31 }
