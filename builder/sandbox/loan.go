package sandbox

import (
	"context"
	"errors"
	"maps"
	"os"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// loan is a directory of the host, such as a cache, that a process on the chroot ground gets: it
// changes places with an empty one for as long as the process runs. So it can be in one
// root at a time; others wait.
type loan struct {
	source string
	dir    *os.File // locked
	at     string   // where in the root it is, once it is there
}

// sourceDir is the path of a directory that is lent, "" for other mounts.
func (m Mount) sourceDir() string {
	if m.Type != Bind || !m.isDir() {
		return ""
	}
	return path.Join(m.Source, path.Clean("/"+m.Subpath))
}

// lend takes hold of the directories that mounts need, in one order for everybody.
func (s *scene) lend(ctx context.Context, mounts []Mount) error {
	sources := map[string]bool{}
	for _, m := range mounts {
		if dir := m.sourceDir(); dir != "" {
			sources[dir] = true
		}
	}
	for _, source := range slices.Sorted(maps.Keys(sources)) {
		dir, err := lockDir(ctx, source)
		if err != nil {
			return wrap("lock", source, err)
		}
		s.lent[source] = &loan{source: source, dir: dir}
	}
	return nil
}

// lendPause is how often a directory that another process has is asked for again.
const lendPause = 20 * time.Millisecond

// lockDir locks the directory that is at a path once it is nobody else's.
func lockDir(ctx context.Context, name string) (*os.File, error) {
	for {
		dir, err := os.OpenFile(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(dir, unix.AT_FDCWD, name) {
			return dir, nil
		}
		dir.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		select {
		case <-time.After(lendPause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// isAt says whether an open file is what a name stands for.
func isAt(f *os.File, dir int, name string) bool {
	var a, b unix.Stat_t
	return unix.Fstat(int(f.Fd()), &a) == nil && unix.Fstatat(dir, name, &b, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		a.Dev == b.Dev && a.Ino == b.Ino
}

// putLoan puts a directory in its place. At a second place there is a link to the first.
func (s *scene) putLoan(l *loan, m Mount) error {
	if l.at != "" {
		return s.put(m.Target, func(dir int, name string) error { return unix.Symlinkat(l.at, dir, name) }, nil)
	}
	var empty *os.File
	err := s.put(m.Target, func(dir int, name string) (err error) {
		if empty, err = l.trade(dir, name); err != nil {
			return err
		}
		fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		l.at, err = s.real(fd)
		return err
	}, func(dir int, name string) error {
		if empty == nil {
			return nil
		}
		defer empty.Close()
		if !isAt(l.dir, dir, name) {
			return nil // the process removed it: the empty one is what is left
		}
		err := unix.Renameat2(dir, name, unix.AT_FDCWD, l.source, unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.ENOENT) {
			err = unix.Renameat2(dir, name, unix.AT_FDCWD, l.source, unix.RENAME_NOREPLACE)
		}
		return wrap("put back", l.source, err)
	})
	return err
}

// trade exchanges the directory for an empty one with the same attributes, locked.
func (l *loan) trade(dir int, name string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(l.dir.Fd()), &st); err != nil {
		return nil, err
	}
	if err := mkdir(dir, name, st.Mode&0o7777); err != nil {
		return nil, err
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	empty := os.NewFile(uintptr(fd), name)
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		_ = unix.Fchown(fd, int(st.Uid), int(st.Gid)) // with one ID there is no other owner
		err = crossing(unix.Renameat2(unix.AT_FDCWD, l.source, dir, name, unix.RENAME_EXCHANGE))
	}
	if err != nil {
		empty.Close()
		return nil, err
	}
	return empty, nil
}
