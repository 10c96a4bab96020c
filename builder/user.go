package builder

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"

	"filo/layer"
)

// accounts are the users and groups of a root filesystem, as text of /etc/passwd and /etc/group.
type accounts struct{ passwd, group []byte }

// maxAccounts bounds how much of /etc/passwd and /etc/group is read: the files are the image's, so anybody's.
const maxAccounts = 16 << 20

// readAccounts reads the accounts of v. A file that is missing is empty.
func readAccounts(v *layer.View) (accounts, error) {
	passwd, err := readSmall(v, "etc/passwd")
	if err != nil {
		return accounts{}, err
	}
	group, err := readSmall(v, "etc/group")
	return accounts{passwd, group}, err
}

func readSmall(v *layer.View, name string) ([]byte, error) {
	if v == nil {
		return nil, nil
	}
	resolved, err := v.Resolve(name, true)
	if err != nil {
		return nil, fmt.Errorf("read /%s of the image: %w", name, err)
	}
	if e, ok := v.Entry(resolved); !ok || e.Type != layer.Regular {
		return nil, nil
	}
	f, err := v.Open(resolved)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read /%s of the image: %w", name, err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxAccounts))
}

// account is who a process runs as.
type account struct {
	owner
	groups []int
	home   string
}

// lookup finds the account that a USER instruction names: a name or number, with or without a group. An unknown
// number is a user with group 0 and home /; an unknown name is an error.
func (a accounts) lookup(spec string) (account, error) {
	u, err := user.GetExecUser(spec, nil, bytes.NewReader(a.passwd), bytes.NewReader(a.group))
	name, group, _ := strings.Cut(spec, ":")
	if err != nil && name == "root" && group == "" { // root needs no entry to be 0
		u, err = &user.ExecUser{}, nil
	}
	if err != nil {
		return account{}, fmt.Errorf("USER %s: %w", spec, err)
	}
	home := a.home(u.Uid)
	groups := append(u.Sgids, u.Gid) // as runc does; id(1) shows it
	slices.Sort(groups)
	return account{owner{u.Uid, u.Gid}, slices.Compact(groups), home}, nil
}

// home returns the home of the first user with this number, whatever name it was asked for by.
func (a accounts) home(uid int) string {
	users, err := user.ParsePasswdFilter(bytes.NewReader(a.passwd), func(u user.User) bool { return u.Uid == uid })
	if err != nil || len(users) == 0 {
		return "/"
	}
	return users[0].Home
}

// maker finds whom a directory belongs to that WORKDIR makes under this USER: who --chown would name. As nothing runs,
// a user who does not exist does no harm and stands for root.
func (a accounts) maker(spec string) owner {
	name, group, hasGroup := strings.Cut(spec, ":")
	o, err := a.chown(name)
	if err != nil {
		o = owner{}
	}
	if !hasGroup {
		return o
	}
	if g, err := a.chown(":" + group); err == nil {
		o.gid = g.gid
	}
	return o
}

// chown finds the owner that --chown names. A number alone is user and group; a name alone brings its primary group;
// a group alone leaves the user 0. Unknown names are errors.
func (a accounts) chown(spec string) (owner, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	var o owner
	if id, ok := number(name); ok {
		o = owner{id, id}
	} else if name != "" {
		u, err := a.lookup(name)
		if err != nil {
			return o, fmt.Errorf("--chown=%s: no user %q in the image's /etc/passwd", spec, name)
		}
		o = u.owner
	}
	if !hasGroup {
		return o, nil
	}
	if group == "" { // as in BuildKit no login group stands after a colon
		o.gid = 0
		return o, nil
	}
	if id, ok := number(group); ok {
		o.gid = id
		return o, nil
	}
	groups, err := user.ParseGroupFilter(bytes.NewReader(a.group), func(g user.Group) bool { return g.Name == group })
	if err != nil {
		return o, fmt.Errorf("--chown=%s: %w", spec, err)
	}
	if len(groups) == 0 {
		if group == "root" {
			o.gid = 0
			return o, nil
		}
		return o, fmt.Errorf("--chown=%s: no group %q in the image's /etc/group", spec, group)
	}
	o.gid = groups[0].Gid
	return o, nil
}

// number reads an id; a sign is allowed, as BuildKit and USER allow it.
func number(s string) (int, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return int(n), err == nil && n >= 0 && n <= math.MaxUint32
}
