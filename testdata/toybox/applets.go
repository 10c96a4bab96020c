package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func exitWith(n int) applet { return func([]string, stdio) int { return n } }

// each makes an applet that does one thing to every argument; without arguments to "-".
func each(do func(name string, s stdio) error) applet {
	return func(args []string, s stdio) int {
		status := 0
		if len(args) == 0 {
			args = []string{"-"}
		}
		for _, a := range args {
			if err := do(a, s); err != nil {
				status = fail(s, "toybox", err)
			}
		}
		return status
	}
}

// options splits leading options from operands and returns the letters.
func options(args []string) (letters string, operands []string) {
	for len(args) > 0 && len(args[0]) > 1 && args[0][0] == '-' {
		letters += args[0][1:]
		args = args[1:]
	}
	return letters, args
}

func echo(args []string, s stdio) int {
	end := "\n"
	if len(args) > 0 && args[0] == "-n" {
		args, end = args[1:], ""
	}
	io.WriteString(s.out, strings.Join(args, " ")+end)
	return 0
}

func read(name string, s stdio) (io.ReadCloser, error) {
	if name == "-" {
		return io.NopCloser(s.in), nil
	}
	return os.Open(name)
}

func cat(name string, s stdio) error {
	f, err := read(name, s)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(s.out, f)
	return err
}

func sha256sum(name string, s stdio) error {
	f, err := read(name, s)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	fmt.Fprintf(s.out, "%x  %s\n", h.Sum(nil), name)
	return nil
}

// into returns where name goes: into to if that is a directory.
func into(name, to string) string {
	if fi, err := os.Stat(to); err == nil && fi.IsDir() {
		return filepath.Join(to, filepath.Base(name))
	}
	return to
}

func cp(args []string, s stdio) int {
	letters, args := options(args)
	if len(args) < 2 {
		return fail(s, "cp", fmt.Errorf("want a source and a destination"))
	}
	for _, from := range args[:len(args)-1] {
		if err := copyTree(from, into(from, args[len(args)-1]), strings.ContainsAny(letters, "ra")); err != nil {
			return fail(s, "cp", err)
		}
	}
	return 0
}

func copyTree(from, to string, deep bool) error {
	fi, err := os.Lstat(from)
	if err != nil {
		return err
	}
	switch fi.Mode().Type() {
	case fs.ModeDir:
		if !deep {
			return fmt.Errorf("%s is a directory", from)
		}
		if err := os.Mkdir(to, fi.Mode().Perm()); err != nil && !os.IsExist(err) {
			return err
		}
		entries, err := os.ReadDir(from)
		for _, e := range entries {
			if err == nil {
				err = copyTree(filepath.Join(from, e.Name()), filepath.Join(to, e.Name()), true)
			}
		}
		return err
	case fs.ModeSymlink:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, fi.Mode().Perm())
}

func mv(args []string, s stdio) int {
	if len(args) != 2 {
		return fail(s, "mv", fmt.Errorf("want a source and a destination"))
	}
	if err := os.Rename(args[0], into(args[0], args[1])); err != nil {
		return fail(s, "mv", err)
	}
	return 0
}

func ln(args []string, s stdio) int {
	letters, args := options(args)
	if len(args) != 2 {
		return fail(s, "ln", fmt.Errorf("want a target and a name"))
	}
	link := os.Link
	if strings.Contains(letters, "s") {
		link = os.Symlink
	}
	if strings.Contains(letters, "f") {
		os.Remove(args[1])
	}
	if err := link(args[0], args[1]); err != nil {
		return fail(s, "ln", err)
	}
	return 0
}

func mkdir(args []string, s stdio) int {
	letters, args := options(args)
	for _, a := range args {
		err := os.Mkdir(a, 0o777)
		if strings.Contains(letters, "p") {
			err = os.MkdirAll(a, 0o777)
		}
		if err != nil {
			return fail(s, "mkdir", err)
		}
	}
	return 0
}

func rm(args []string, s stdio) int {
	letters, args := options(args)
	for _, a := range args {
		_, err := os.Lstat(a)
		switch {
		case os.IsNotExist(err) && strings.Contains(letters, "f"):
			continue
		case err == nil && strings.Contains(letters, "r"):
			err = os.RemoveAll(a)
		case err == nil:
			err = os.Remove(a)
		}
		if err != nil {
			return fail(s, "rm", err)
		}
	}
	return 0
}

func ls(args []string, s stdio) int {
	letters, args := options(args)
	if len(args) == 0 {
		args = []string{"."}
	}
	for _, a := range args {
		fi, err := os.Lstat(a)
		if err != nil {
			return fail(s, "ls", err)
		}
		names := []string{a}
		if fi.IsDir() && !strings.Contains(letters, "d") {
			entries, err := os.ReadDir(a)
			if err != nil {
				return fail(s, "ls", err)
			}
			names = nil
			for _, e := range entries {
				names = append(names, filepath.Join(a, e.Name()))
			}
		}
		for _, n := range names {
			if !strings.Contains(letters, "l") {
				fmt.Fprintln(s.out, filepath.Base(n))
			} else if err := stat(n, s); err != nil {
				return fail(s, "ls", err)
			}
		}
	}
	return 0
}

// stat prints mode, owner, size and name.
func stat(name string, s stdio) error {
	fi, err := os.Lstat(name)
	if err != nil {
		return err
	}
	st := fi.Sys().(*syscall.Stat_t)
	fmt.Fprintf(s.out, "%v %d:%d %d %s\n", fi.Mode(), st.Uid, st.Gid, fi.Size(), name)
	return nil
}

func touch(name string, _ stdio) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	f.Close()
	now := time.Now()
	return os.Chtimes(name, now, now)
}

func chmod(args []string, s stdio) int {
	if len(args) < 2 {
		return fail(s, "chmod", fmt.Errorf("want a mode and files"))
	}
	mode, err := strconv.ParseUint(args[0], 8, 12)
	for _, a := range args[1:] {
		if err == nil {
			err = syscall.Chmod(a, uint32(mode))
		}
	}
	if err != nil {
		return fail(s, "chmod", err)
	}
	return 0
}

func chown(args []string, s stdio) int {
	if len(args) < 2 {
		return fail(s, "chown", fmt.Errorf("want UID:GID and files"))
	}
	user, group, _ := strings.Cut(args[0], ":")
	uid, err := strconv.Atoi(user)
	gid := uid
	if err == nil && group != "" {
		gid, err = strconv.Atoi(group)
	}
	for _, a := range args[1:] {
		if err == nil {
			err = os.Lchown(a, uid, gid)
		}
	}
	if err != nil {
		return fail(s, "chown", err)
	}
	return 0
}

func pwd(_ []string, s stdio) int {
	dir, err := os.Getwd()
	if err != nil {
		return fail(s, "pwd", err)
	}
	fmt.Fprintln(s.out, dir)
	return 0
}

func env(args []string, s stdio) int {
	if len(args) > 0 {
		return execute(args, nil, s)
	}
	for _, e := range os.Environ() {
		fmt.Fprintln(s.out, e)
	}
	return 0
}

func id(_ []string, s stdio) int {
	groups, _ := os.Getgroups()
	fmt.Fprintf(s.out, "uid=%d gid=%d groups=%v\n", os.Getuid(), os.Getgid(), groups)
	return 0
}

func sleep(args []string, s stdio) int {
	if len(args) != 1 {
		return fail(s, "sleep", fmt.Errorf("want seconds"))
	}
	n, err := strconv.ParseFloat(args[0], 64)
	if err != nil {
		return fail(s, "sleep", err)
	}
	time.Sleep(time.Duration(n * float64(time.Second)))
	return 0
}

func seq(args []string, s stdio) int {
	from, to := 1, 0
	var err error
	if len(args) > 0 {
		to, err = strconv.Atoi(args[len(args)-1])
	}
	if len(args) > 1 && err == nil {
		from, err = strconv.Atoi(args[0])
	}
	if err != nil {
		return fail(s, "seq", err)
	}
	for ; from <= to; from++ {
		fmt.Fprintln(s.out, from)
	}
	return 0
}

// test knows -e -f -d -L -s -n -z and = and !=.
func test(args []string, s stdio) int {
	ok := false
	switch {
	case len(args) == 3 && args[1] == "=":
		ok = args[0] == args[2]
	case len(args) == 3 && args[1] == "!=":
		ok = args[0] != args[2]
	case len(args) == 2 && args[0] == "-n":
		ok = args[1] != ""
	case len(args) == 2 && args[0] == "-z":
		ok = args[1] == ""
	case len(args) == 2 && args[0] == "-L":
		fi, err := os.Lstat(args[1])
		ok = err == nil && fi.Mode().Type() == fs.ModeSymlink
	case len(args) == 2:
		fi, err := os.Stat(args[1])
		ok = err == nil && (args[0] == "-e" || args[0] == "-f" && fi.Mode().IsRegular() || args[0] == "-d" && fi.IsDir() || args[0] == "-s" && fi.Size() > 0)
	default:
		fmt.Fprintf(s.err, "test: %q is not supported\n", args)
		return 2
	}
	if ok {
		return 0
	}
	return 1
}

func hostname(_ []string, s stdio) int {
	h, err := os.Hostname()
	if err != nil {
		return fail(s, "hostname", err)
	}
	fmt.Fprintln(s.out, h)
	return 0
}

// kill sends a signal by its number: kill -9 PID.
func kill(args []string, s stdio) int {
	letters, args := options(args)
	sig := syscall.SIGTERM
	if n, err := strconv.Atoi(letters); err == nil {
		sig = syscall.Signal(n)
	}
	for _, a := range args {
		pid, err := strconv.Atoi(a)
		if err == nil {
			err = syscall.Kill(pid, sig)
		}
		if err != nil {
			return fail(s, "kill", err)
		}
	}
	return 0
}

// fill makes a file as linkers and databases do, which give it its size first: fill FILE SIZE TEXT.
func fill(args []string, s stdio) int {
	if len(args) != 3 || args[2] == "" {
		return fail(s, "fill", fmt.Errorf("want a file, a size and a text"))
	}
	size, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return fail(s, "fill", err)
	}
	f, err := os.Create(args[0])
	if err != nil {
		return fail(s, "fill", err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return fail(s, "fill", err)
	}
	text := strings.Repeat(args[2], 1+64<<10/len(args[2]))
	for at := int64(0); at < size; at += int64(len(text)) {
		if _, err := f.WriteAt([]byte(text[:min(int64(len(text)), size-at)]), at); err != nil {
			return fail(s, "fill", err)
		}
	}
	return 0
}
