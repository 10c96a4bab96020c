package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Attr holds attributes to set; nil fields are left alone.
type Attr struct {
	Owner  *Owner
	Mode   *uint32 // 07777
	Xattrs map[string]string
	Time   *Time
}

// Owner is a user and group id.
type Owner struct{ UID, GID int }

// Time is a modification time.
type Time struct{ Sec, Nsec int64 }

// Mode returns a pointer to its argument, for [Attr].
func Mode(m uint32) *uint32 { return &m }

// Set puts the attributes a on name, "." for the directory itself, in the one order that
// keeps them all: owner (which clears set-id bits and capabilities), extended attributes,
// mode, time. The mode of a symbolic link cannot be set and is skipped.
func (d *Dir) Set(name string, a Attr) error {
	if a.Owner != nil {
		if err := d.Chown(name, a.Owner.UID, a.Owner.GID); err != nil {
			return err
		}
	}
	for key, value := range a.Xattrs {
		if err := d.SetXattr(name, key, value); err != nil {
			return err
		}
	}
	if a.Mode != nil {
		if err := d.Chmod(name, *a.Mode); err != nil {
			return err
		}
	}
	if a.Time != nil {
		return d.Chtimes(name, *a.Time)
	}
	return nil
}

// Chown sets the owner of name.
func (d *Dir) Chown(name string, uid, gid int) error {
	return d.attr("chown", name, func() error {
		return unix.Fchownat(d.fd, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Chmod sets the mode of name, set-id and sticky bits included, whatever the umask.
// On a symbolic link it does nothing.
func (d *Dir) Chmod(name string, mode uint32) error {
	return d.attr("chmod", name, func() error {
		// fchmodat2 came with Linux 6.6; x/sys tries it and falls back to EOPNOTSUPP.
		err := unix.Fchmodat(d.fd, name, mode&0o7777, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EOPNOTSUPP && err != unix.ENOSYS {
			return err
		}
		return d.chmodOld(name, mode)
	})
}

// chmodOld pins the file with a descriptor that cannot be a link and goes to it through /proc.
func (d *Dir) chmodOld(name string, mode uint32) error {
	fd, err := openat(d.fd, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return err
	}
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode&0o7777)
}

// Chtimes sets the modification and access time of name.
func (d *Dir) Chtimes(name string, t Time) error {
	return d.attr("chtimes", name, func() error {
		ts, err := unix.TimeToTimespec(time.Unix(t.Sec, t.Nsec))
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(d.fd, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// SetXattr sets one extended attribute of name.
func (d *Dir) SetXattr(name, key, value string) error {
	return d.attr("setxattr "+key, name, func() error {
		return unix.Lsetxattr(d.proc(name), key, []byte(value), 0)
	})
}

// RemoveXattr removes one extended attribute of name; it is no error if there is none.
func (d *Dir) RemoveXattr(name, key string) error {
	return d.attr("removexattr "+key, name, func() error {
		err := unix.Lremovexattr(d.proc(name), key)
		if err == unix.ENODATA {
			return nil
		}
		return err
	})
}

// Xattrs returns the extended attributes of name that keep wants, nil for none. A file
// system without extended attributes has none.
func (d *Dir) Xattrs(name string, keep func(key string) bool) (map[string]string, error) {
	if err := d.check("listxattr", name, true); err != nil {
		return nil, err
	}
	p := d.proc(name)
	list, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(p, b) })
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(list) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, d.error("listxattr", name, err)
	}
	var attrs map[string]string
	for key := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if !keep(key) {
			continue
		}
		value, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(p, key, b) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, d.error("getxattr "+key, name, err)
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[key] = string(value)
	}
	return attrs, nil
}

// proc names the file through the open directory: there is no setxattrat before Linux 6.13,
// and only the last component, which the l-calls do not follow, can be swapped.
func (d *Dir) proc(name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.fd, name)
}

func (d *Dir) attr(op, name string, call func() error) error {
	if err := d.check(op, name, true); err != nil {
		return err
	}
	return d.error(op, name, retry(call))
}

func grow(call func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		b := make([]byte, size)
		n, err := call(b)
		if err == unix.ERANGE && size < 1<<20 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}

func fileMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, bit := range []struct {
		kernel uint32
		mode   fs.FileMode
	}{{unix.S_ISUID, fs.ModeSetuid}, {unix.S_ISGID, fs.ModeSetgid}, {unix.S_ISVTX, fs.ModeSticky}} {
		if m&bit.kernel != 0 {
			mode |= bit.mode
		}
	}
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	}
	return mode
}
