package sandbox

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// idRange is a line of a map: count IDs from inside on are those from outside
// on in the parent namespace.
type idRange struct{ inside, outside, count int64 }

// idMap is one way to give a user namespace its IDs.
type idMap struct {
	how      string
	uid, gid []idRange
	write    func(pid int) error
	err      error // why this way is closed
}

func (m idMap) single() bool { return len(m.uid) == 1 && m.uid[0].count == 1 }

// idMaps lists the ways, the best first.
func idMaps() []idMap {
	if os.Geteuid() != 0 {
		return []idMap{helperMap(), oneID()}
	}
	return []idMap{ownMap(), helperMap(), oneID()}
}

// ownMap keeps all IDs as they are: what a container's root may do without
// any helper.
func ownMap() idMap {
	if name := lacking(unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP); name != "" {
		return idMap{err: fmt.Errorf("capability %s is missing, so root cannot map IDs (docker run --cap-add %[1]s)", name)}
	}
	m := idMap{how: "own capabilities map all IDs"}
	if m.uid, m.err = sameIDs("/proc/self/uid_map"); m.err != nil {
		return m
	}
	m.gid, m.err = sameIDs("/proc/self/gid_map")
	m.write = func(pid int) error { return m.writeFiles(pid, "") }
	return m
}

func sameIDs(file string) ([]idRange, error) {
	ranges, err := readMap(file)
	for i := range ranges {
		ranges[i].outside = ranges[i].inside
	}
	return ranges, err
}

func readMap(file string) (ranges []idRange, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		var r idRange
		if _, err := fmt.Sscan(line, &r.inside, &r.outside, &r.count); err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

// helperMap maps root to the user and the others to what /etc/subuid and
// /etc/subgid grant, by the set-user-ID helpers.
func helperMap() idMap {
	uids, err := granted("/etc/subuid")
	if err != nil {
		return idMap{err: err}
	}
	gids, err := granted("/etc/subgid")
	if err != nil {
		return idMap{err: err}
	}
	m := idMap{
		how: "newuidmap maps the range of /etc/subuid",
		uid: append([]idRange{{0, int64(os.Geteuid()), 1}}, uids...),
		gid: append([]idRange{{0, int64(os.Getegid()), 1}}, gids...),
	}
	for _, helper := range []string{"newuidmap", "newgidmap"} {
		if _, err := helperPath(helper); err != nil {
			return idMap{err: fmt.Errorf("%s is not installed (package uidmap or shadow-utils)", helper)}
		}
	}
	m.write = func(pid int) error {
		if err := help("newuidmap", pid, m.uid); err != nil {
			return err
		}
		return help("newgidmap", pid, m.gid)
	}
	return m
}

// granted reads the ranges that a file of subordinate IDs gives this user.
func granted(file string) (ranges []idRange, err error) {
	id := strconv.Itoa(os.Getuid())
	name := cmp.Or(userName(id), id)
	f, err := os.Open(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	defer f.Close()
	inside := int64(1)
	for s := bufio.NewScanner(f); s.Scan(); {
		who, rest, _ := strings.Cut(strings.TrimSpace(s.Text()), ":")
		start, count, ok := strings.Cut(rest, ":")
		if !ok || who != name && who != id {
			continue
		}
		first, err1 := strconv.ParseInt(start, 10, 64)
		n, err2 := strconv.ParseInt(count, 10, 64)
		if err1 != nil || err2 != nil || first <= 0 || n <= 0 {
			continue
		}
		ranges = append(ranges, idRange{inside, first, n})
		inside += n
	}
	if ranges == nil {
		return nil, fmt.Errorf("%s grants %s no IDs (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s)", file, name, name)
	}
	return ranges, nil
}

// What follows is done without os/exec and os/user: what this package imports is what each child waits for, see init.

// userName is the name of the user with an ID; "" if it has none.
func userName(id string) string {
	b, _ := os.ReadFile("/etc/passwd")
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(line, ":"); len(f) > 2 && f[2] == id {
			return f[0]
		}
	}
	return ""
}

// helperPath finds a set-user-ID helper on the PATH.
func helperPath(helper string) (string, error) {
	files, _, err := lookPath(helper, []string{"PATH=" + os.Getenv("PATH")})
	if err != nil {
		return "", err
	}
	return files[0], nil
}

func help(helper string, pid int, ranges []idRange) error {
	decimal := func(n int64) string { return strconv.FormatInt(n, 10) }
	args := []string{helper, strconv.Itoa(pid)}
	for _, r := range ranges {
		args = append(args, decimal(r.inside), decimal(r.outside), decimal(r.count))
	}
	program, err := helperPath(helper)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	p, err := os.StartProcess(program, args, &os.ProcAttr{Files: []*os.File{nil, w, w}})
	w.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", helper, err)
	}
	said, _ := io.ReadAll(r)
	state, err := p.Wait()
	if err == nil && !state.Success() {
		err = errors.New(state.String())
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", helper, err, strings.TrimSpace(string(said)))
	}
	return nil
}

// oneID maps root to the user and nobody else, which everybody may do.
func oneID() idMap {
	m := idMap{
		how: "only one ID, the user's own",
		uid: []idRange{{0, int64(os.Geteuid()), 1}},
		gid: []idRange{{0, int64(os.Getegid()), 1}},
	}
	m.write = func(pid int) error { return m.writeFiles(pid, "deny") }
	return m
}

// writeFiles writes the maps through /proc. Whoever may not change groups has
// to say so first.
func (m idMap) writeFiles(pid int, setgroups string) error {
	dir := "/proc/" + strconv.Itoa(pid)
	if setgroups != "" {
		if err := os.WriteFile(dir+"/setgroups", []byte(setgroups), 0); err != nil {
			return err
		}
	}
	if err := os.WriteFile(dir+"/uid_map", lines(m.uid), 0); err != nil {
		return err
	}
	return os.WriteFile(dir+"/gid_map", lines(m.gid), 0)
}

func lines(ranges []idRange) (b []byte) {
	for _, r := range ranges {
		b = fmt.Appendf(b, "%d %d %d\n", r.inside, r.outside, r.count)
	}
	return b
}
