package rootfs

import (
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// resolveLinks bounds how many links one Resolve follows: that of resolvers outside of the kernel, which stops at 40.
const resolveLinks = 255

// Resolve follows the symbolic links in name, absolute or relative to the root, as if the root of some file system were
// "/", and returns the path it leads to in the form of io/fs names. ".." stops at the root; a link in the last component
// is followed only if follow is set. readlink is asked for clean paths without links but perhaps the last one; it returns
// the text of a link, and false for anything else or nothing: what does not exist stays as written.
func Resolve(name string, follow bool, readlink func(name string) (target string, ok bool, err error)) (string, error) {
	done, todo, links := ".", strings.Split(name, "/"), 0
	for len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			done = path.Dir(done)
			continue
		}
		next := path.Join(done, part)
		if !follow && !hasName(todo) {
			return next, nil
		}
		target, ok, err := readlink(next)
		if err != nil {
			return "", err
		}
		if !ok {
			done = next
			continue
		}
		if links++; links > resolveLinks {
			return "", &fs.PathError{Op: "resolve", Path: name, Err: unix.ELOOP}
		}
		if path.IsAbs(target) {
			done = "."
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return done, nil
}

// hasName reports whether a name is left in parts; "link/" means what link points to, but the last name is what is asked
// about, so a slash behind it does not count.
func hasName(parts []string) bool {
	return slices.ContainsFunc(parts, func(p string) bool { return p != "" && p != "." })
}
