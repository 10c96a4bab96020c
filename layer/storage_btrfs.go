package layer

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/btrfs.h.
const (
	btrfsSubvolCreate = 0x5000940e
	btrfsSnapCreate   = 0x50009401
	btrfsSnapDestroy  = 0x5000940f
)

// btrfsArgs is struct btrfs_ioctl_vol_args.
type btrfsArgs struct {
	fd   int64
	name [4088]byte
}

func btrfsDo(dir string, request uintptr, args *btrfsArgs, name string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if len(name) >= len(args.name) {
		return unix.ENAMETOOLONG
	}
	copy(args.name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), request, uintptr(unsafe.Pointer(args))); errno != 0 {
		return &os.PathError{Op: "subvolume", Path: dir + "/" + name, Err: errno}
	}
	return nil
}

// makeSubvolume makes the subvolume name in dir.
func makeSubvolume(dir, name string) error {
	return btrfsDo(dir, btrfsSubvolCreate, &btrfsArgs{}, name)
}

// snapshotSubvolume makes the subvolume name in dir, which begins as source is.
func snapshotSubvolume(source, dir, name string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	return btrfsDo(dir, btrfsSnapCreate, &btrfsArgs{fd: int64(f.Fd())}, name)
}

// destroySubvolume removes the subvolume name in dir with all that is in it. Only root may,
// unless the file system is mounted with user_subvol_rm_allowed.
func destroySubvolume(dir, name string) error {
	return btrfsDo(dir, btrfsSnapDestroy, &btrfsArgs{}, name)
}
