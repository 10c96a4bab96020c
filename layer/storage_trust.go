package layer

import (
	"context"
	"crypto/sha256"
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
// of it here counts for nothing: whoever made it can make it again.
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

// sound says whether the stored blob d holds what it should; one that does not is mended or removed.
func (s *Store) sound(d digest.Digest, info os.FileInfo) bool {
	s.mu.Lock()
	known, read := s.verified[d]
	s.mu.Unlock()
	if s.stamped(info) || read && known == info.ModTime().UnixNano() {
		return true
	}
	r, _, err := s.openStored(context.Background(), d)
	if err != nil {
		return false
	}
	defer r.Close()
	if _, err := io.CopyBuffer(io.Discard, onlyReader{r}, make([]byte, min(info.Size()+1, copyBuffer))); err != nil {
		now, err := os.Lstat(s.blobPath(d))
		return err == nil && s.stamped(now)
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

// treeCheck compares a tree with its index.
type treeCheck struct {
	dir    string
	x      *index
	plain  bool // see treeOrigin
	single bool
	deep   bool // read the files
}

// run compares types, sizes and times: who writes to a file of a tree changes its time. What a power cut takes shows only
// in what the files hold, as sizes and times reach the disk before it; so after one, deep compares that.
func (c *treeCheck) run(ctx context.Context) error {
	root, err := rootfs.Open(c.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	g, ctx := errgroup.WithContext(ctx)
	parts := runtime.GOMAXPROCS(0)
	if c.deep {
		parts *= 8 // of very different weight
		g.SetLimit(runtime.GOMAXPROCS(0))
	}
	for i := range parts {
		g.Go(func() error { return c.entries(ctx, root, c.x.len()*i/parts, c.x.len()*(i+1)/parts) })
	}
	return g.Wait()
}

func (c *treeCheck) entries(ctx context.Context, root *rootfs.Root, from, to int) error {
	dirs, err := newDirStack(root)
	if err != nil {
		return err
	}
	defer dirs.close()
	decode, buf := c.x.attributes, []byte(nil)
	if c.deep {
		decode, buf = c.x.entry, make([]byte, copyBuffer)
	}
	for i := from; i < to; i++ {
		if i%64 == 0 { // a tenth of a millisecond: steps go on meanwhile
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			runtime.Gosched()
		}
		e, ok := decode(i)
		if !ok || e.Type == Opaque || c.plain && e.Type == Whiteout {
			continue
		}
		parent, err := dirs.open(parentOf(e.Path), false)
		if err != nil {
			return err
		}
		err = c.entry(parent, e, buf)
		if err == nil && e.Type == Hardlink {
			err = sameInode(root, parent, e)
		}
		if err != nil {
			return fmt.Errorf("%w: %s: %w", errDamagedTree, e.Path, err)
		}
	}
	return nil
}

var (
	errDamagedTree = errors.New("tree is damaged")
	errDiffers     = errors.New("not as in the index")
)

func (c *treeCheck) entry(parent *rootfs.Dir, e Entry, buf []byte) error {
	name := path.Base(e.Path)
	st, err := parent.Lstat(name)
	switch {
	case err != nil:
		return err
	case !matches(e, st), e.Type == Regular && keepsTime(e) && st.Sec != e.ModTime:
		return errDiffers
	case !c.deep || e.Type == Whiteout:
		return nil
	case e.Type != Hardlink && !c.single && (st.UID != e.UID || st.GID != e.GID || e.Type != Symlink && st.Mode&0o7777 != e.Mode):
		return errDiffers
	}
	switch e.Type {
	case Regular:
		return c.content(parent, name, e, buf)
	case Symlink:
		if to, err := parent.Readlink(name); err != nil || to != e.Link {
			return errors.Join(errDiffers, err)
		}
	}
	return nil
}

// sameInode says whether the hard link e, in the directory parent, is a name of the file it should be.
func sameInode(root *rootfs.Root, parent *rootfs.Dir, e Entry) error {
	a, err := parent.Lstat(path.Base(e.Path))
	if err != nil {
		return err
	}
	b, err := root.Lstat(e.Link)
	if err == nil && (a.Dev != b.Dev || a.Ino != b.Ino) {
		err = errDiffers
	}
	return err
}

func (c *treeCheck) content(parent *rootfs.Dir, name string, e Entry, buf []byte) error {
	if e.Size == 0 {
		return nil
	}
	f, err := parent.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, onlyReader{f}, buf); err != nil {
		return err
	}
	if digest.NewDigest(digest.SHA256, h) != e.Digest {
		return errDiffers
	}
	return nil
}

// keepsTime says whether every file system can hold the time of e.
func keepsTime(e Entry) bool { return e.ModTime >= 0 && e.ModTime < 1<<31 }
