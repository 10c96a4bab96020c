package builder

import (
	"slices"
	"testing"
)

func TestAccounts(t *testing.T) {
	a := accounts{
		passwd: []byte("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:\nalias:x:1000:5::/elsewhere:\nnohome:x:7:8\n"),
		group:  []byte("root:x:0:\nvideo:x:44:app\ntv:x:44:app\naudio:x:29:app\n"),
	}
	for _, c := range []struct {
		spec string
		runs owner // of a process
		home string
		dir  owner // of a directory that WORKDIR makes
	}{
		{"", owner{0, 0}, "/root", owner{0, 0}},
		{"app", owner{1000, 1001}, "/home/app", owner{1000, 1001}},
		{"alias", owner{1000, 5}, "/home/app", owner{1000, 5}},
		{"app:video", owner{1000, 44}, "/home/app", owner{1000, 44}},
		{"77", owner{77, 0}, "/", owner{77, 77}},
		{"77:9", owner{77, 9}, "/", owner{77, 9}},
		{"7", owner{7, 8}, "", owner{7, 7}},
		{"+77:+9", owner{77, 9}, "/", owner{77, 9}},
		{"+77", owner{77, 0}, "/", owner{77, 77}},
	} {
		who, err := a.lookup(c.spec)
		if err != nil {
			t.Errorf("%q: %v", c.spec, err)
			continue
		}
		if who.owner != c.runs || who.home != c.home {
			t.Errorf("%q: runs as %v at %q, want %v at %q", c.spec, who.owner, who.home, c.runs, c.home)
		}
		if got := a.maker(c.spec); got != c.dir {
			t.Errorf("%q: directories belong to %v, want %v", c.spec, got, c.dir)
		}
	}
	who, err := a.lookup("app")
	if want := []int{29, 44, 1001}; err != nil || !slices.Equal(who.groups, want) {
		t.Errorf("app: groups %v, %v, want %v: each once", who.groups, err, want)
	}
	for spec, want := range map[string]owner{"nobody": {0, 0}, "app:nogroup": {1000, 1001}} {
		if _, err := a.lookup(spec); err == nil {
			t.Errorf("%q: may run", spec)
		}
		if got := a.maker(spec); got != want {
			t.Errorf("%q: directories belong to %v, want %v", spec, got, want)
		}
	}
}

func TestWorkdirOwner(t *testing.T) {
	b := newBench(t)
	got := b.build("FROM scratch\nUSER 5\nWORKDIR /a/b\nUSER 6:7\nWORKDIR c\n", nil)
	sameListing(t, got, map[string]string{"a": "d 0755 5:5 ", "a/b": "d 0755 5:5 ", "a/b/c": "d 0755 6:7 "})
	if err := b.try("FROM scratch\nUSER app\nWORKDIR /a\n", nil, nil); err == nil {
		t.Error("made a directory for a named user of an empty image")
	}
}
