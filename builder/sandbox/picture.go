package sandbox

import (
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// pictured are the files of /proc that say the same to everybody. Programs count processors,
// measure memory and look for features in them.
var pictured = [...]string{
	"cgroups", "consoles", "cpuinfo", "crypto", "devices", "diskstats", "filesystems", "loadavg", "locks", "meminfo", "misc",
	"partitions", "stat", "swaps", "uptime", "version", "vmstat",
	"sys/fs/aio-max-nr", "sys/fs/file-max", "sys/fs/nr_open", "sys/fs/pipe-max-size",
	"sys/fs/inotify/max_user_instances", "sys/fs/inotify/max_user_watches",
	"sys/kernel/cap_last_cap", "sys/kernel/hostname", "sys/kernel/ngroups_max", "sys/kernel/osrelease", "sys/kernel/ostype",
	"sys/kernel/overflowgid", "sys/kernel/overflowuid", "sys/kernel/pid_max", "sys/kernel/random/boot_id",
	"sys/kernel/random/entropy_avail", "sys/kernel/random/poolsize", "sys/kernel/shmmax", "sys/kernel/threads-max", "sys/kernel/version",
	"sys/net/core/somaxconn", "sys/net/ipv4/ip_local_port_range",
	"sys/vm/max_map_count", "sys/vm/mmap_min_addr", "sys/vm/overcommit_memory", "sys/vm/swappiness",
}

// drawn are files of /proc that say what holds in the root.
var drawn = map[string]string{
	"self/mounts":    "none / none rw 0 0\n",
	"self/mountinfo": "1 1 0:1 / / rw - none none rw\n",
	"self/cgroup":    "0::/\n",
}

// maxPicture bounds a file of the picture.
const maxPicture = 1 << 20

// picture makes a directory that looks like /proc to those who read about the machine. About
// processes it says nothing: it would have to be another for each.
func picture(at int, name string) error {
	if err := unix.Mkdirat(at, name, 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	proc, err := os.OpenRoot(fdPath(fd))
	if err != nil {
		return err
	}
	defer proc.Close()
	for _, p := range pictured {
		data, err := readSome("/proc/" + p)
		if err != nil {
			continue // the container we are in lacks it as well
		}
		if err := draw(proc, p, data); err != nil {
			return err
		}
	}
	for p, text := range drawn {
		if err := draw(proc, p, []byte(text)); err != nil {
			return err
		}
	}
	if err := proc.Symlink("self/mounts", "mounts"); err != nil {
		return err
	}
	return chmodAt(at, name, 0o555)
}

func readSome(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxPicture))
}

func draw(proc *os.Root, name string, data []byte) error {
	if err := proc.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	return proc.WriteFile(name, data, 0o444)
}
