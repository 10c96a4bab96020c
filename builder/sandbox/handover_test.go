package sandbox

import "testing"

func TestDNSEdit(t *testing.T) {
	const host = "# made by hand\nnameserver 1.1.1.1\nnameserver 2.2.2.2\ndomain old.example\noptions ndots:2"
	for _, c := range []struct {
		dns  DNS
		want string
	}{
		{DNS{}, host},
		{DNS{Servers: []string{"9.9.9.9", "::1"}}, "# made by hand\ndomain old.example\noptions ndots:2\nnameserver 9.9.9.9\nnameserver ::1\n"},
		{DNS{Search: []string{"a", "b"}}, "# made by hand\nnameserver 1.1.1.1\nnameserver 2.2.2.2\noptions ndots:2\nsearch a b\n"},
		{DNS{Options: []string{"rotate"}}, "# made by hand\nnameserver 1.1.1.1\nnameserver 2.2.2.2\ndomain old.example\noptions rotate\n"},
	} {
		if got := string(c.dns.edit([]byte(host))); got != c.want {
			t.Errorf("%+v: %q, want %q", c.dns, got, c.want)
		}
	}
	if got := string(DNS{Servers: []string{"9.9.9.9"}}.edit(nil)); got != "nameserver 9.9.9.9\n" {
		t.Errorf("of nothing: %q", got)
	}
}

func TestOneIDOwnsAllMounts(t *testing.T) {
	p := Process{Insecure: true, Mounts: []Mount{{Type: Data, Target: "/k", UID: 5, GID: 6, Mode: 0o440}}}
	for _, single := range []bool{false, true} {
		p.Ground.SingleID = single
		h, err := new(Runner).prepare(p)
		if err != nil {
			t.Fatal(err)
		}
		want := Mount{Type: Data, Target: "/k", UID: 5, GID: 6, Mode: 0o440}
		if single {
			want.UID, want.GID = 0, 0
		}
		if got := h.Process.Mounts[0]; got.UID != want.UID || got.GID != want.GID || got.Mode != want.Mode {
			t.Errorf("single %v: %+v, want %+v", single, got, want)
		}
		if p.Mounts[0].UID != 5 {
			t.Error("the caller's mounts were changed")
		}
	}
}
