package layer

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSpread(t *testing.T) {
	s := newStore(t)
	f, err := os.Open(filepath.Dir(s.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if all, err := f.Readdirnames(-1); err != nil || len(all) != 1 {
		t.Errorf("places that were looked at are left: %q, %v", all, err)
	}
	if all, err := os.ReadDir(s.TempDir()); err != nil || len(all) != 0 {
		t.Errorf("files are left: %v, %v", all, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Type != unix.EXT4_SUPER_MAGIC {
		t.Skipf("%s is not on ext4", f.Name())
	}
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Skipf("no flags can be read here: %v", err)
	}
	if flags&topDir == 0 {
		t.Errorf("processes make their files side by side: %s has the flags %#x", f.Name(), flags)
	}
}
