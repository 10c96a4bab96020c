package layer

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// A power cut takes what has not been synced: bytes, names, or the bytes and not the name. Of what the store holds only
// the images of index.json must outlive it, and what makes them is synced before they are named. All else is checked
// before it is used: blobs have digests, indexes and records checksums, trees are compared with their index by whoever
// finds them after another boot. So a build waits for the disk once, in the end, and only for what it made.

// onDisk is the mode of a file of which content and name have reached the disk. No write to it follows, so it stays
// true, for every process; and who copies it elsewhere has its own disk to wait for.
const onDisk fs.FileMode = 0o444

// syncs bounds how many files are open at once to be waited for.
const syncs = 256

// Durable returns when no power cut can take the blobs any more, nor their names. Blobs that are not here are left out:
// images may be stored in part.
func (s *Store) Durable(ctx context.Context, blobs ...digest.Digest) error {
	files := make([]string, len(blobs))
	for i, d := range blobs {
		files[i] = s.blobPath(d)
	}
	return s.settle(ctx, files...)
}

// settle waits until files of the store are on the disk, and marks them. Those that are marked or missing are left out.
func (s *Store) settle(ctx context.Context, files ...string) error {
	var fresh []string
	for _, f := range files {
		info, err := os.Lstat(f)
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode().Perm() == onDisk {
			continue
		}
		if err != nil {
			return err
		}
		fresh = append(fresh, f)
	}
	if len(fresh) == 0 {
		return nil
	}
	for some := range slices.Chunk(append(s.above(fresh), fresh...), syncs) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := Sync(some...); err != nil {
			return err
		}
	}
	if err := Sync(filepath.Dir(s.dir)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	for _, f := range fresh {
		_ = os.Chmod(f, onDisk) // else the next one waits again
	}
	return nil
}

// above lists the directories of the store that names of files are in.
func (s *Store) above(files []string) []string {
	var dirs []string
	for _, f := range files {
		for dir := filepath.Dir(f); !slices.Contains(dirs, dir); dir = filepath.Dir(dir) {
			dirs = append(dirs, dir)
			if dir == s.dir {
				break
			}
		}
	}
	return dirs
}

// syncsAtOnce bounds how many threads wait for the disk.
const syncsAtOnce = 8

// Sync waits until files and directories are on the disk. First all are on their way, then all are waited for side by
// side: so they get their place in one commit of the file system. One after the other each directory would have a commit of
// its own where others write meanwhile. File systems that cannot do that are passed over.
func Sync(paths ...string) (err error) {
	var open []*os.File
	defer func() {
		for _, f := range open {
			err = errors.Join(err, f.Close())
		}
	}()
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		open = append(open, f)
		_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE) // only a hint
	}
	var g errgroup.Group
	g.SetLimit(syncsAtOnce)
	for _, f := range open {
		g.Go(func() error {
			if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
				return err
			}
			return nil
		})
	}
	return g.Wait()
}

// PromiseStored says that the blob d, if it is in the store, holds l: should no file of l's own say so any more, l can be
// had from there.
func (s *Store) PromiseStored(ctx context.Context, l Layer, d ocispec.Descriptor) {
	info, err := os.Lstat(s.blobPath(d.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		_ = s.Ensure(ctx, d.Digest) // it was there, if the image was
		info, err = os.Lstat(s.blobPath(d.Digest))
	}
	if err != nil || info.Size() != d.Size {
		return
	}
	s.Promise(l, d, s.openIt(d.Digest))
}
