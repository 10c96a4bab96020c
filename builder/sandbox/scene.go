package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// scene is what a process on the chroot ground finds in its root besides what belongs there.
// Whatever was at a place is moved aside and comes back when the scene is struck; the
// directories around keep their times, so that afterwards nothing tells of it.
type scene struct {
	root  int    // the process's root
	name  string // its path, as the kernel says it
	aside string // a directory beside the root
	at    int    // the same, open
	moved int
	undo  []func() error
	lent  map[string]*loan // by source
}

// newScene sets the scene for a process. After an error all is as it was.
func newScene(ctx context.Context, h *handover) (s *scene, err error) {
	p := h.Process
	s = &scene{root: -1, at: -1, lent: map[string]*loan{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.strike())
		}
	}()
	if s.root, err = unix.Open(p.Root.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return s, &os.PathError{Op: "open", Path: p.Root.Dir, Err: err}
	}
	if s.name, err = os.Readlink(fdPath(s.root)); err != nil {
		return s, err
	}
	if s.aside, err = os.MkdirTemp(path.Dir(p.Root.Dir), "aside-"); err != nil {
		return s, err
	}
	if s.at, err = unix.Open(s.aside, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return s, err
	}
	if err := s.standard(h); err != nil {
		return s, err
	}
	if err := s.lend(ctx, p.Mounts); err != nil {
		return s, err
	}
	for _, m := range p.Mounts {
		if err := s.mount(m); err != nil {
			return s, fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	return s, nil
}

// strike puts everything back. It may be called again.
func (s *scene) strike() error {
	var errs []error
	for _, undo := range slices.Backward(s.undo) {
		errs = append(errs, undo())
	}
	s.undo = nil
	for _, l := range s.lent {
		l.dir.Close()
	}
	clear(s.lent)
	if s.aside != "" {
		errs = append(errs, os.RemoveAll(s.aside))
		s.aside = ""
	}
	for _, fd := range []*int{&s.root, &s.at} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
	return errors.Join(errs...)
}

// standard puts what every process has.
func (s *scene) standard(h *handover) error {
	if err := s.put("/proc", picture, nil); err != nil {
		return fmt.Errorf("make /proc: %w", err)
	}
	if err := s.put("/sys", pictureSys, nil); err != nil {
		return fmt.Errorf("make /sys: %w", err)
	}
	if err := s.put("/dev", makeDev, nil); err != nil {
		return fmt.Errorf("make /dev: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{"/etc/hosts", h.Hosts}, {"/etc/resolv.conf", h.Resolv}} {
		err := s.put(f.name, func(dir int, name string) error { return writeAt(dir, name, f.data, 0o644, 0, 0) }, nil)
		if err != nil {
			return fmt.Errorf("make %s: %w", f.name, err)
		}
	}
	return nil
}

// spot is a name in a directory, which need not exist.
type spot struct {
	dir  int
	name string
}

// put makes something at a path of the root, links resolved inside it, and moves what is there aside.
// When the scene is struck, take may rescue it before it is removed.
func (s *scene) put(target string, make, take func(dir int, name string) error) error {
	sp, err := s.spot(target)
	if err != nil {
		return err
	}
	s.moved++
	old := strconv.Itoa(s.moved)
	there := false
	s.undo = append(s.undo, func() error {
		defer unix.Close(sp.dir)
		return keepTimes(sp.dir, func() error {
			if take != nil {
				if err := take(sp.dir, sp.name); err != nil {
					return err
				}
			}
			if err := s.remove(sp); err != nil || !there {
				return err
			}
			err := unix.Renameat(s.at, old, sp.dir, sp.name)
			if errors.Is(err, unix.ENOENT) {
				err = nil // the process removed the directory around it
			}
			return wrap("put back", target, err)
		})
	})
	return keepTimes(sp.dir, func() error {
		err := unix.Renameat(sp.dir, sp.name, s.at, old)
		there = err == nil
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return wrap("move aside", target, err)
		}
		return make(sp.dir, sp.name)
	})
}

// remove moves what is at sp aside, where it is removed with all the rest.
func (s *scene) remove(sp spot) error {
	s.moved++
	err := unix.Renameat(sp.dir, sp.name, s.at, strconv.Itoa(s.moved))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return wrap("remove", sp.name, err)
}

// spot finds the place of a path; missing directories around it are made, and go with the scene.
func (s *scene) spot(target string) (spot, error) {
	target = path.Clean("/" + target)
	if target == "/" {
		return spot{}, errors.New("the root itself is no place for it")
	}
	fd, err := openIn(s.root, target, 0)
	if err == nil {
		defer unix.Close(fd)
		real, err := s.real(fd)
		if err != nil {
			return spot{}, err
		}
		if real == "/" {
			return spot{}, errors.New("the root itself is no place for it")
		}
		target = real
	} else if !errors.Is(err, unix.ENOENT) {
		return spot{}, err
	}
	dir, err := s.dir(path.Dir(target))
	return spot{dir, path.Base(target)}, err
}

// real returns the path in the root of an open file, without links.
func (s *scene) real(fd int) (string, error) {
	name, err := os.Readlink(fdPath(fd))
	if err != nil {
		return "", err
	}
	if name == s.name {
		return "/", nil
	}
	in, ok := strings.CutPrefix(name, s.name+"/")
	if !ok {
		return "", fmt.Errorf("%s: not in the root", name)
	}
	return "/" + in, nil
}

// dir opens a directory of the root; what is missing of it is made.
func (s *scene) dir(name string) (int, error) {
	fd, err := openIn(s.root, name, unix.O_DIRECTORY)
	if err == nil || !errors.Is(err, unix.ENOENT) || name == "/" {
		return fd, err
	}
	parent, err := s.dir(path.Dir(name))
	if err != nil {
		return -1, err
	}
	base := path.Base(name)
	err = keepTimes(parent, func() error { return mkdir(parent, base, 0o755) })
	if err != nil {
		unix.Close(parent)
		return -1, wrap("make", name, err)
	}
	s.undo = append(s.undo, func() error {
		defer unix.Close(parent)
		return keepTimes(parent, func() error {
			unix.Unlinkat(parent, base, unix.AT_REMOVEDIR) // what the process uses stays
			return nil
		})
	})
	return openIn(s.root, name, unix.O_DIRECTORY)
}

// keepTimes does something in a directory and gives that its times back.
func keepTimes(dir int, do func() error) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	err := do()
	times := []unix.Timespec{st.Atim, st.Mtim}
	terr := unix.UtimesNanoAt(unix.AT_FDCWD, fdPath(dir), times, 0)
	return errors.Join(err, terr)
}

func wrap(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: name, Err: err}
}

// mkdir makes a directory with exactly this mode: filo's umask does not count.
func mkdir(dir int, name string, mode uint32) error {
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return err
	}
	return chmodAt(dir, name, mode)
}

// chmodAt changes what was just made here, so that no link can be in the way.
func chmodAt(dir int, name string, mode uint32) error {
	return unix.Fchmodat(dir, name, mode, 0)
}

// writeAt makes a file.
func writeAt(dir int, name string, data []byte, mode uint32, uid, gid int) error {
	fd, err := unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return wrap("make", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if uid != 0 || gid != 0 {
		if err := f.Chown(uid, gid); err != nil {
			return err
		}
	}
	return wrap("chmod", name, unix.Fchmod(fd, mode))
}

// makeDev makes a /dev of nodes.
func makeDev(at int, name string) error {
	if err := mkdir(at, name, 0o755); err != nil {
		return err
	}
	dev, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dev)
	for _, d := range devices {
		if err := d.make(dev); err != nil {
			return wrap("make", d.name, err)
		}
		if err := chmodAt(dev, d.name, 0o666); err != nil {
			return err
		}
	}
	null, err := unix.Openat(dev, "null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) {
		return fmt.Errorf("open null: %w: the state directory is on a file system mounted nodev; choose another with --root", err)
	}
	if err != nil {
		return wrap("open", "null", err)
	}
	unix.Close(null)
	for _, l := range devLinks {
		if err := unix.Symlinkat(l.to, dev, l.name); err != nil {
			return err
		}
	}
	for _, d := range []struct {
		name string
		mode uint32
	}{{"pts", 0o755}, {"shm", 0o1777}, {"mqueue", 0o1777}} {
		if err := mkdir(dev, d.name, d.mode); err != nil {
			return err
		}
	}
	return nil
}

// mount puts in place what a mount shows elsewhere.
func (s *scene) mount(m Mount) error {
	switch m.Type {
	case Data:
		mode := cmp.Or(m.Mode, 0o400)
		return s.put(m.Target, func(dir int, name string) error {
			return writeAt(dir, name, m.Data, mode, m.UID, m.GID)
		}, nil)
	case Tmpfs:
		return s.put(m.Target, func(dir int, name string) error {
			if err := mkdir(dir, name, 0o700); err != nil {
				return err
			}
			if m.UID != 0 || m.GID != 0 {
				if err := unix.Fchownat(dir, name, m.UID, m.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					return err
				}
			}
			return chmodAt(dir, name, cmp.Or(m.Mode, 0o1777))
		}, nil)
	case Overlay:
		return s.give(m)
	case Bind:
		if l := s.lent[m.sourceDir()]; l != nil {
			return s.putLoan(l, m)
		}
		return s.link(m)
	}
	return fmt.Errorf("type %q not known", m.Type)
}

// give moves files that are the process's own to their place. They are not kept.
func (s *scene) give(m Mount) error {
	if m.Root.Dir == "" {
		return errors.New("layers cannot be mounted on the chroot ground")
	}
	fd, err := openSource(m.Root.Dir, m.Subpath)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	from, err := os.Readlink(fdPath(fd))
	if err != nil {
		return err
	}
	return s.put(m.Target, func(dir int, name string) error {
		return crossing(unix.Renameat(unix.AT_FDCWD, from, dir, name))
	}, nil)
}

func crossing(err error) error {
	if errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("%w: on the chroot ground all of the state directory has to be on one file system", err)
	}
	return err
}

// link makes the target another name of a file or socket.
func (s *scene) link(m Mount) error {
	fd, err := openSource(m.Source, m.Subpath)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return s.put(m.Target, func(dir int, name string) error {
		return crossing(unix.Linkat(unix.AT_FDCWD, fdPath(fd), dir, name, unix.AT_SYMLINK_FOLLOW))
	}, nil)
}
