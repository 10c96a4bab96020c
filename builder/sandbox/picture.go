package sandbox

import (
	"errors"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// pictured are the files of /proc that say the same to every process of a step. Programs count processors,
// measure memory and look for features in them.
var pictured = [...]string{
	"buddyinfo", "cgroups", "cmdline", "consoles", "cpuinfo", "crypto", "devices", "diskstats", "filesystems", "loadavg", "locks",
	"mdstat", "meminfo", "misc", "modules", "partitions", "softirqs", "stat", "swaps", "uptime", "version", "vmstat",
	"pressure/cpu", "pressure/io", "pressure/memory", "sysvipc/msg", "sysvipc/sem", "sysvipc/shm",
	"self/net/dev", "self/net/if_inet6", "self/net/ipv6_route", "self/net/protocols", "self/net/route",
	"self/gid_map", "self/setgroups", "self/uid_map",
	"sys/crypto/fips_enabled",
	"sys/fs/aio-max-nr", "sys/fs/file-max", "sys/fs/nr_open", "sys/fs/pipe-max-size",
	"sys/fs/protected_fifos", "sys/fs/protected_hardlinks", "sys/fs/protected_regular", "sys/fs/protected_symlinks",
	"sys/fs/inotify/max_user_instances", "sys/fs/inotify/max_user_watches",
	"sys/kernel/cap_last_cap", "sys/kernel/domainname", "sys/kernel/hostname", "sys/kernel/msgmax", "sys/kernel/msgmnb", "sys/kernel/msgmni", "sys/kernel/ngroups_max", "sys/kernel/osrelease", "sys/kernel/ostype",
	"sys/kernel/randomize_va_space", "sys/kernel/sem", "sys/kernel/shmall", "sys/kernel/shmmni", "sys/kernel/tainted",
	"sys/kernel/overflowgid", "sys/kernel/overflowuid", "sys/kernel/pid_max", "sys/kernel/random/boot_id",
	"sys/kernel/random/entropy_avail", "sys/kernel/random/poolsize", "sys/kernel/shmmax", "sys/kernel/threads-max", "sys/kernel/version",
	"sys/net/core/somaxconn", "sys/net/ipv4/ip_local_port_range", "sys/net/ipv4/ip_unprivileged_port_start",
	"sys/net/ipv4/ping_group_range", "sys/net/ipv6/bindv6only", "sys/net/ipv6/conf/all/disable_ipv6",
	"sys/vm/nr_hugepages", "sys/vm/overcommit_ratio", "sys/vm/max_map_count", "sys/vm/mmap_min_addr", "sys/vm/overcommit_memory", "sys/vm/swappiness",
}

// picturedSys are those of /sys.
var picturedSys = [...]string{
	"devices/system/cpu/kernel_max", "devices/system/cpu/offline", "devices/system/cpu/online", "devices/system/cpu/possible",
	"devices/system/cpu/present", "devices/system/node/has_memory", "devices/system/node/online", "devices/system/node/possible",
	"kernel/mm/transparent_hugepage/defrag", "kernel/mm/transparent_hugepage/enabled", "kernel/mm/transparent_hugepage/hpage_pmd_size",
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
	return paint(at, name, func(proc *os.Root) error {
		if err := trace(proc, "/proc", pictured[:]); err != nil {
			return err
		}
		for p, text := range drawn {
			if err := draw(proc, p, []byte(text)); err != nil {
				return err
			}
		}
		return errors.Join(proc.Symlink("self/mounts", "mounts"), proc.Symlink("self/net", "net"))
	})
}

// pictureSys makes a directory that looks like /sys to those who count processors in it.
func pictureSys(at int, name string) error {
	return paint(at, name, func(sys *os.Root) error { return trace(sys, "/sys", picturedSys[:]) })
}

// paint makes a directory and fills it.
func paint(at int, name string, fill func(*os.Root) error) error {
	if err := unix.Mkdirat(at, name, 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	dir, err := os.OpenRoot(fdPath(fd))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := fill(dir); err != nil {
		return err
	}
	return chmodAt(at, name, 0o555)
}

// trace copies files of the container we are in; it may lack some.
func trace(to *os.Root, from string, names []string) error {
	for _, name := range names {
		data, err := readSome(path.Join(from, name))
		if err != nil {
			continue
		}
		if err := draw(to, name, data); err != nil {
			return err
		}
	}
	return nil
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
